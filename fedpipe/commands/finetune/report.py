"""The report of a fine-tuning, and the report that compares several fine-tunings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from fedpipe.commands.finetune.prepared import ClientFacts
from fedpipe.report.document import (
    Block,
    Code,
    Facts,
    Figure,
    Heading,
    Paragraph,
    Table,
    aligned,
    write_page,
)
from fedpipe.report.drawing import (
    BLUE,
    PALETTE,
    VERMILLION,
    Draw,
    label_ends,
    render,
    whole_rounds,
)
from fedpipe.report.format import bytes_text, count, duration, integer, number
from fedpipe.report.records import NOT_SCORED, EdgeTraffic, TuningEvalRecord
from fedpipe.report.sections import refused_section, repeat_section
from fedpipe.report.summary import RunSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_MAX_CLIENT_ROWS = 64
_SHARES = ("entity_f1", "micro_f1", "f1", "accuracy")
_TITLES = {"entity_f1": "entity F1", "micro_f1": "micro-F1", "f1": "F1"}


def write_finetune_report(run_dir: Path) -> Path:
    """Write ``report.html``, ``report.md`` and the figures of a fine-tuning into its directory.

    Args:
        run_dir: Run directory with metrics.jsonl and data/data.json.

    Returns:
        The path of ``report.html``.

    Raises:
        CheckpointError: There is no metrics.jsonl, or it is damaged.
    """
    run = RunSummary.load(Path(run_dir))
    blocks: list[Block] = [
        *_headline(run),
        *_scores(run),
        *_stages(run),
        *_clients(run),
        *_rounds(run),
        *refused_section(run),
        *repeat_section(run, "finetune"),
    ]
    return write_page(run.run_dir / "report.html", f"fedpipe finetune: {_name(run)}", blocks)


def write_comparison(directory: Path, runs: Sequence[Path]) -> Path:
    """Write the report of several fine-tunings into the directory above them.

    Args:
        directory: Directory of the grid.
        runs: Directories of the runs; a run without a score is left out of the figure.

    Returns:
        The path of ``report.html``.
    """
    found = [RunSummary.load(run) for run in runs]
    curves = {run.run_dir.name: _curve(run, "score") for run in found}
    figure = Figure(
        file="scores.png",
        svg=render(_lines(curves, _title(found[0])), directory / "scores.png"),
        caption="The averaged model on the held-out examples of all clients, after each round.",
    )
    blocks: list[Block] = [
        _compared(found),
        figure,
        Heading(text="Runs"),
        *(Code(text=f"{run.run_dir.name}\n{run.plan}") for run in found),
    ]
    title = f"fedpipe finetune: {directory.resolve().name}"
    return write_page(directory / "report.html", title, blocks)


def result_table(runs: Sequence[Path]) -> str:
    """Return the table that compares the runs, as text for a terminal."""
    return "\n".join(aligned(_compared([RunSummary.load(run) for run in runs])))


def _compared(runs: Sequence[RunSummary]) -> Table:
    rows = tuple(tuple(_row(run)) for run in runs)
    return Table(columns=_COLUMNS, rows=rows, numeric=frozenset(range(1, len(_COLUMNS))))


def outcome_text(run_dir: Path) -> str:
    """Return a short text with the score of a finished run."""
    return _row(RunSummary.load(run_dir))[1]


_COLUMNS = (
    "run", "score", "worst client", "clients", "trained", "of the model", "up per client, round",
    "sent in all", "s per round",
)  # fmt: skip


def _row(run: RunSummary) -> list[str]:
    last = _last_score(run)
    traffic, rounds = run.tuning_traffic, run.tuning_rounds
    sent = sum(record["bytes_up"] + record["bytes_down"] for record in traffic)
    sent += sum(sum(_both_ways(edge)) for record in traffic for edge in record.get("edges", ()))
    trained, share = _trained(run)
    return [
        run.run_dir.resolve().name,
        f"{_shown(last, last.get('score'))} {_title(run)}",
        f"{_shown(last, last.get('worst'))} (client {integer(last.get('worst_client'))})",
        integer(len(last.get("clients") or {})),
        trained,
        share,
        bytes_text(traffic[0]["client_bytes_up"]) if traffic else "-",
        bytes_text(sent),
        number(median(record["seconds"] for record in rounds), 1) if rounds else "-",
    ]


def _trained(run: RunSummary) -> tuple[str, str]:
    """Return the trained parameters as the plan names them."""
    for line in run.plan.splitlines():
        if line.startswith("  method"):
            words = line.split()
            return words[2], f"{words[4].strip('(')} %"
    return "-", "-"


def _name(run: RunSummary) -> str:
    return str(run.config.get("name") or run.run_dir.resolve().name)


def _title(run: RunSummary) -> str:
    metric = _last_score(run)["metric"]
    return _TITLES.get(metric, metric)


def _last_score(run: RunSummary) -> TuningEvalRecord:
    return [NOT_SCORED, *run.tuning_scores][-1]


def _shown(record: TuningEvalRecord, value: float | None) -> str:
    if record.get("metric") in _SHARES:
        return number(None if value is None else 100 * value, 2)
    return number(value, 4)


def _headline(run: RunSummary) -> list[Block]:
    rounds, traffic, scored = run.tuning_rounds, run.tuning_traffic, run.tuning_scores
    items: list[tuple[str, str, str]] = []
    if scored:
        last = scored[-1]
        worst = f"worst client {_shown(last, last['worst'])} (client {last['worst_client']})"
        items.append((_title(run), _shown(last, last["score"]), worst))
    trained, share = _trained(run)
    items.append(("trained parameters", trained, f"{share} of the model"))
    if traffic:
        up = sum(record["bytes_up"] for record in traffic)
        down = sum(record["bytes_down"] for record in traffic)
        each = f"{bytes_text(traffic[0]['client_bytes_up'])} per client and round"
        items.append(("bytes from the clients", bytes_text(up), each))
        items.append(
            ("bytes to the clients", bytes_text(down), f"in {count(len(rounds), 'round')}")
        )
    if rounds:
        seconds = sum(record["seconds"] for record in rounds)
        items.append(("training time", duration(seconds), "scoring excluded"))
        memory = max(max(record["memory_bytes"]) for record in rounds)
        items.append(("largest worker", bytes_text(memory), "resident memory at its peak"))
    return [Facts(items=tuple(items))]


def _curve(run: RunSummary, name: Literal["score", "worst"]) -> list[tuple[int, float]]:
    factor = 100 if _title(run) in {_TITLES.get(m, m) for m in _SHARES} else 1
    return [
        (record["round"] + 1, factor * score)
        for record in run.tuning_scores
        if (score := record[name]) is not None
    ]


def _lines(curves: dict[str, list[tuple[int, float]]], title: str) -> Draw:
    def draw(figure: Canvas) -> None:
        axes = figure.add_subplot(xlabel="round", ylabel=title)
        labels = []
        for index, (name, points) in enumerate(curves.items()):
            if not points:
                continue
            color = PALETTE[index % len(PALETTE)]
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, linewidth=1.6)
            labels.append((points[-1][1], name, color))
        label_ends(axes, labels)
        whole_rounds(axes)

    return draw


def _scores(run: RunSummary) -> list[Block]:
    if not run.tuning_scores:
        return []
    all_clients, worst = _curve(run, "score"), _curve(run, "worst")

    def draw(figure: Canvas) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for points, name, color in (
            (all_clients, "all clients", BLUE),
            (worst, "worst client", VERMILLION),
        ):
            left.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label=name)
        left.set(xlabel="round", ylabel=_title(run))
        left.legend()
        whole_rounds(left)
        traffic = run.tuning_traffic
        sent = [(r["bytes_up"] + r["bytes_down"]) / 2**20 for r in traffic]
        right.bar([record["round"] + 1 for record in traffic], sent, color=BLUE)
        right.set(xlabel="round", ylabel="MiB sent, up and down")
        whole_rounds(right)

    caption = (
        "Left: the averaged model on held-out examples, of all clients and of the one with the"
        " lowest score. Right: parameters that travelled between clients and server."
    )
    svg = render(draw, run.run_dir / "scores.png")
    return [Heading(text="Scores"), Figure(file="scores.png", svg=svg, caption=caption)]


def _both_ways(edge: EdgeTraffic) -> tuple[int, int]:
    return edge["bytes_forward"], edge["bytes_backward"]


def _stages(run: RunSummary) -> list[Block]:
    """Show the messages over the edges of a cut model, and the score of each stage's own head."""
    traffic = run.tuning_traffic
    edges = traffic[0].get("edges", []) if traffic else []
    if not edges:
        return []
    rows = []
    for index, edge in enumerate(edges):
        each = [_both_ways(record["edges"][index]) for record in traffic]
        rows.append(
            (
                f"stage {edge['from']} to {edge['to']}",
                *(bytes_text(median(way)) for way in zip(*each, strict=True)),
                *(bytes_text(sum(way)) for way in zip(*each, strict=True)),
            )
        )
    columns = ("edge", "forward, round", "backward, round", "forward, in all", "backward, in all")
    blocks: list[Block] = [
        Heading(text="Stages"),
        Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(1, 5))),
    ]
    last = _last_score(run)
    heads = tuple(
        (f"stage {stage}", _shown(last, score)) for stage, score in last.get("stages", {}).items()
    )
    if heads:
        columns_of_heads = ("head of", _title(run))
        blocks.append(Table(columns=columns_of_heads, rows=heads, numeric=frozenset({1})))
    return blocks


