"""The style of the figures: colours, fonts, names of lines, and output as PNG and SVG.

Axes have units, and lines have their names beside them. Colours are those of Okabe and Ito (Color
Universal Design, 2008, https://jfly.uni-koeln.de/color/), which colour-blind readers can tell
apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY = "#cc79a7", "#56b4e9", "#8c959f"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, GREY)
INK = "#1f2328"
"""Colour of text and axes; an SVG uses the text colour of its page instead."""

_MAX_POINTS = 1500
"""Points of a raw curve; more are not visible at this width and make a page large."""
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}

Draw = Callable[["Figure"], None]


def render(draw: Draw, path: Path, *, height: float = 3.4) -> str:
    """Draw a figure, save it as PNG and return it as SVG for a page.

    Args:
        draw: Draws into an empty figure.
        path: The PNG to write, with a white background.
        height: Inches; the width is 8.

    Returns:
        An ``<svg>`` element without a background, in the text colour of its page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # The salt makes ids differ between two figures of a page, and stay the same in every run.
    style: Any = {**_STYLE, "svg.hashsalt": path.stem}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, height))
        draw(figure)
        figure.savefig(path, dpi=150, format="png", facecolor="white")
        buffer = io.StringIO()
        names = ("Date", "Creator", "Format", "Type")
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(names, None))
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """Reduce an SVG document to an element of a page, without prolog, namespaces and size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    svg = svg.replace(BLUE, f"var(--blue, {BLUE})")  # too dark on a dark page; the page defines it
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg, count=1).strip()


def label_ends(axes: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write the names of lines beside their right ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    labels = sorted(labels)
    gap = 0.065 * (high - low)
    places = spread([value for value, _, _ in labels], gap=gap, low=low + gap / 2)
    for y, (_, text, color) in zip(places, labels, strict=True):
        axes.annotate(
            text,
            (1.0, y),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )


def spread(values: list[float], *, gap: float, low: float) -> list[float]:
    """Move sorted values at least ``gap`` apart, and to ``low`` or above.

    A group of values that were too close keeps its centre.
    """
    groups: list[tuple[float, int]] = []  # lowest place and size of a run of touching values
    for value in values:
        start, size = max(value, low), 1
        while groups and start < groups[-1][0] + gap * groups[-1][1]:
            below, count = groups.pop()
            middle = (below + gap * (count - 1) / 2) * count + (start + gap * (size - 1) / 2) * size
            size += count
            start = max(middle / size - gap * (size - 1) / 2, low)
        groups.append((start, size))
    return [start + gap * index for start, size in groups for index in range(size)]


def whole_rounds(axes: Axes) -> None:
    """Set ticks at whole rounds only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))


def thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Drop points of a curve so that at most ``_MAX_POINTS`` are left."""
    stride = -(-len(xs) // _MAX_POINTS) or 1
    return xs[::stride], ys[::stride]


def tokens_unit(tokens: float) -> tuple[float, str]:
    """Choose the unit for a number of tokens; return its size and its name."""
    for scale, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if tokens >= scale:
            return scale, name
    return 1.0, "count"
