"""Compare two evaluations: paired differences of their scores, with intervals. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpipe.commands.evaluate.content import (
    JSON_FILE,
    CellFacts,
    Comparison,
    Content,
    Difference,
    DifferenceRow,
)
from fedpipe.commands.evaluate.evaluation import read_statistics
from fedpipe.commands.evaluate.intervals import (
    METHOD,
    MIN_SEEDS,
    Sample,
    estimate,
    holm,
    joined,
    mean_of,
    sample,
)
from fedpipe.commands.evaluate.report import AVERAGE, percent, signed
from fedpipe.data.tasks.scoring import METRICS
from fedpipe.errors import CheckpointError, ConfigError
from fedpipe.files import write_text
from fedpipe.report.document import (
    Block,
    Heading,
    Paragraph,
    Table,
    aligned,
    write_page,
)
from fedpipe.report.format import count, is_number, number
from fedpipe.report.sections import environment_rows
from fedpipe.run.run_dir import RunDir, describe_environment

Unit = int | str
"""A training: a seed of fine-tuning, or the name of a model as a seed of pre-training."""
Units = dict[Unit, Sample]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A model of an evaluation, or several models of one method with different seeds."""

    directory: Path
    models: tuple[str, ...]
    content: Content
    """Content of evaluation.json."""

    @property
    def title(self) -> str:
        """Name in the table."""
        return ",".join(self.models)

    def cells(self, task: str) -> list[CellFacts]:
        """Return the finished cells of a task."""
        return [
            cell
            for cell in self.content["cells"]
            if cell["done"] and cell["model"] in self.models and cell["task"] == task
        ]

    def units(self, task: str, key: str, *, by_model: bool, num_draws: int) -> Units:
        """Resample the scores by model (the mean over its seeds), or by seed of fine-tuning."""
        found: dict[Unit, list[tuple[str, float]]] = {}
        for cell in self.cells(task):
            score = cell["scores"][key]
            if is_number(score):
                unit = cell["model"] if by_model else int(cell["seed"])
                found.setdefault(unit, []).append((cell["name"], score))
        return {
            unit: sample(
                METRICS[key.partition(":")[0]],
                [score for _, score in cells],
                [read_statistics(self.directory / "cells" / name, key) for name, _ in cells],
                num_draws=num_draws,
            ).per_unit(1)
            for unit, cells in sorted(found.items())
        }


def compare(first: str, second: str) -> Comparison:
    """Compare two models or two methods on all tasks that both have scores for.

    Args:
        first: Directory of an evaluation; ``DIR:MODEL`` where it has several models, and
            ``DIR:MODEL,MODEL,...`` where these are one method with several seeds of pre-training.
        second: The other one, in the same form.

    Returns:
        By task and metric, the two means, their difference (first minus second), its interval, and
        whether it differs from 0 after Holm's correction.

    Raises:
        ConfigError: A model has to be named, or the two sides have no task in common.
        CheckpointError: A directory has no evaluation, or the test examples differ.
    """
    sides = _side(first), _side(second)
    by_model = any(len(side.models) > 1 for side in sides)
    num_draws = min(side.content["num_draws"] for side in sides)
    shared = {row["metric"] + row["task"] for row in sides[1].content["rows"]}
    rows: list[DifferenceRow] = []
    main: list[tuple[Units, Units]] = []
    for row in sides[0].content["rows"]:
        task, key = row["task"], row["metric"]
        cells = [side.cells(task) for side in sides]
        if key + task not in shared or not all(cells):
            continue
        _check_same_examples(task, *cells)
        one, other = (
            side.units(task, key, by_model=by_model, num_draws=num_draws) for side in sides
        )
        if all(known["task"] != task for known in rows):
            main.append((one, other))
        rows.append(
            {
                "task": task,
                "metric": key,
                "title": row["title"],
                "num_test": row["num_test"],
                **_difference(one, other),
            }
        )
    if not rows:
        raise ConfigError(
            f"--compare: expected a task that both have finished, got none in {first} and {second}."
            " Run fedpipe evaluate on the same tasks."
        )
    average = None
    if len(main) > 1:
        both = [_averaged(units) for units in zip(*main, strict=True)]
        average = _difference(*both) if all(both) else None
    shown: list[Difference] = [*rows, *([average] if average else [])]
    for difference, stands_out in zip(shown, holm([d["p_value"] for d in shown]), strict=True):
        difference["stands_out"] = stands_out
    names = [side.title for side in sides]
    if names[0] == names[1]:
        names = [f"{side.directory}:{side.title}" for side in sides]
    return {
        "first": names[0],
        "second": names[1],
        "num_draws": num_draws,
        "unit": "pre-trainings" if by_model else "fine-tunings",
        "intervals": METHOD,
        "rows": rows,
        "average": average,
        "environment": describe_environment(),
    }


