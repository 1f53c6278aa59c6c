"""Two evaluations side by side: paired differences of their scores, with intervals. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.files import write_text
from fedpipe.metrics.document import (
    Block,
    Heading,
    Paragraph,
    Strong,
    Table,
    aligned,
    to_html,
    to_markdown,
)
from fedpipe.metrics.evaluation_report import AVERAGE, percent
from fedpipe.metrics.format import is_number
from fedpipe.metrics.scoring import METRICS, Array, interval, paired_differences
from fedpipe.metrics.sections import environment_rows
from fedpipe.workflows.evaluate.gather import JSON_FILE, read_statistics
from fedpipe.workflows.run_dir import check_new, check_writable, describe_environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A model of an evaluation."""

    directory: Path
    model: str
    content: dict[str, Any]
    """Of its evaluation.json."""

    def cells(self, task: str) -> dict[int, dict[str, Any]]:
        """Return its finished cells of a task by seed."""
        return {
            int(cell["seed"]): cell
            for cell in self.content["cells"]
            if cell["done"] and (cell["model"], cell["task"]) == (self.model, task)
        }

    def statistics(self, cell: dict[str, Any], key: str) -> Array:
        """Read what a metric needs of every test example of a cell."""
        return read_statistics(self.directory / "cells" / cell["name"], key)


def compare(first: str, second: str) -> dict[str, Any]:
    """Compare two models on all tasks that both were scored on.

    Args:
        first: Directory of an evaluation; ``DIR:MODEL`` where it has several models.
        second: Likewise.

    Returns:
        By task and metric the two means, their difference (first minus second) and its interval:
        paired bootstrap over test examples, and over seeds, which are paired where they are the
        same.

    Raises:
        ConfigError: A model is not named, or the two have no task in common.
        CheckpointError: A directory holds no evaluation, or the test examples differ.
    """
    sides = _side(first), _side(second)
    one, other = sides
    num_draws = min(side.content["num_draws"] for side in sides)
    shared = {row["metric"] + row["task"] for row in other.content["rows"]}
    rows, averaged = [], []
    for row in one.content["rows"]:
        task, key = row["task"], row["metric"]
        cells = [side.cells(task) for side in sides]
        if row["metric"] + task not in shared or not all(cells):
            continue
        _check_same_examples(task, *cells)
        seeds = sorted(set(cells[0]) & set(cells[1]))
        same_seeds = set(cells[0]) == set(cells[1])
        chosen = [seeds if same_seeds else sorted(own) for own in cells]
        statistics = [
            [side.statistics(own[seed], key) for seed in wanted]
            for side, own, wanted in zip(sides, cells, chosen, strict=True)
        ]
        metric = METRICS[key.partition(":")[0]]
        differences = paired_differences(
            metric, *statistics, num_draws=num_draws, same_seeds=same_seeds
        )
        means = [_mean([c["scores"][key] for c in own.values()]) for own in cells]
        rows.append(
            {
                "task": task, "metric": key, "title": row["title"], "first": means[0],
                "second": means[1], "difference": _minus(*means),
                "interval": interval(differences), "num_test": row["num_test"],
                "seeds": [len(own) for own in cells], "paired_seeds": same_seeds,
            }
        )  # fmt: skip
        if not any(r["task"] == task for r in rows[:-1]):
            averaged.append((rows[-1]["difference"], differences))
    if not rows:
        raise ConfigError(
            f"--compare: expected a task that both have finished, got none in {first} and {second}."
            " Run fedpipe evaluate on the same tasks."
        )
    average = None
    if len(averaged) > 1 and all(is_number(difference) for difference, _ in averaged):
        average = {
            "difference": float(np.mean([difference for difference, _ in averaged])),
            "interval": interval(np.mean([drawn for _, drawn in averaged], axis=0)),
        }
    names = [side.model for side in sides]
    if names[0] == names[1]:
        names = [f"{side.directory}:{side.model}" for side in sides]
    return {
        "first": names[0], "second": names[1], "num_draws": num_draws, "rows": rows,
        "average": average, "environment": describe_environment(),
    }  # fmt: skip


