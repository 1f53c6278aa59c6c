"""An evaluation: its cells, what they have reached, and the table and files of that. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpipe.commands.evaluate.content import (
    JSON_FILE,
    RESULT_FILE,
    STATISTICS_FILE,
    CellFacts,
    CellResult,
    Content,
    Score,
    Settings,
    TableRow,
    TaskFacts,
)
from fedpipe.commands.evaluate.intervals import METHOD, Estimate, Sample, estimate, mean_of, sample
from fedpipe.commands.evaluate.model_folder import ModelFolder
from fedpipe.commands.evaluate.report import blocks, draw_scores, outcome_text, terminal_text
from fedpipe.commands.study.pool import ForkedProcess
from fedpipe.commands.study.report import Spread
from fedpipe.commands.study.study import Cell, CellProcess, Slot, Study
from fedpipe.config.schema import RunConfig
from fedpipe.data.tasks.files import TaskFiles
from fedpipe.data.tasks.prepare import PreparedTask
from fedpipe.data.tasks.registry import Task
from fedpipe.data.tasks.scoring import METRICS, Array
from fedpipe.distributed.env import num_gpus
from fedpipe.files import write_text
from fedpipe.report.console import RunConsole
from fedpipe.report.document import Figure, write_page
from fedpipe.report.drawing import render
from fedpipe.report.format import is_number
from fedpipe.report.writer import METRICS_FILE
from fedpipe.run.run_dir import Kind, describe_environment

Results = dict[str, CellResult | None]
"""Results by name of the cell."""
_FIGURE = "evaluation.png"
_CAPTION = f"Mean scores with 95 % intervals, {METHOD}."

PRELOAD = (
    "fedpipe.commands.evaluate.cell",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
    "scipy.stats",
    "seqeval.metrics",
    "sklearn.metrics",
)
"""Modules that the fork server imports before the first cell starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredCell(Cell[RunConfig]):
    """One fine-tuning of an evaluation."""

    kind: Kind = "evaluation cell"
    model: ModelFolder
    task: Task
    seed: int
    key: str
    """Of everything that its result depends on."""
    settings: Settings
    """Section ``evaluation`` for this cell, with a value for every field."""
    prepared: PreparedTask
    """The tokenised task."""

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps; ``max_train_examples`` may lower it."""
        share = self.settings["max_train_examples"] or self.prepared.examples["train"]
        kept = min(1.0, share / self.prepared.examples["train"])
        batches = -(-kept * self.prepared.sequences["train"] // self.settings["batch_size"])
        return int(batches) * int(self.settings["num_epochs"])

    @property
    def is_done(self) -> bool:
        """Whether there is a result for the present content and settings."""
        return self.result() is not None

    def result(self) -> CellResult | None:
        """Read the result; None if there is none, or if it belongs to other content or settings."""
        try:
            content = json.loads((self.run_dir / RESULT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        known = isinstance(content, dict) and content.get("key") == self.key
        return content if known else None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Study[ScoredCell]):
    """All fine-tunings of an evaluation; every one has been checked."""

    task = "evaluate"
    job = "fedpipe.commands.evaluate.command:go_on"
    directory: Path
    config: RunConfig
    models: tuple[ModelFolder, ...]
    files: tuple[TaskFiles, ...]
    """Files of the tasks, in their order."""
    cells: tuple[ScoredCell, ...]
    """Cells in the order of tasks, then models, then seeds."""

    @property
    def job_name(self) -> str:
        """Name of the jobs in the queue."""
        return f"{self.config.name}-evaluation"

    @property
    def max_parallel(self) -> int | None:
        """Number of GPUs, because a cell needs its own; None on a CPU."""
        return num_gpus() or None

    @property
    def page(self) -> Path:
        """Path of the report."""
        return self.directory / "evaluation.html"

    def start(self, cell: ScoredCell, slot: Slot, log: Path) -> CellProcess:
        """Start a cell as a fork of the server that has imported torch and transformers."""
        return ForkedProcess(_score, cell.run_dir, slot, log, preload=PRELOAD)

    def show_progress(self, running: Sequence[str], console: RunConsole) -> None:
        """Show the number of optimizer steps that are done, and the number of all steps."""
        total = sum(cell.num_steps for cell in self.cells)
        done = 0
        for cell in self.cells:
            if cell.name in running:
                done += _steps(cell.run_dir / METRICS_FILE)
            elif cell.is_done:
                done += cell.num_steps
        if 0 < done < total:
            console.preparing("fine-tuning, steps", done, total)

    def write_tables(self) -> str:
        """Write evaluation.json, .md, .html and .png of the finished cells."""
        return terminal_text(gather(self))

    def outcome(self, cell: ScoredCell) -> str:
        """Return a text with the score of a finished cell."""
        return outcome_text(cell.result())


def _score(run_dir: str, index: int) -> None:
    from fedpipe.commands.evaluate.cell import run_cell

    run_cell(Path(run_dir), local_rank=index)


def _steps(path: Path) -> int:
    """Return the last step in a metrics.jsonl that is being written."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0


def gather(evaluation: Evaluation) -> Content:
    """Write evaluation.json, .md, .html and .png of the finished cells.

    Args:
        evaluation: The evaluation; its other cells may be running.

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
    write_page(folder / "evaluation.html", title, page)
    return content


def summarise(evaluation: Evaluation) -> Content:
    """Compute means, standard deviations and intervals of the finished cells.

    Args:
        evaluation: The evaluation, with any number of finished cells.

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
    """Read the statistics of a metric for every test example of a finished cell."""
    with np.load(run_dir / STATISTICS_FILE) as arrays:
        return np.asarray(arrays[key])


def _keys(metrics: Sequence[str], cells: Sequence[ScoredCell]) -> list[str]:
    sets = [name for name in ("mismatched",) if name in cells[0].prepared.examples]
    return [*metrics, *(f"{metric}:{name}" for name in sets for metric in metrics)]


def _row(
    key: str, cells: Sequence[ScoredCell], results: Results, *, num_draws: int
) -> tuple[TableRow, dict[str, _Scored]]:
    """Make the row of a metric of a task, with an entry per model, and return its samples too."""
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
    """The sample of a model on a task, by seed."""

    seeds: tuple[int, ...]
    sample: Sample


def _average(scored: Sequence[_Scored]) -> Score | None:
    """Average the tasks seed by seed, over the seeds that every task has."""
    shared = [seed for seed in scored[0].seeds if all(seed in each.seeds for each in scored)]
    if not shared:
        return None
    kept = [each.sample.at([each.seeds.index(seed) for seed in shared]) for each in scored]
    found = estimate(mean_of(kept))
    return {"mean": found.value, "n": len(shared), **_interval(found, lowest=-1.0)}


def _interval(found: Estimate, *, lowest: float) -> Score:
    """Return the interval of a mean, cut to the range of the metric."""
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
