"""A grid of values on the command line: ``section.key=value,value``. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpipe.config.tree import parse_override
from fedpipe.errors import ConfigError

MAX_CELLS = 1000

Axes = tuple[tuple[str, tuple[str, ...]], ...]
"""Dotted keys with their values, as YAML."""


def parse_axes(axes: Sequence[str]) -> Axes:
    """Take axes apart.

    Args:
        axes: ``section.key=value,value``; a comma inside brackets or quotes belongs to its value.

    Returns:
        Every key with its values.

    Raises:
        ConfigError: There is no key or value, a key is given twice, a value is not YAML or a
            section, or there are too many cells.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for axis in axes:
        key, equals, text = axis.partition("=")
        values = _split(text)
        if not (equals and all(key.split(".")) and all(values)):
            raise ConfigError(
                f"--grid: expected section.key=value,value, got {axis!r}. Write for example "
                "pipeline.cut=[2],[4] or seed=0,1,2."
            )
        if key in grid:
            raise ConfigError(
                f"--grid: expected every key once, got {key} a second time. Write all its values "
                "in one place."
            )
        for value in values:
            _check_value(key, value)
        grid[key] = values
    size = math.prod(map(len, grid.values()))
    if size > MAX_CELLS:
        raise ConfigError(
            f"--grid: expected at most {MAX_CELLS:,} cells, got {size:,}. Split the sweep."
        )
    return tuple(grid.items())


def _check_value(key: str, value: str) -> None:
    node = parse_override(f"{key}={value}")
    for name in key.split("."):
        node = node.value[name]
    if isinstance(node.value, dict):
        raise ConfigError(
            f"--grid: expected keys that hold a value, got a section in {key}={value}. Write "
            f"{key}.KEY=VALUE,VALUE."
        )


def _split(text: str) -> tuple[str, ...]:
    """Split at the commas outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not (depth or quote):
            values.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not values[-1].strip(" ["):
            quote = letter  # one inside a word is an apostrophe
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        values[-1] += letter
    return tuple(value.strip() for value in values)


def check_axes(axes: Axes, overrides: Sequence[str]) -> None:
    """Refuse no axes, or one that an override sets.

    Raises:
        ConfigError: There are none, or there is such a one.
    """
    if not axes:
        raise ConfigError(
            "--grid: expected section.key=value,value of a new sweep, got none. Write for example "
            "--grid pipeline.cut=[2],[4] seed=0,1,2, or name the --run-dir of a sweep."
        )
    keys = {key for key, _ in axes}
    for override in overrides:
        if (key := override.partition("=")[0]) in keys:
            raise ConfigError(
                f"--grid: expected keys that no override sets, got {key} in both. Remove {override}"
                " or take the key out of the grid."
            )
