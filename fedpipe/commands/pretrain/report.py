"""The report of a pre-training: losses, speed, and the bytes that left the clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpipe.report.document import (
    Block,
    Facts,
    Figure,
    Heading,
    Paragraph,
    write_page,
)
from fedpipe.report.drawing import Draw, render
from fedpipe.report.format import bytes_text, count, duration, integer, number, tokens_per_s
from fedpipe.report.plots import draw_clients, draw_loss, draw_traffic
from fedpipe.report.sections import (
    ledger,
    refused_section,
    repeat_section,
    rounds_table,
    samples_section,
    text_section,
)
from fedpipe.report.summary import RunSummary, total
from fedpipe.report.timeline_plot import write_timeline_plot

_MAX_ROUND_ROWS = 60
"""A longer table shows only the last rounds; metrics.jsonl has all of them."""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html``, ``report.md`` and the figures as PNG into a run directory.

    It reads only the files of the directory. Only metrics.jsonl must exist, and the run may still
    be in progress.

    Args:
        run_dir: The run directory.

    Returns:
        The path of ``report.html``.

    Raises:
        CheckpointError: There is no metrics.jsonl, or it is damaged.
    """
    run_dir = Path(run_dir)
    run = RunSummary.load(run_dir)
    title = f"fedpipe report: {run.config.get('name') or run_dir.resolve().name}"
    blocks: list[Block] = [
        *_headline(run),
        *_training(run),
        *samples_section(run),
        *text_section(run),
        *_traffic(run),
        *_timeline(run),
        *_rounds(run),
        *refused_section(run),
        *repeat_section(run, "pretrain"),
    ]
    return write_page(run_dir / "report.html", title, blocks)


def _headline(run: RunSummary) -> list[Block]:
    items: list[tuple[str, str, str]] = []
    for stage_id in range(run.num_stages):
        scored = run.stage_scores(stage_id)
        if not scored:
            continue
        entry = scored[-1][1]
        perplexity = number(entry.get("perplexity"), 1)
        client = integer(entry.get("worst_client"))
        worst = f"{number(entry.get('worst_loss'), 3)} (client {client})"
        items.append(
            (
                f"validation loss, stage {stage_id}",
                number(entry.get("loss"), 3),
                f"perplexity {perplexity}, worst client {worst}",
            )
        )
    rounds = run.rounds
    seconds = run.train_seconds
    items.append(("tokens trained", integer(run.tokens), f"in {count(len(rounds), 'round')}"))
    if rounds:
        speed = tokens_per_s(total(r.get("tokens") for r in rounds) / seconds if seconds else None)
        items.append(("training time", duration(seconds), _start_up(run)))
        items.append(("tokens per second", speed, "all replicas, averaging included"))
    if run.traffic:
        messages = sum(edge.get("messages_backward", 0) for edge in run.edges().values())
        forward = bytes_text(run.bytes_sent("forward"))
        items.append(("bytes forward", forward, "activations, stage to stage"))
        items.append(
            (
                "bytes backward",
                bytes_text(run.bytes_sent("backward")),
                f"{count(int(messages), 'message')} from a later stage to an earlier one",
            )
        )
    return [Facts(items=tuple(items))]


def _start_up(run: RunSummary) -> str:
    for record in run.starts:
        return f"first step {duration(record['seconds_to_first_step'])} after the start"
    return "start-up and validation excluded"


def _training(run: RunSummary) -> list[Block]:
    blocks: list[Block] = [Heading(text="Training")]
    points = " Points: the averaged model on held-out text of all clients."
    points = points if run.validations else ""
    blocks += _figure(
        run,
        draw_loss(run),
        "loss.png",
        "Loss of every stage's own head on masked words. Faint: every local step, mean over the "
        f"replicas.{points}",
    )
    blocks += _figure(
        run,
        draw_clients(run),
        "clients.png",
        f"Validation loss of the head of stage {run.last_validated_stage} on each client's "
        "held-out text, after each round.",
    )
    if len(blocks) == 1:
        blocks.append(Paragraph(text="No local step has been recorded yet."))
    return blocks


def _traffic(run: RunSummary) -> list[Block]:
    if not run.traffic:
        return []
    blocks = [Heading(text="What left the clients"), *ledger(run)]
    return blocks + _figure(
        run,
        draw_traffic(run),
        "traffic.png",
        "Bytes per round, counted where they are sent.",
    )


def _timeline(run: RunSummary) -> list[Block]:
    svg = write_timeline_plot(run.events, run.run_dir / "timeline.png")
    if svg is None:
        return []
    caption = (
        "Two local steps from the middle of the recording, as measured; numbers are micro-batches. "
        "Pale is waiting for another stage."
    )
    trace = (
        "`timeline.json` has every recorded event as a Chrome trace: open it in Perfetto or in "
        "chrome://tracing. Replicas are processes there, stages are threads."
    )
    figure = Figure(file="timeline.png", svg=svg, caption=caption)
    return [Heading(text="Pipeline timeline"), figure, Paragraph(text=trace)]


def _rounds(run: RunSummary) -> list[Block]:
    rounds = run.rounds
    if not rounds:
        return []
    blocks: list[Block] = [Heading(text="Rounds"), rounds_table(run, rounds[-_MAX_ROUND_ROWS:])]
    if len(rounds) > _MAX_ROUND_ROWS:
        shown = f"The last {_MAX_ROUND_ROWS} of {len(rounds):,} rounds"
        text = f"{shown}; `metrics.jsonl` has them all."
        blocks.append(Paragraph(text=text))
    return blocks


def _figure(run: RunSummary, draw: Draw | None, name: str, caption: str) -> list[Any]:
    if draw is None:
        return []
    return [Figure(file=name, svg=render(draw, run.run_dir / name), caption=caption)]
