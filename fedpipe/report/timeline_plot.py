"""Draw the pipeline timeline: the instructions of every stage and replica in two local steps."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.report.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, Draw, render
from fedpipe.report.format import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Color = str | tuple[str, float]
KINDS: dict[str, tuple[str, Color]] = {
    "load": ("text", "#44546a"),
    "forward": ("forward", BLUE),
    "local_backward": ("local backward", GREEN),
    "backward": ("backward", VERMILLION),
    "optimizer_step": ("optimizer", PURPLE),
    "recv_activation": ("waits for activation", (SKY, 0.35)),
    "recv_grad": ("waits for gradient", (ORANGE, 0.4)),
    "recv_home_grad": ("waits for gradient", (ORANGE, 0.4)),
    "send_activation": ("waits to send", (GREY, 0.4)),
    "send_grad": ("waits to send", (GREY, 0.4)),
    "send_home": ("waits to send", (GREY, 0.4)),
}
"""Legend and colour of every instruction; others are grey. Waiting is pale, also on a dark page."""
_NUMBERED = ("forward", "local_backward", "backward")
"""Instructions that show the number of their micro-batch."""
_VISIBLE = 0.0004
"""Share of the figure's width below which a box is not drawn."""
_MAX_ROWS = 16
"""Largest number of rows that is readable; further rows of a larger grid look the same."""

Event = dict[str, Any]


def write_timeline_plot(events: list[Event], path: Path) -> str | None:
    """Draw two local steps from the middle of a trace.

    Args:
        events: Events of a Chrome trace: complete ones, whose ``pid`` is the replica and ``tid``
            the stage, and names of threads, if any.
        path: The PNG to write.

    Returns:
        The figure as an ``<svg>`` element, or ``None`` when there is nothing to draw.
    """
    known = [e for e in events if is_number(e.get("ts")) and is_number(e.get("dur"))]
    rows = sorted({_row(event) for event in known})[:_MAX_ROWS]
    if not rows:
        return None
    start, end = middle_window(known, num_steps=2)
    shown = [e for e in known if _row(e) in rows and e["ts"] < end and e["ts"] + e["dur"] > start]
    labels = [_labels(events).get(row, f"replica {row[0]}, stage {row[1]}") for row in rows]
    draw = _draw(shown, rows, labels, start, end)
    return render(draw, path, height=1.05 + 0.42 * len(rows))


def middle_window(events: list[Event], *, num_steps: int) -> tuple[float, float]:
    """Choose ``num_steps`` local steps near the middle, away from the pauses between rounds.

    The optimizer steps of the last stage of the first replica mark where a local step ends. A
    window in which every row is recorded is preferred.

    Args:
        events: Complete events, not empty.
        num_steps: Local steps to show; fewer if the trace has fewer.

    Returns:
        Start and end, in the events' microseconds.
    """
    replica = min(_row(event)[0] for event in events)
    stage = max(_row(event)[1] for event in events if _row(event)[0] == replica)
    ends = sorted(
        event["ts"] + event["dur"]
        for event in events
        if event.get("name") == "optimizer_step" and _row(event) == (replica, stage)
    )
    if len(ends) <= num_steps:
        return (
            min(event["ts"] for event in events),
            max(event["ts"] + event["dur"] for event in events),
        )
    windows = [(ends[i], ends[i + num_steps]) for i in range(len(ends) - num_steps)]
    rows = {_row(event) for event in events}
    first = max(min(e["ts"] for e in events if _row(e) == row) for row in rows)
    last = min(max(e["ts"] + e["dur"] for e in events if _row(e) == row) for row in rows)
    recorded = [(start, end) for start, end in windows if start >= first and end <= last]
    windows = recorded or windows
    typical = statistics.median(end - start for start, end in windows)
    middle = (len(windows) - 1) / 2
    order = sorted(range(len(windows)), key=lambda index: abs(index - middle))
    fitting = [i for i in order if windows[i][1] - windows[i][0] <= 1.3 * typical]
    return windows[fitting[0]]


def _row(event: Event) -> tuple[int, int]:
    return (event.get("pid") or 0, event.get("tid") or 0)


def _labels(events: list[Event]) -> dict[tuple[int, int], str]:
    """Return the names of rows that the trace contains."""
    return {_row(e): str(e["args"]["name"]) for e in events if e.get("name") == "thread_name"}


def _draw(
    events: list[Event], rows: list[tuple[int, int]], labels: list[str], start: float, end: float
) -> Draw:
    span = max(end - start, 1e-9)
    scale, unit = (1e6, "s") if span >= 4e6 else (1e3, "ms") if span >= 4e3 else (1.0, "us")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel=f"time, {unit}")
        for event in events:
            left = max(event["ts"], start)
            width = (min(event["ts"] + event["dur"], end) - left) / scale
            _box(axes, event, rows.index(_row(event)), (left - start) / scale, width, span / scale)
        axes.set_xlim(0, span / scale)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False)
        _legend(figure, {str(event.get("name")) for event in events})

    return draw


def _box(axes: Axes, event: Event, row: int, left: float, width: float, span: float) -> None:
    """Draw an instruction, with the number of its micro-batch where it fits."""
    if width < _VISIBLE * span:
        return
    name = str(event.get("name"))
    y, height = row - 0.36, 0.72
    # A thin gap between boxes, unless they are too narrow for one.
    gap = min(0.0015 * span, 0.2 * width)
    axes.broken_barh([(left, width - gap)], (y, height), facecolors=_kind(name)[1], linewidth=0)
    micro_batch = (event.get("args") or {}).get("micro_batch")
    room = 0.012 * span * len(str(micro_batch))
    if name in _NUMBERED and micro_batch is not None and width > room:
        axes.text(
            left + (width - gap) / 2,
            row,
            str(micro_batch),
            color="white",
            ha="center",
            va="center_baseline",
            fontsize=8,
        )


def _kind(name: str) -> tuple[str, Color]:
    return KINDS.get(name, (name.replace("_", " "), GREY))


def _legend(figure: Figure, names: set[str]) -> None:
    from matplotlib.patches import Patch

    ordered = [name for name in KINDS if name in names] + sorted(names - KINDS.keys())
    colors = dict(_kind(name) for name in ordered)  # one entry per legend
    handles = [Patch(facecolor=color, linewidth=0, label=text) for text, color in colors.items()]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles) if len(handles) <= 7 else -(-len(handles) // 2),
        fontsize=8.5,
        handlelength=1,
        handleheight=0.8,
        columnspacing=1.2,
    )
