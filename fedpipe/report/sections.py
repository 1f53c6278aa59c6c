"""The tables of a report, each made from a run's summary."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedpipe.printable import printable
from fedpipe.report.console import why
from fedpipe.report.document import Block, Code, Heading, Paragraph, Strong, Table
from fedpipe.report.format import bytes_text, count, integer, is_number, number, tokens_per_s
from fedpipe.report.records import NOT_VALIDATED, RoundRecord
from fedpipe.report.summary import ClientText, Guess, RunSummary, Samples

_COLLECTIVES = {
    "fedavg": "stage weights to and from the average (FedAvg)",
    "shared_gradients": "gradients of the shared server stages between replicas",
    "gradients": "gradients between a client's own ranks",
    "embedding": "word embedding, down the pipe to the final decoder",
    "control": "counters and agreements",
}
"""What travels in the collectives of the ledger."""
_SHOWN = 50
"""Updates that a report lists at most, the latest."""

_MAX_CLIENT_ROWS = 60
"""Of more clients the table shows the first."""


def samples_section(run: RunSummary) -> list[Block]:
    """Masked words of held-out text: the truth, the model's guesses and a unigram guess."""
    if run.samples is None or not run.samples["examples"]:
        return []
    rows, right = [], 0
    for example in run.samples["examples"]:
        truth, model = example["truth"], example["model"]
        hit = model[0][0] == truth
        right += hit
        shown = Strong(truth) if hit else truth
        rows.append((example["text"], shown, _guesses(model), _guesses(example["unigram"][:1])))
    text = (
        f"Words of held-out text that the trained model has not seen: its first guess is right for "
        f"{right} of {len(rows)} (highlighted)."
    )
    unigram, final = run.samples["unigram_loss"], _final_loss(run)
    if is_number(unigram):
        text += f" Guessing by word frequency alone has a loss of {number(unigram, 3)} nats"
        text += f"; the model's is {number(final, 3)}." if final is not None else "."
    columns = ("held-out text", "masked word", "the model's guesses", "unigram guess")
    return [
        Heading(text="Masked words, filled in"),
        Paragraph(text=text),
        Table(columns=columns, rows=tuple(rows)),
    ]


def samples_text(run_dir: Path) -> str:
    """Render samples.json for a console; empty where it is absent or has no example."""
    path = run_dir / "samples.json"
    if not path.is_file():
        return ""
    samples: Samples = json.loads(path.read_text(encoding="utf-8"))
    if not samples["examples"]:
        return ""
    lines = ["masked words of held-out text, filled in by the model and by unigram frequency:"]
    for example in samples["examples"]:
        guesses = ", ".join(f"{word} {p:.3f}" for word, p in example["model"])
        common, share = example["unigram"][0]
        lines.append(f"  {' '.join(example['text'].split())}")
        lines.append(
            f"    truth   {example['truth']}: model {example['truth_probability']:.4f}, "
            f"unigram {example['truth_unigram']:.4f}"
        )
        lines.append(f"    guesses model {guesses}; unigram {common} {share:.3f}")
    return printable("\n".join(lines))


def _guesses(pairs: list[Guess]) -> str:
    return ", ".join(f"{word} {number(100 * share, 0)} %" for word, share in pairs) or "-"


def _final_loss(run: RunSummary) -> float | None:
    stage = run.last_validated_stage
    loss = run.stage_scores(stage)[-1][1].get("loss") if stage is not None else None
    return loss if is_number(loss) else None


