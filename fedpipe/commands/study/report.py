"""Results of the runs of a sweep: one row per combination, as a table and as a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from fedpipe.report.drawing import BLUE, GREY, INK, ORANGE, Draw
from fedpipe.report.format import (
    MISSING,
    bytes_text,
    duration,
    integer,
    is_number,
    number,
    tokens_per_s,
)
from fedpipe.report.records import EvalRecord, RoundRecord, TrafficRecord
from fedpipe.report.summary import total
from fedpipe.report.writer import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_DRAWN = 40
"""Largest number of rows in the figure; rows with the lowest loss are kept."""
_MAX_LABEL = 40
"""Largest number of characters of a label; a longer label keeps only the values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """The numbers of one finished run; None if the run did not record a number."""

    stage_losses: tuple[float | None, ...]
    """Last validation loss of every stage in nats; the last entry is the final head."""
    tokens: float
    """Number of trained tokens."""
    seconds: float
    """Seconds of all rounds, with averaging, without start-up and validation."""
    bytes_forward_per_step: float | None
    """Bytes over all pipe edges, per local step of a replica."""
    host: str
    """Host of the last start of the run."""

    @property
    def loss(self) -> float | None:
        """Last validation loss of the final head, in nats."""
        return self.stage_losses[-1] if self.stage_losses else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of all replicas."""
        return self.tokens / self.seconds if self.seconds else None

    def to_dict(self) -> dict[str, object]:
        """Return all numbers for JSON."""
        return asdict(self) | {"loss": self.loss, "tokens_per_s": self.tokens_per_s}


class SpreadFacts(TypedDict):
    """A ``Spread`` as JSON."""

    mean: float
    std: float | None
    min: float | None
    max: float | None
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The values of one number in several runs."""

    values: tuple[float, ...]
    """One or more."""

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """Collect the recorded values; None if there are none."""
        known = tuple(value for value in values if is_number(value))
        return cls(values=known) if known else None

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def to_dict(self) -> SpreadFacts:
        """Return mean, standard deviation and count as JSON."""
        ends = (min(self.values), max(self.values)) if len(self.values) > 1 else (None, None)
        low, high = ends
        return {"mean": self.mean, "std": self.std, "min": low, "max": high, "n": len(self.values)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Cells that differ in the seed only."""

    values: Mapping[str, str]
    """By key of the grid, the value as the user wrote it, without the seed."""
    num_cells: int
    """Number of all runs of the row."""
    runs: tuple[RunResult, ...]
    """Results of the finished runs."""

    @property
    def label(self) -> str:
        """Name of the row in the figure."""
        names = short_names(list(self.values))
        values = [f"...{v[-20:]}" if len(v) > 24 else v for v in self.values.values()]
        text = ", ".join(map("=".join, zip(names, values, strict=True))) or "all runs"
        text = text if len(text) <= _MAX_LABEL else ", ".join(values)
        done, planned = len(self.runs), self.num_cells
        return text if done in (0, planned) else f"{text} ({done} of {planned})"

    def spread(self, name: str) -> Spread | None:
        """Collect a field of ``RunResult`` over the finished runs."""
        return Spread.of([getattr(run, name) for run in self.runs])

    def stage_losses(self) -> list[float | None]:
        """Mean validation loss of every stage, in nats."""
        stages = zip(*(run.stage_losses for run in self.runs), strict=False)
        found = [Spread.of(losses) for losses in stages]
        return [spread.mean if spread else None for spread in found]

    def to_dict(self) -> dict[str, object]:
        """Return the row for JSON."""
        names = ("loss", "tokens_per_s", "tokens", "seconds", "bytes_forward_per_step")
        spreads = {name: self.spread(name) for name in names}
        return {
            "values": dict(self.values),
            "cells": self.num_cells,
            "done": len(self.runs),
            "stage_losses": self.stage_losses(),
        } | {name: spread.to_dict() if spread else None for name, spread in spreads.items()}


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the last word of every dotted key, or the whole key if two keys share that word."""
    words = [key.rpartition(".")[2] for key in keys]
    return [key if words.count(word) > 1 else word for key, word in zip(keys, words, strict=True)]


def read_result(run_dir: Path) -> RunResult:
    """Read the numbers of a finished run.

    Args:
        run_dir: Directory of the run.

    Returns:
        The numbers of the run.

    Raises:
        CheckpointError: metrics.jsonl is damaged.
    """
    records = read_metrics(run_dir / METRICS_FILE)
    rounds: list[RoundRecord] = [r for r in records if r["kind"] == "round"]
    traffic: list[TrafficRecord] = [r for r in records if r["kind"] == "traffic"]
    edges = [edge for record in traffic for edge in record["edges"]]
    steps = sum(r["kind"] == "step" and r["stage"] == 0 for r in records)
    evals: list[EvalRecord] = [r for r in records if r["kind"] == "eval"]
    environment = run_dir / "env.json"
    host = json.loads(environment.read_text("utf-8"))["host"] if environment.is_file() else ""
    return RunResult(
        stage_losses=tuple(entry["loss"] for entry in evals[-1]["stages"]) if evals else (),
        tokens=total(r["tokens"] for r in rounds),
        seconds=total(r["seconds"] for r in rounds),
        bytes_forward_per_step=total(e["bytes_forward"] for e in edges) / steps if steps else None,
        host=host,
    )


def table(rows: Sequence[Row]) -> str:
    """Write the rows as a Markdown table with columns that are aligned in a terminal.

    Args:
        rows: In the order of the grid.

    Returns:
        Lines without a final end of line.
    """
    axes = short_names(list(rows[0].values))
    titles = [
        *axes,
        "runs",
        "validation loss",
        "sd",
        "min..max",
        "by stage",
        "tokens/s",
        "sd",
        "tokens",
        "training time",
        "forward/step",
    ]
    lines = [titles, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    # Axes are words, the rest are numbers.
    rule[len(axes) :] = [f"{'-' * (width - 1)}:" for width in widths[len(axes) :]]
    texts = []
    for cells in (titles, rule, *lines[1:]):
        padded = [
            f"{cell:<{width}}" if index < len(axes) else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        texts.append(f"| {' | '.join(padded)} |")
    return "\n".join(texts)


def _cells(row: Row) -> list[str]:
    loss, speed = row.spread("loss"), row.spread("tokens_per_s")
    means = {
        name: spread.mean if (spread := row.spread(name)) else None
        for name in ("tokens", "seconds", "bytes_forward_per_step")
    }
    done, several = len(row.runs), loss is not None and len(loss.values) > 1
    return [
        *(value.replace("|", "\\|") for value in row.values.values()),
        str(done) if done == row.num_cells else f"{done} of {row.num_cells}",
        number(loss and loss.mean, 3),
        number(loss and loss.std, 3),
        f"{min(loss.values):.3f}..{max(loss.values):.3f}" if loss and several else MISSING,
        ", ".join(number(value, 3) for value in row.stage_losses()) or MISSING,
        tokens_per_s(speed and speed.mean),
        tokens_per_s(speed and speed.std),
        integer(means["tokens"]),
        duration(means["seconds"]),
        bytes_text(means["bytes_forward_per_step"]),
    ]


def draw_sweep(rows: Sequence[Row]) -> tuple[Draw, float] | None:
    """Draw final loss and speed side by side, with a line per row.

    Args:
        rows: In the order of the grid.

    Returns:
        The figure and its height in inches, or None before the first run is done.
    """
    if not any(row.runs for row in rows):
        return None
    shown = _shown(rows)

    def draw(figure: Figure) -> None:
        losses, speeds = figure.subplots(1, 2, sharey=True, width_ratios=(1.35, 1))
        _points(losses, shown, "loss", BLUE)
        losses.set_xlabel("validation loss of the final head, nats")
        losses.set_yticks(range(len(shown)), [row.label for row in shown])
        losses.set_ylim(len(shown) - 0.5, -0.5)
        _points(speeds, shown, "tokens_per_s", ORANGE)
        speeds.set_xlabel("tokens/s, all replicas")
        speeds.set_xlim(0, 1.08 * speeds.dataLim.xmax)
        speeds.xaxis.set_major_formatter("{x:,.0f}")
        speeds.tick_params(left=False)
        text = "dots: runs, bar: mean, line: min to max"
        if len(shown) < len(rows):
            text += f"; the {len(shown)} lowest losses of {len(rows)}"
        losses.set_title(text, loc="left", fontsize=8.5, color=INK)

    return draw, 1.15 + 0.3 * max(len(shown), 3)


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Leave out the rows with the highest losses if there are too many; keep the order."""
    spreads = [row.spread("loss") for row in rows]
    losses = [spread.mean if spread else float("inf") for spread in spreads]
    best = sorted(range(len(rows)), key=lambda index: losses[index])[:MAX_DRAWN]
    return [rows[index] for index in sorted(best)]


def _points(axes: Axes, rows: Sequence[Row], name: str, color: str) -> None:
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.margins(x=0.08)
    for y, row in enumerate(rows):
        spread = row.spread(name)
        if spread is None:
            axes.annotate(
                "not recorded" if row.runs else "no run done",
                (0.5, y),
                xycoords=axes.get_yaxis_transform(),
                ha="center",
                va="center",
                color=GREY,
            )
            continue
        values = spread.values
        axes.plot([min(values), max(values)], [y, y], color=color, linewidth=1.6, alpha=0.5)
        axes.plot(values, [y] * len(values), "o", color=color, markersize=5, alpha=0.8)
        if len(values) > 1:
            axes.plot(spread.mean, y, "|", color=INK, markersize=13, markeredgewidth=1.8)
