"""Set a reproduction up: all pre-training runs are checked before one starts. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.commands.plan.plan import build_plan
from fedpipe.commands.pretrain import ranks
from fedpipe.commands.reproduce.config import ReproductionConfig, load_reproduction
from fedpipe.commands.reproduce.report import terminal_text
from fedpipe.commands.reproduce.results import Content
from fedpipe.commands.reproduce.variants import Variant, make_variants
from fedpipe.commands.study.report import read_result
from fedpipe.commands.study.study import Cell, Study, prepare_texts
from fedpipe.commands.study.sweep import check_cells
from fedpipe.config import load
from fedpipe.config.evaluation import PACKAGED_TASKS
from fedpipe.config.schema import RunConfig
from fedpipe.data.corpus import Progress, check_sources
from fedpipe.data.tasks.files import find_files
from fedpipe.data.tasks.registry import Task
from fedpipe.data.tasks.task_file import choose_tasks
from fedpipe.distributed.signals import Signals
from fedpipe.errors import FedPipeError
from fedpipe.report.console import RunConsole
from fedpipe.report.format import number
from fedpipe.run.resume import check_config
from fedpipe.run.run_dir import RunDir, locked, may_change_in_all

CELLS, MODELS, EVALUATION = "cells", "models", "evaluation"
UNTRAINED = "untrained"
RESULT_FILE = "reproduce.json"
TASKS = (
    "bc2gm", "bc5cdr-chemical", "bc5cdr-disease", "ncbi-disease", "jnlpba", "ddi", "gad",
    "pubmedqa",
)  # fmt: skip
"""Tasks of FedBioBERT, in the order of its figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemCell(Cell[RunConfig]):
    """The pre-training of one system with one seed."""

    variant: Variant
    seed: int

    def model_name(self, round_id: int) -> str:
        """Name the model after a number of rounds; all systems share the untrained model, 0."""
        name = self.variant.name if round_id else UNTRAINED
        return f"{name}_seed{self.seed}_round{round_id:02d}"


@dataclass(frozen=True, kw_only=True)
class Reproduction(Study[SystemCell]):
    """All pre-trainings of a reproduction; they run one at a time, because times are compared."""

    task = "reproduce"
    noun = "pre-training run"
    in_foreground = True
    experiment: str
    directory: Path
    config: ReproductionConfig
    variants: tuple[Variant, ...]
    cells: tuple[SystemCell, ...]
    """All variants of the first seed, then of the next seed."""

    @property
    def job_name(self) -> str:
        """Name of the job in the queue."""
        return f"{self.experiment}-{self.config.reproduce.scale}"

    @property
    def page(self) -> Path:
        """Path of the report."""
        return self.directory / "reproduce.html"

    def of(self, variant: Variant) -> list[SystemCell]:
        """Return the runs of a variant in the order of the seeds."""
        return [cell for cell in self.cells if cell.variant == variant]

    def untrained(self) -> list[tuple[SystemCell, int]]:
        """Return the runs that give the untrained models, one per seed."""
        first = next(v for v in self.variants if v.kind == "fedbert")
        return [(cell, 0) for cell in self.of(first)]

    def model(self, cell: SystemCell, round_id: int) -> Path:
        """Return the folder of a model."""
        return self.directory / MODELS / cell.model_name(round_id)

    def write(self) -> None:
        """Write reproduce.yaml, and config.yaml of every run.

        Raises:
            FedPipeError: The directory cannot be written.
        """
        RunDir.at(self.directory, "reproduction").make().write(load.to_yaml(self.config))
        for cell in self.cells:
            cell.run.make().write(load.to_yaml(cell.config))

    def prepare(self, cells: Sequence[SystemCell], *, progress: Progress | None = None) -> None:
        """Prepare the text of the runs."""
        prepare_texts(cells, progress=progress)

    def run(self, cell: SystemCell, *, console: RunConsole, signals: Signals) -> None:
        """Pre-train a system in this process, with a live display."""
        found = ranks.PROGRAM.located_run(cell.run, cell.config)
        setup = set_up_here(ranks.PROGRAM, found, console=console)
        console.close()
        with locked(setup.run_dir):
            supervise(ranks.PROGRAM, setup, signals=signals)

    def content(self) -> Content:
        """Return the content of reproduce.json."""
        text = (self.directory / RESULT_FILE).read_text(encoding="utf-8")
        content: Content = json.loads(text)
        return content

    def write_tables(self) -> str:
        """Return the text of a finished reproduction for a terminal."""
        return terminal_text(self.content())

    def outcome(self, cell: SystemCell) -> str:
        """Return a text with the loss of a finished run."""
        return f"loss {number(read_result(cell.run_dir).loss, 3)}"

    def resume_command(self, *, parallel: int = 1) -> str:
        """Return the command that resumes the reproduction."""
        words = ["fedpipe", "reproduce", self.experiment, "--run-dir", str(self.directory)]
        return shlex.join(words)