def _difference(one: Units, other: Units) -> Difference:
    """Subtract two means, in pairs if both have the same seeds of fine-tuning."""
    if not one or not other:
        return {
            "first": None,
            "second": None,
            "value": None,
            "interval": None,
            "over": None,
            "p_value": None,
            "n": [len(one), len(other)],
            "paired": False,
            "stands_out": False,
        }
    paired = list(one) == list(other)
    first, second = (joined(list(units.values())) for units in (one, other))
    found = estimate(first - second) if paired else estimate(first, second)
    return {
        "first": float(first.scores.mean()),
        "second": float(second.scores.mean()),
        **found.to_dict(),
        "paired": paired,
        "stands_out": False,
    }


def _averaged(tasks: Sequence[Units]) -> Units:
    """Average the tasks unit by unit, over the units that every task has."""
    shared = [unit for unit in tasks[0] if all(unit in units for units in tasks)]
    return {unit: mean_of([units[unit] for units in tasks]) for unit in shared}


def write_comparison(content: Comparison, directory: Path) -> None:
    """Write comparison.json, .md and .html.

    Raises:
        CheckpointError: The directory has other files, or cannot be written.
    """
    RunDir.at(directory, "comparison").make()
    title = f"fedpipe comparison: {content['first']} and {content['second']}"
    page: list[Block] = [
        comparison_table(content),
        Paragraph(text=how_to_read(content)),
        Heading(text="Environment"),
        Table(columns=("key", "value"), rows=environment_rows(content["environment"])),
    ]
    write_text(directory / "comparison.json", json.dumps(content, indent=1) + "\n")
    write_page(directory / "comparison.html", title, page)


def comparison_table(content: Comparison) -> Table:
    """Make the table of differences; those that remain after Holm's correction are emphasized."""
    rows = []
    for row in content["rows"]:
        rows.append(
            (
                row["task"],
                row["title"],
                number(row["num_test"], 0),
                _units(row),
                percent(row["first"]),
                percent(row["second"]),
                signed(row),
            )
        )
    if content["average"]:
        average = content["average"]
        means = (percent(average["first"]), percent(average["second"]))
        rows.append((AVERAGE, "", "", _units(average), *means, signed(average)))
    columns = (
        "task",
        "metric",
        "test n",
        content["unit"],
        content["first"],
        content["second"],
        "difference [95 %]",
    )
    return Table(columns=columns, rows=tuple(rows), numeric=frozenset(range(2, 7)))


def _units(row: Difference) -> str:
    return "/".join(map(str, row["n"]))


def terminal_text(content: Comparison) -> str:
    """Return the comparison as text for a terminal."""
    return "\n".join([*aligned(comparison_table(content)), "", how_to_read(content)])


def how_to_read(content: Comparison) -> str:
    """Explain the numbers of the table, and what they do not show."""
    shown = [*content["rows"], *filter(None, [content["average"]])]
    tested = sum(row["p_value"] is not None for row in shown)
    sentences = [
        f"Difference: {content['first']} minus {content['second']}, scores times 100; in brackets "
        f"its own 95 % interval, {content['intervals']}."
    ]
    if tested:
        named = [f"{row['task']}, {row['title']}" for row in content["rows"] if row["stands_out"]]
        named += [AVERAGE] if content["average"] and content["average"]["stands_out"] else []
        sentences.append(
            f"Differences that are not 0 at a family-wise error rate of 5 %, after Holm's "
            f"correction over the {count(tested, 'tested difference')} of the table: "
            f"{'; '.join(named) or 'none'}."
        )
    if tested < len(shown):
        sentences.append(
            f"With fewer than {MIN_SEEDS} {content['unit']}, the interval covers the test examples "
            "only and not how trainings vary, and nothing is tested."
        )
    if content["unit"] == "fine-tunings":
        sentences.append(
            "Each side is one pre-trained model: the difference says nothing about other models "
            "that the same methods would train."
        )
    return " ".join(sentences)


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
    chosen = tuple(dict.fromkeys(model.split(","))) if model else tuple(names[:1])
    if not set(chosen) <= set(names) or (not model and len(names) > 1):
        got = repr(model) if model else "none"
        raise ConfigError(
            f"--compare: expected one of the models {', '.join(names)} of {directory}, got {got}. "
            f"Write {directory}:{names[0]}."
        )
    return Side(directory=directory, models=chosen, content=content)


def _check_same_examples(task: str, *sides: Sequence[CellFacts]) -> None:
    digests = {cell["gold_digest"] for cells in sides for cell in cells}
    if len(digests) > 1:
        raise CheckpointError(
            f"--compare: expected the same test examples of {task}, got different ones. Evaluate "
            "both on the same files, with the same evaluation.max_test_examples."
        )