def text_section(run: RunSummary) -> list[Block]:
    """What text every client trained on, what was left out, and what was held out."""
    facts = run.text
    if facts is None:
        return []
    clients = facts["clients"]
    number, same = facts["held_out_documents"], facts["held_out_in_training"]
    lines = []
    if number:
        share = f"{same:,} of {number:,} held-out documents ({100 * same / number:.1f} %) stand"
        lines.append(
            f"{share if same else f'None of the {number:,} held-out documents stands'} in the "
            "training text too (compared without white space)."
        )
    if number and facts["held_out_ignored"]:
        lines.append(f"{facts['held_out_ignored']:,} have an owner that is no client's.")
    if any(row["left_out"] or row.get("held_out_left_out") for row in clients):
        lines.append(
            f"Blocks with fewer than {facts['num_masked']:,} ordinary tokens are "
            "left out: too little of them can be masked."
        )
    shown = clients[:_MAX_CLIENT_ROWS]
    if len(clients) > len(shown):
        lines.append(f"The first {len(shown)} of {len(clients):,} clients; text.json has them all.")
    columns = (
        "client",
        "owners",
        "documents",
        "tokens",
        "blocks",
        "blocks left out",
        "held-out documents",
        "held-out blocks",
        "held-out blocks left out",
    )
    rows = tuple(
        (
            integer(row["client"]),
            _owners(row),
            integer(row["documents"]),
            integer(row["tokens"]),
            integer(row["blocks"]),
            integer(row["left_out"]),
            integer(row.get("held_out_documents")),
            integer(row.get("held_out_blocks")),
            integer(row.get("held_out_left_out")),
        )
        for row in shown
    )
    table = Table(columns=columns, rows=rows, numeric=frozenset(range(len(columns))) - {1})
    paragraphs: list[Block] = [Paragraph(text=" ".join(lines))] if lines else []
    return [Heading(text="Text of the clients"), *paragraphs, table]


def _owners(row: ClientText) -> str:
    names, more = row["owners"], row["num_owners"] - len(row["owners"])
    return ", ".join([*names, *([f"{more:,} more"] if more > 0 else [])]) or "-"


def rounds_table(run: RunSummary, rounds: Sequence[RoundRecord]) -> Table:
    """One row per round: who trained, the losses, the speed."""
    stages = range(run.num_stages)
    last = run.last_validated_stage
    scored = dict(run.stage_scores(last)) if last is not None else {}
    columns = (
        "round",
        "clients",
        *(f"loss {s}" for s in stages),
        "validation",
        "worst client",
        "tokens",
        "tok/s",
        "time, s",
        "averaging, s",
        "averaged bytes",
    )
    rows = []
    for record in rounds:
        round_id = record.get("round") or 0
        entry = scored.get(round_id, NOT_VALIDATED)
        losses = [*(record.get("loss") or []), *[None] * len(stages)][: len(stages)]
        rows.append(
            (
                str(round_id + 1),
                " ".join(str(client) for client in record.get("clients") or []) or "-",
                *(number(loss, 3) for loss in losses),
                number(entry.get("loss"), 3),
                f"{number(entry.get('worst_loss'), 3)} ({integer(entry.get('worst_client'))})",
                integer(record.get("tokens")),
                tokens_per_s(record.get("tokens_per_s")),
                number(record.get("seconds"), 1),
                number(record.get("sync_s"), 2),
                bytes_text(record.get("sync_bytes")),
            )
        )
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(len(columns))) - {1})


def refused_section(run: RunSummary) -> list[Block]:
    """Updates that no average has taken, and why; nothing where there are none."""
    refused = [(r["round"], f) for r in run.rounds for f in r.get("refused") or []]
    if not refused:
        return []
    text = (
        f"{count(len(refused), 'update')} held numbers that are not finite. A client's whole update"
        " is left out of its round then; the others' weights are what is averaged"
        " (`federation.on_bad_update`)."
    )
    rows = tuple(
        (str(round_id + 1), str(fault["client"]), why(fault))
        for round_id, fault in refused[-_SHOWN:]
    )
    table = Table(columns=("round", "client", "why"), rows=rows, numeric=frozenset({0, 1}))
    return [Heading(text="Updates that were left out"), Paragraph(text=text), table]


def ledger(run: RunSummary) -> list[Block]:
    """What crossed each pipe edge and each collective, in bytes, and what that means."""
    tokens = run.tokens
    rows: list[tuple[str, ...]] = []
    for (source, target), edge in run.edges().items():
        forward, backward = edge.get("bytes_forward", 0), edge.get("bytes_backward", 0)
        masked = "masked positions' " if target >= run.num_encoder_stages else ""
        out, back = (_place(run, source, target), _place(run, target, source))
        what = f"{masked}activations, stage {source} to {target}"
        rows.append(_ledger_row(what, out, edge, forward, tokens, "forward"))
        what = f"{masked}gradients, stage {target} to {source}"
        rows.append(_ledger_row(what, back, edge, backward, tokens, "backward"))
    for name, value in run.collectives().items():
        what = _COLLECTIVES.get(name, name)
        rows.append((what, "collective", "-", bytes_text(value), _per_token(value, tokens)))
    columns = ("what", "where", "messages", "bytes", "bytes per token")
    table = Table(columns=columns, rows=tuple(rows), numeric=frozenset({2, 3, 4}))
    return [Paragraph(text=_verdict(run)), table]