def plan_reproduction(
    experiment: str,
    scale: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    data: str | None,
    seeds: tuple[int, ...] | None,
) -> Reproduction:
    """Find and check every run; write nothing.

    Args:
        experiment: One of ``EXPERIMENTS``.
        scale: One of ``SCALES``. None takes that of the reproduction in the directory, or tiny.
        overrides: Values ``section.key=value``, which win over the file.
        run_dir: Directory, or None for ``runs/EXPERIMENT-SCALE``.
        data: Folder with the files of the eight tasks, or None for that of the settings.
        seeds: Seeds of pre-training, or None for those of the settings.

    Returns:
        The reproduction.

    Raises:
        FedPipeError: The user can correct the cause; no process of the run has been started.
    """
    run = RunDir.at(run_dir or f"runs/{experiment}-{scale or 'tiny'}", "reproduction")
    directory, saved = run.path, run.saved
    config = load_reproduction(saved if scale is None else None, overrides, scale=scale or "tiny")
    if data is not None:
        chosen = config.evaluation.tasks if _names_tasks(overrides) else TASKS
        evaluation = replace(config.evaluation, data=data, tasks=chosen)
        config = replace(config, evaluation=evaluation)
    if seeds is not None:
        config = replace(config, reproduce=replace(config.reproduce, seeds=seeds))
    if saved:
        _check_same(directory, load_reproduction(saved, []), config)
    names = tuple(task.name for task in check_tasks(config))
    config = replace(config, evaluation=replace(config.evaluation, tasks=names))
    variants = make_variants(config)
    cells = tuple(
        _cell(directory, variant, seed) for seed in config.reproduce.seeds for variant in variants
    )
    check_cells(cells)
    return Reproduction(
        experiment=experiment, directory=directory, config=config, variants=variants, cells=cells
    )


def check_tasks(config: RunConfig) -> list[Task]:
    """Return the tasks; refuse a task that does not exist, or whose files are missing."""
    evaluation = config.evaluation
    tasks = choose_tasks(evaluation.tasks, evaluation.task_files, evaluation.data)
    for task in tasks:
        find_files(task, evaluation.data, alone=len(tasks) == 1)
    return tasks


def is_packaged(config: RunConfig) -> bool:
    """Whether the files of the tasks are the packaged slice."""
    return config.evaluation.data == PACKAGED_TASKS


def _names_tasks(overrides: Sequence[str]) -> bool:
    return any(override.startswith("evaluation.tasks=") for override in overrides)


def _cell(directory: Path, variant: Variant, seed: int) -> SystemCell:
    config = variant.with_seed(seed)
    name = f"{variant.name}_seed={seed}"
    try:
        load.check(config)
        check_sources(config)
        build_plan(config)
    except FedPipeError as error:
        raise type(error)(f"{variant.name}: {error}") from error
    return SystemCell(
        name=name, run_dir=directory / CELLS / name, config=config, variant=variant, seed=seed
    )


def _check_same(directory: Path, before: ReproductionConfig, now: ReproductionConfig) -> None:
    """Refuse another reproduction than that of the directory; its evaluation may differ."""
    free = may_change_in_all(RunDir.at(path, "pretrain") for path in directory.glob(f"{CELLS}/*"))
    check_config(
        directory,
        before,
        now,
        may_change=(*free, "evaluation."),
        what="settings of the reproduction",
        way_out="Continue it with --run-dir alone, or choose a new --run-dir.",
    )
