"""Several throughput reports side by side: a point of a grid each. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from fedpipe.commands.study.report import short_names
from fedpipe.commands.study.study import Cell
from fedpipe.commands.throughput.page import TITLES
from fedpipe.commands.throughput.report import Comparison, Report
from fedpipe.config.schema import RunConfig
from fedpipe.report.document import Block, Code, Heading, Paragraph, Strong, Table
from fedpipe.report.format import MISSING, bytes_text, number, tokens_per_s
from fedpipe.report.records import Environment
from fedpipe.report.sections import environment_rows

SHORT = {
    "streaming": "streaming",
    "1f1b": "1F1B",
    "sequential": "sequential",
    "stock": "DeepSpeed's 1F1B",
}
"""Schedules in a table that has many columns."""


Point = tuple[Cell[RunConfig], Report]
"""A point of the grid that has been measured."""


def content(points: Sequence[Point], environment: Environment) -> Comparison:
    """Return ``throughput/report.json`` of a grid."""
    return {
        "points": [
            {"name": cell.name, "overrides": list(cell.overrides), "report": report}
            for cell, report in points
        ],
        "environment": environment,
    }


def points_table(points: Sequence[Point]) -> Table:
    """One row per schedule and point: the schedules in their order, in each the fastest first."""
    keys = [override.partition("=")[0] for override in points[0][0].overrides]
    names = list(dict.fromkeys(name for _, report in points for name in report["schedules"]))
    columns = (
        "schedule",
        *short_names(keys),
        "tokens/s",
        "streaming over it",
        "MFU, %",
        "waits, %",
        "of ideal, %",
        "peak memory",
    )
    rows = []
    for name in names:
        measured = [point for point in points if name in point[1]["schedules"]]
        measured.sort(key=lambda point: -point[1]["schedules"][name]["tokens_per_s"])
        rows += [_row(name, point, first=point is measured[0]) for point in measured]
    numeric = frozenset(range(1 + len(keys), len(columns)))
    return Table(columns=columns, rows=tuple(rows), numeric=numeric)


def points_headline(points: Sequence[Point]) -> str:
    """Say which point and schedule are the fastest, and which the slowest."""
    found = [
        (schedule["tokens_per_s"], name, point)
        for point in points
        for name, schedule in point[1]["schedules"].items()
    ]
    speed, name, (cell, report) = max(found, key=lambda entry: entry[0])
    least, slow, (slowest, _) = min(found, key=lambda entry: entry[0])
    text = f"Fastest of all: {TITLES[name]} at `{' '.join(cell.overrides)}`, "
    text += f"{tokens_per_s(speed)} tokens/s"
    ideal = number(report["ideal"][name]["reached_pct"], 1)
    text += f", {ideal} % of its ideal there. The slowest, {TITLES[slow]} at"
    return f"{text} `{' '.join(slowest.overrides)}`, takes {speed / least:.2f} x as long."


def points_blocks(
    points: Sequence[Point], environment: Environment, *, num_points: int
) -> list[Block]:
    """Make the report over all points.

    Args:
        points: Measured so far, one or more.
        environment: Versions, host, command.
        num_points: Of the whole grid.

    Returns:
        What ``to_html`` and ``to_markdown`` take.
    """
    best, report = max(points, key=lambda p: p[1]["schedules"]["streaming"]["tokens_per_s"])
    left = num_points - len(points)
    missing = [Paragraph(text=f"{left} of {num_points} points are not measured.")] if left else []
    return [
        Paragraph(text=points_headline(points)),
        *missing,
        points_table(points),
        Paragraph(
            text="Schedules are interleaved within a point; points follow each other, so a ratio "
            "is safer than a comparison of tokens/s between points. Streaming over it: median over "
            "the repetitions of that point. Peak memory: of the largest process. Each point's "
            "own report is in the folder of its name."
        ),
        Heading(text=f"What would help at {best.name}, streaming's fastest point"),
        *(Paragraph(text=sentence) for sentence in report["advice"]),
        Heading(text="Repeat this measurement"),
        Code(text=environment["repeat"]),
        Heading(text="Environment"),
        Table(columns=("key", "value"), rows=environment_rows(environment)),
    ]


def _row(name: str, point: Point, *, first: bool) -> tuple[str, ...]:
    cell, report = point
    schedule = report["schedules"][name]
    ratio = report["ratios"].get(f"streaming_vs_{name}")
    speed = tokens_per_s(schedule["tokens_per_s"])
    return (
        SHORT[name] if first else "",
        *(override.partition("=")[2] for override in cell.overrides),
        Strong(speed) if first else speed,
        f"{ratio['median']:.2f} x" if ratio else MISSING,
        number(schedule["mfu_pct"], 1),
        number(schedule["bubble_pct"], 1),
        number(report["ideal"][name]["reached_pct"], 1),
        bytes_text(max(schedule["peak_memory_bytes"])),
    )
