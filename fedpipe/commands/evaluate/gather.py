"""What the cells of an evaluation have reached: means, intervals, table, files. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedpipe.commands.evaluate.content import (
    CellFacts,
    CellResult,
    Content,
    Score,
    TableRow,
    TaskFacts,
)
from fedpipe.commands.evaluate.intervals import METHOD, Estimate, Sample, estimate, mean_of, sample
from fedpipe.commands.evaluate.report import blocks, draw_scores
from fedpipe.commands.study.report import Spread
from fedpipe.data.tasks.scoring import METRICS, Array
from fedpipe.files import write_text
from fedpipe.report.document import Figure, to_html, to_markdown
from fedpipe.report.drawing import render
from fedpipe.report.format import is_number
from fedpipe.run.run_dir import describe_environment

if TYPE_CHECKING:
    from fedpipe.commands.evaluate.setup import Evaluation, ScoredCell

STATISTICS_FILE = "statistics.npz"
Results = dict[str, CellResult | None]
"""By name of the cell."""
JSON_FILE = "evaluation.json"
_FIGURE = "evaluation.png"
_CAPTION = f"Mean scores with 95 % intervals, {METHOD}."


def gather(evaluation: Evaluation) -> Content:
    """Write evaluation.json, .md, .html and .png from the cells that are done.

    Args:
        evaluation: Its cells may be at work meanwhile.

    Returns:
        The content of evaluation.json.
    """
    content = summarise(evaluation)
    folder = evaluation.directory
    figures = []
    figure = draw_scores(content)
    if figure is not None:
        svg = render(figure[0], folder / _FIGURE, height=figure[1])
        figures.append(Figure(file=_FIGURE, svg=svg, caption=_CAPTION))
    page = blocks(content, figures)
    title = f"fedpipe evaluation: {folder.resolve().name}"
    write_text(folder / JSON_FILE, json.dumps(content, indent=1) + "\n")
    write_text(folder / "evaluation.md", to_markdown(title, page))
    write_text(folder / "evaluation.html", to_html(title, page))
    return content


def summarise(evaluation: Evaluation) -> Content:
    """Compute means, spreads and intervals of the cells that are done.

    Args:
        evaluation: Any.

    Returns:
        The content of evaluation.json.
    """
    results = {cell.name: cell.result() for cell in evaluation.cells}
    num_draws = evaluation.config.evaluation.num_draws
    rows: list[TableRow] = []
    tasks: list[TaskFacts] = []
    main: dict[str, list[_Scored]] = {model.name: [] for model in evaluation.models}
    for place in evaluation.files:
        task = place.task
        cells = [cell for cell in evaluation.cells if cell.task == task]
        tasks.append(_task(place.format_name, place.folder, cells, results))
        for key in _keys(task.metrics, cells):
            row, found = _row(key, cells, results, num_draws=num_draws)
            rows.append(row)
            if key == task.metrics[0]:
                for name, scored in found.items():
                    main[name].append(scored)
    several = len(tasks) > 1
    average = {
        name: _average(scored) if several and len(scored) == len(tasks) else None
        for name, scored in main.items()
    }
    environment = describe_environment()
    environment["repeat"] = shlex.join(
        [
            "fedpipe",
            "evaluate",
            "--config",
            str(evaluation.directory / "evaluation.yaml"),
            "--run-dir",
            f"{evaluation.directory}-again",
        ]
    )
    return {
        "models": [
            {"name": model.name, "path": model.path, "digest": model.digest}
            for model in evaluation.models
        ],
        "seeds": list(evaluation.config.evaluation.seeds),
        "data": evaluation.config.evaluation.data,
        "num_draws": num_draws,
        "intervals": METHOD,
        "tasks": tasks,
        "rows": rows,
        "average": average,
        "cells": [_cell(cell, results[cell.name]) for cell in evaluation.cells],
        "environment": environment,
    }


def read_statistics(run_dir: Path, key: str) -> Array:
    """Read what a metric needs of every test example of a finished cell."""
    with np.load(run_dir / STATISTICS_FILE) as arrays:
        return np.asarray(arrays[key])


def _keys(metrics: Sequence[str], cells: Sequence[ScoredCell]) -> list[str]:
    sets = [name for name in ("mismatched",) if name in cells[0].prepared.examples]
    return [*metrics, *(f"{metric}:{name}" for name in sets for metric in metrics)]


def _row(
    key: str, cells: Sequence[ScoredCell], results: Results, *, num_draws: int
) -> tuple[TableRow, dict[str, _Scored]]:
    """One metric of one task, for every model: mean, spread and interval; and its samples."""
    name, _, test_set = key.partition(":")
    metric = METRICS[name]
    models: dict[str, Score | None] = {}
    found: dict[str, _Scored] = {}
    sizes = set()
    for model in dict.fromkeys(cell.model.name for cell in cells):
        own = [cell for cell in cells if cell.model.name == model]
        done = {cell.seed: result for cell in own if (result := results[cell.name])}
        seeds = {seed: result["scores"][key] for seed, result in done.items()}
        spread = Spread.of(list(seeds.values()))
        sizes |= {result["num_test"][test_set or "test"] for result in done.values()}
        if spread is None:
            models[model] = None if not done else {"mean": None, "seeds": seeds, "n": len(done)}
            continue
        known = [cell for cell in own if is_number(seeds.get(cell.seed))]
        statistics = [read_statistics(cell.run_dir, key) for cell in known]
        drawn = sample(metric, spread.values, statistics, num_draws=num_draws)
        found[model] = _Scored(seeds=tuple(cell.seed for cell in known), sample=drawn)
        interval = _interval(estimate(drawn), lowest=metric.lowest)
        models[model] = {**spread.to_dict(), "seeds": seeds, **interval}
    title = metric.title + (f", {test_set}" if test_set else "")
    row: TableRow = {
        "task": cells[0].task.name,
        "metric": key,
        "title": title,
        "num_test": max(sizes, default=None),
        "cells": len(cells) // len(models),
        "models": models,
    }
    return row, found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """A model's sample of a task, by seed."""

    seeds: tuple[int, ...]
    sample: Sample


