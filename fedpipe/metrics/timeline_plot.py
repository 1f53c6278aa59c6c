"""The pipeline timeline: what every stage of every replica does during a few local steps."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.metrics.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, Draw, render
from fedpipe.metrics.format import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "load": "#44546a",
    "forward": BLUE,
    "local_backward": GREEN,
    "backward": VERMILLION,
    "optimizer_step": PURPLE,
    "send_activation": SKY,
    "recv_activation": "#b8d8ee",
    "send_grad": ORANGE,
    "recv_grad": "#f3d28b",
    "send_home": SKY,
    "recv_home_grad": "#f3d28b",
}
"""Colour of every instruction kind; others are grey."""
_MESSAGES = (
    "send_activation", "recv_activation", "send_grad", "recv_grad", "send_home", "recv_home_grad",
)  # fmt: skip
_MAX_ROWS = 16
"""Rows that stay readable; the rest of a larger grid looks the same."""

Event = dict[str, Any]


def write_timeline_plot(events: list[Event], path: Path) -> str | None:
    """Draw two local steps from the middle of a trace.

    Args:
        events: Complete events of a Chrome trace: ``pid`` is the replica, ``tid`` the stage.
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
    return render(_draw(shown, rows, start, end), path, height=1.25 + 0.42 * len(rows))


def middle_window(events: list[Event], *, num_steps: int) -> tuple[float, float]:
    """Choose ``num_steps`` local steps near the middle, away from the pauses between rounds.

    The optimizer steps of the last stage of the first replica mark where a local step ends.

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
    typical = statistics.median(end - start for start, end in windows)
    middle = (len(windows) - 1) / 2
    order = sorted(range(len(windows)), key=lambda index: abs(index - middle))
    fitting = [i for i in order if windows[i][1] - windows[i][0] <= 1.3 * typical]
    return windows[fitting[0]]


def _row(event: Event) -> tuple[int, int]:
    return (event.get("pid") or 0, event.get("tid") or 0)


def _draw(events: list[Event], rows: list[tuple[int, int]], start: float, end: float) -> Draw:
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
        axes.set_yticks(range(len(rows)), [f"replica {r}, stage {s}" for r, s in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False)
        _legend(figure, {str(event.get("name")) for event in events})

    return draw


def _box(axes: Axes, event: Event, row: int, left: float, width: float, span: float) -> None:
    """Draw an instruction; messages lie in a thin lane under the computation they overlap."""
    name = str(event.get("name"))
    message = name in _MESSAGES
    y, height = (row + 0.23, 0.14) if message else (row - 0.36, 0.55)
    # A hair of space between boxes, where they are wide enough to keep one.
    gap = min(0.0015 * span, 0.2 * width)
    axes.broken_barh(
        [(left, width - gap)], (y, height), facecolors=COLORS.get(name, GREY), linewidth=0
    )
    micro_batch = (event.get("args") or {}).get("micro_batch")
    if not message and micro_batch is not None and width > 0.025 * span:
        axes.text(
            left + (width - gap) / 2,
            y + height / 2,
            str(micro_batch),
            color="white",
            ha="center",
            va="center",
            fontsize=8,
        )


def _legend(figure: Figure, names: set[str]) -> None:
    from matplotlib.patches import Patch

    ordered = [name for name in COLORS if name in names] + sorted(names - COLORS.keys())
    handles = [
        Patch(color=COLORS.get(name, GREY), label=name.replace("_", " ")) for name in ordered
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), 6),
        handlelength=1,
        handleheight=0.8,
        columnspacing=1.2,
    )