def write_comparison(content: dict[str, Any], directory: Path) -> None:
    """Write comparison.json, .md and .html.

    Raises:
        CheckpointError: Something else lies in the directory, or it cannot be written.
    """
    if not os.path.isfile(directory / "comparison.json"):
        check_new(directory)
    check_writable(directory)
    title = f"fedpipe comparison: {content['first']} and {content['second']}"
    page: list[Block] = [
        comparison_table(content),
        Paragraph(text=how_to_read(content)),
        Heading(text="Environment"),
        Table(columns=("key", "value"), rows=environment_rows(content["environment"])),
    ]
    write_text(directory / "comparison.json", json.dumps(content, indent=1) + "\n")
    write_text(directory / "comparison.md", to_markdown(title, page))
    write_text(directory / "comparison.html", to_html(title, page))


def comparison_table(content: dict[str, Any]) -> Table:
    """Lay the differences out; one whose interval leaves 0 out stands out."""
    rows = []
    for row in content["rows"]:
        rows.append(
            (
                row["task"], row["title"], f"{row['num_test']:,}",
                "/".join(map(str, dict.fromkeys(row["seeds"]))), percent(row["first"]),
                percent(row["second"]), _difference(row),
            )
        )  # fmt: skip
    if content["average"]:
        rows.append((AVERAGE, "", "", "", "", "", _difference(content["average"])))
    columns = (
        "task", "metric", "test n", "seeds", content["first"], content["second"],
        "difference [95 %]",
    )  # fmt: skip
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(2, 7)))


def terminal_text(content: dict[str, Any]) -> str:
    """Return what a terminal shows."""
    return "\n".join([*aligned(comparison_table(content)), "", how_to_read(content)])


def how_to_read(content: dict[str, Any]) -> str:
    """Say what the numbers are."""
    text = (
        f"Difference: {content['first']} minus {content['second']}, scores times 100; in brackets "
        f"a 95 % percentile interval of {content['num_draws']:,} bootstrap draws over test "
        "examples, the same for both, and over seeds. Where it leaves out 0, the difference is "
        "more than these test sets and seeds would give by chance."
    )
    if any(min(row["seeds"]) < 2 for row in content["rows"]):
        text += " With one seed the interval does not cover how a fine-tuning varies."
    return text


def _difference(row: dict[str, Any]) -> str:
    if not is_number(row["difference"]):
        return "-"
    text = f"{100 * row['difference']:+.1f}"
    if row["interval"] is None:
        return text
    low, high = row["interval"]
    text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return Strong(text) if low > 0 or high < 0 else text


def _side(name: str) -> Side:
    directory, model = Path(name), ""
    if not os.path.isdir(directory) and ":" in name:
        folder, _, model = name.rpartition(":")
        directory = Path(folder)
    try:
        content = json.loads((directory / JSON_FILE).read_text(encoding="utf-8"))
        names = [entry["name"] for entry in content["models"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"--compare: expected the directory of an evaluation, got {name!r} without an "
            f"{JSON_FILE} that can be read. Run fedpipe evaluate first."
        ) from None
    if not model and len(names) == 1:
        model = names[0]
    if model not in names:
        got = repr(model) if model else "none"
        raise ConfigError(
            f"--compare: expected one of the models {', '.join(names)} of {directory}, got {got}. "
            f"Write {directory}:{names[0]}."
        )
    return Side(directory=directory, model=model, content=content)


def _check_same_examples(task: str, first: dict[int, Any], second: dict[int, Any]) -> None:
    digests = {cell["gold_digest"] for own in (first, second) for cell in own.values()}
    if len(digests) > 1:
        raise CheckpointError(
            f"--compare: expected the same test examples of {task}, got different ones. Evaluate "
            "both on the same files, with the same evaluation.max_test_examples."
        )


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if is_number(value)]
    return float(np.mean(known)) if known else None


def _minus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second