def _average(scored: Sequence[_Scored]) -> Score | None:
    """Average tasks seed by seed, over the seeds that all of them have."""
    shared = [seed for seed in scored[0].seeds if all(seed in each.seeds for each in scored)]
    if not shared:
        return None
    kept = [each.sample.at([each.seeds.index(seed) for seed in shared]) for each in scored]
    found = estimate(mean_of(kept))
    return {"mean": found.value, "n": len(shared), **_interval(found, lowest=-1.0)}


def _interval(found: Estimate, *, lowest: float) -> Score:
    """Say how sure a mean is; no score is outside of what its metric can be."""
    if found.interval is None:
        return {"interval": None, "over": None}
    low, high = np.clip(found.interval, lowest, 1.0)
    return {"interval": [float(low), float(high)], "over": found.over}


def _task(
    format_name: str, folder: str, cells: Sequence[ScoredCell], results: Results
) -> TaskFacts:
    first = cells[0]
    done = [result for cell in cells if (result := results[cell.name])]
    return {
        "name": first.task.name,
        "format": format_name,
        "folder": folder,
        "examples": first.prepared.examples,
        "truncated": {c.model.name: c.prepared.truncated for c in cells},
        "test_split": first.prepared.test_split,
        "left_out": first.prepared.left_out,
        "best_epoch_by": "dev" if "dev" in first.prepared.examples else "last",
        "num_train": done[0]["num_train"] if done else None,
        "num_test": done[0]["num_test"] if done else None,
        "settings": {c.model.name: c.settings for c in cells},
        "cites": first.task.cites,
    }


def _cell(cell: ScoredCell, result: CellResult | None) -> CellFacts:
    content: CellFacts = {
        "name": cell.name,
        "model": cell.model.name,
        "task": cell.task.name,
        "seed": cell.seed,
        "done": result is not None,
        "tokenised": Path(cell.prepared.directory).name,
    }
    if result is None:
        return content
    return {
        **content,
        "scores": result["scores"],
        "best_epoch": result["best_epoch"],
        "num_steps": result["num_steps"],
        "seconds": result["seconds"],
        "threads": result["threads"],
        "device": result["device"],
        "host": result["host"],
        "num_test": result["num_test"],
        "gold_digest": result["gold_digest"],
        "diverged_at": result.get("diverged_at"),
    }