def _clients(run: RunSummary) -> list[Block]:
    path = run.run_dir / "data" / "data.json"
    if not path.is_file():
        return []
    facts = [ClientFacts(**fact) for fact in json.loads(path.read_text(encoding="utf-8"))["facts"]]
    last = _last_score(run)
    scores = last.get("clients") or {}
    middle = _spread(facts)
    rows = tuple(
        (
            str(fact.client_id),
            integer(fact.num_examples),
            integer(fact.num_test_examples),
            number(fact.entropy_bits, 3),
            _shown(last, scores.get(str(fact.client_id))),
            ", ".join(fact.missing) or "-",
        )
        for fact in facts[:_MAX_CLIENT_ROWS]
    )
    columns = ("client", "examples", "held out", "label entropy, bits", "score", "labels it lacks")
    blocks: list[Block] = [
        Heading(text="Clients"),
        middle,
        Table(columns=columns, rows=rows, numeric=frozenset(range(5))),
    ]
    if len(facts) > _MAX_CLIENT_ROWS:
        text = f"The first {_MAX_CLIENT_ROWS} of {len(facts):,}; `data/data.json` has them all."
        blocks.append(Paragraph(text=text))
    return blocks


def _spread(facts: list[ClientFacts]) -> Table:
    rows = []
    for title, values, digits in (
        ("training examples", [fact.num_examples for fact in facts], 0),
        ("held-out examples", [fact.num_test_examples for fact in facts], 0),
        ("label entropy, bits", [fact.entropy_bits for fact in facts], 3),
    ):
        chosen = (min(values), median(values), max(values))
        rows.append((title, *(number(value, digits) for value in chosen)))
    columns = (f"of {count(len(facts), 'client')}", "least", "median", "most")
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset({1, 2, 3}))


def _rounds(run: RunSummary) -> list[Block]:
    scored = {record["round"]: record for record in run.tuning_scores}
    traffic = {record["round"]: record for record in run.tuning_traffic}
    rows = []
    for record in run.tuning_rounds:
        score, sent = scored.get(record["round"], NOT_SCORED), traffic[record["round"]]
        rows.append(
            (
                str(record["round"] + 1),
                integer(len(record["clients"])),
                integer(len(record["stragglers"])),
                integer(len(record["dropped"])),
                number(record["loss"], 4),
                _shown(score, score.get("score")),
                _shown(score, score.get("worst")),
                bytes_text(sent["bytes_up"]),
                bytes_text(sent["bytes_down"]),
                number(record["seconds"], 1),
            )
        )
    columns = (
        "round",
        "clients",
        "slow",
        "lost",
        "loss",
        "score",
        "worst client",
        "up",
        "down",
        "s",
    )
    table = Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(len(columns))))
    return [Heading(text="Rounds"), table] if rows else []