def _place(run: RunSummary, source: int, target: int) -> str:
    """Where a message passes; heads at home are stages of the client's behind the encoder's."""
    clients = [
        stage < run.num_client_stages or stage >= run.num_encoder_stages
        for stage in (source, target)
    ]
    return {
        (True, True): "inside a client",
        (True, False): "out of the clients",
        (False, True): "into the clients",
        (False, False): "inside the cluster",
    }[clients[0], clients[1]]


def _ledger_row(
    what: str, place: str, edge: dict[str, float], sent: float, tokens: int, direction: str
) -> tuple[str, ...]:
    shown = Strong(bytes_text(sent)) if direction == "backward" else bytes_text(sent)
    messages = integer(edge.get(f"messages_{direction}"))
    return (what, place, messages, shown, _per_token(sent, tokens))


def _per_token(sent: float, tokens: int) -> str:
    return number(sent / tokens, 1) if tokens else "-"


def _verdict(run: RunSummary) -> str:
    if not run.edges():
        return "The model is one stage: it has no cut, and only stage weights left the clients."
    backward = run.bytes_sent("backward")
    rounds = count(len(run.traffic), "round")
    if backward == 0:
        lent = ""
        if run.collectives().get("embedding"):
            lent = ", and the averaged word embedding, as which its decoder begins every turn"
        return (
            f"0 bytes travelled backward in {rounds}: every stage learned from its own local "
            "loss, and no gradient crossed a cut. Raw text stayed with its client. Activations of "
            "the cut layer went forward, with the positions and labels of the masked words, which "
            f"the head on the server needs{lent}. {_averaging(run)}"
        )
    at_home = run.head_location == "client"
    targets = "the positions" if at_home else "the positions and labels"
    labels = (
        " No label left its client: the masked positions' activations came home to its heads."
        if at_home
        else ""
    )
    if run.objective == "end_to_end":
        what = "of gradients travelled backward"
        why = "(pipeline.objective is end_to_end): the earlier stages waited for them"
    else:
        what = "of gradients went from the clients' heads to the server stages"
        why = "and none to a client's encoder: its stages learned from their own local losses"
    return (
        f"{bytes_text(backward)} {what} in {rounds} {why}. Raw text stayed with its client;"
        f" activations went forward with {targets} of the masked words.{labels} {_averaging(run)}"
    )


def _averaging(run: RunSummary) -> str:
    if (run.config.get("federation") or {}).get("server") == "sequential":
        return "Nothing was averaged: every client went on where the one before it had ended."
    return "Stage weights were averaged once per round."


def repeat_section(run: RunSummary, command: str) -> list[Block]:
    """Say what was planned, how the run is repeated with its own configuration, and where it ran.

    Args:
        run: The run.
        command: The command of ``fedpipe`` that it is a run of.
    """
    blocks: list[Block] = [Heading(text="Plan"), Code(text=run.plan)] if run.plan else []
    words = ["fedpipe", command, "--config", str(run.run_dir / "config.yaml")]
    again = shlex.join([*words, "--run-dir", f"{run.run_dir}-again"])
    blocks += [Heading(text="Repeat this run"), Code(text=again)]
    if run.environment:
        rows = environment_rows(run.environment)
        blocks += [Heading(text="Environment"), Table(columns=("key", "value"), rows=rows)]
    return blocks


def environment_rows(environment: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Flatten env.json: nested keys are joined by dots, lists of plain values by spaces.

    The command that repeats all is left out, because a page shows it as code.
    """
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        if key == "repeat":
            continue
        if isinstance(value, dict):
            rows += [(f"{key}.{inner}", text) for inner, text in environment_rows(value)]
        elif isinstance(value, list):
            rows.append((str(key), " ".join(str(entry) for entry in value) or "-"))
        else:
            rows.append((str(key), "-" if value is None else str(value)))
    return tuple(rows)
