"""A reproduction: all its pre-training runs, checked before any starts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpipe.commands.plan.plan import build_plan
from fedpipe.commands.reproduce.config import ReproductionConfig, load_reproduction
from fedpipe.commands.reproduce.variants import Variant, make_variants
from fedpipe.commands.study.sweep import Cell, check_cells, write_configs
from fedpipe.config import load
from fedpipe.config.evaluation import PACKAGED_TASKS
from fedpipe.config.schema import RunConfig
from fedpipe.data.corpus import check_sources
from fedpipe.data.tasks.files import find_files
from fedpipe.data.tasks.registry import Task
from fedpipe.data.tasks.task_file import choose_tasks
from fedpipe.errors import FedPipeError
from fedpipe.run.resume import check_config
from fedpipe.run.run_dir import RunDir, shared_freedom

CELLS, MODELS, EVALUATION = "cells", "models", "evaluation"
UNTRAINED = "untrained"
TASKS = (
    "bc2gm", "bc5cdr-chemical", "bc5cdr-disease", "ncbi-disease", "jnlpba", "ddi", "gad",
    "pubmedqa",
)  # fmt: skip
"""FedBioBERT's, in the order of its figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """A variant with a seed."""

    variant: Variant
    seed: int
    cell: Cell

    def model_name(self, round_id: int) -> str:
        """Name the model after a round, 1 for the first; 0 is untrained, the same for all."""
        name = self.variant.name if round_id else UNTRAINED
        return f"{name}_seed{self.seed}_round{round_id:02d}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """All runs of a reproduction; every one has been checked."""

    experiment: str
    directory: Path
    config: ReproductionConfig
    variants: tuple[Variant, ...]
    runs: tuple[TrainingRun, ...]
    """Seed by seed, all variants."""

    def pending(self) -> list[TrainingRun]:
        """Runs that are not complete."""
        return [run for run in self.runs if not run.cell.is_done]

    def of(self, variant: Variant) -> list[TrainingRun]:
        """Return the runs of a variant, in the order of the seeds."""
        return [run for run in self.runs if run.variant == variant]

    def untrained(self) -> list[tuple[TrainingRun, int]]:
        """Return what the models before any training are made of, one per seed."""
        first = next(v for v in self.variants if v.kind == "fedbert")
        return [(run, 0) for run in self.of(first)]

    def model(self, run: TrainingRun, round_id: int) -> Path:
        """Return the folder of a model."""
        return self.directory / MODELS / run.model_name(round_id)

    def write(self) -> None:
        """Write reproduce.yaml and each run's config.yaml.

        Raises:
            FedPipeError: The directory cannot be written to.
        """
        RunDir.at(self.directory, "reproduction").make().write(load.dump_config(self.config))
        write_configs([run.cell for run in self.runs])


def plan_reproduction(
    experiment: str,
    scale: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    data: str | None,
    seeds: tuple[int, ...] | None,
) -> Reproduction:
    """Resolve and check every run; write nothing.

    Args:
        experiment: One of ``EXPERIMENTS``.
        scale: One of ``SCALES``, or None for that of the reproduction in the directory, else tiny.
        overrides: ``section.key=value``.
        run_dir: Directory, or None for ``runs/EXPERIMENT-SCALE``.
        data: Folder with the files of the eight tasks, or None for what the settings say.
        seeds: Of pre-training, or None likewise.

    Returns:
        The reproduction.

    Raises:
        FedPipeError: Anything a user can get wrong.
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
    runs = tuple(
        TrainingRun(variant=variant, seed=seed, cell=_cell(directory, variant, seed))
        for seed in config.reproduce.seeds
        for variant in variants
    )
    check_cells(run.cell for run in runs)
    return Reproduction(
        experiment=experiment, directory=directory, config=config, variants=variants, runs=runs
    )


def check_tasks(config: RunConfig) -> list[Task]:
    """Return the tasks; refuse those that there are not, or whose files are not at hand."""
    evaluation = config.evaluation
    tasks = choose_tasks(evaluation.tasks, evaluation.task_files, evaluation.data)
    for task in tasks:
        find_files(task, evaluation.data, alone=len(tasks) == 1)
    return tasks


def is_packaged(config: RunConfig) -> bool:
    """Whether the tasks are the packaged slice."""
    return config.evaluation.data == PACKAGED_TASKS


def _names_tasks(overrides: Sequence[str]) -> bool:
    return any(override.startswith("evaluation.tasks=") for override in overrides)


def _cell(directory: Path, variant: Variant, seed: int) -> Cell:
    config = variant.with_seed(seed)
    name = f"{variant.name}_seed={seed}"
    try:
        load.check(config)
        check_sources(config)
        build_plan(config)
    except FedPipeError as error:
        raise type(error)(f"{variant.name}: {error}") from error
    return Cell(name=name, overrides=(), run_dir=directory / CELLS / name, config=config)


def _check_same(directory: Path, before: ReproductionConfig, now: ReproductionConfig) -> None:
    """Refuse another reproduction than that of the directory; its evaluation may be another."""
    free = shared_freedom(RunDir.at(path, "pretrain") for path in directory.glob(f"{CELLS}/*"))
    check_config(
        directory, before, now, may_change=(*free, "evaluation."),
        what="settings of the reproduction",
        way_out="Continue it with --run-dir alone, or choose a new --run-dir.",
    )  # fmt: skip
