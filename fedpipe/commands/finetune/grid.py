"""Fine-tunings that are compared in one table: a study of values on the command line. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.commands.finetune import ranks
from fedpipe.commands.study.pool import CommandProcess
from fedpipe.commands.study.study import Cell, Runs, Slot, Study, read_grid, write_grid
from fedpipe.config.finetune import FinetuneConfig, finetune_tree, load_finetune
from fedpipe.config.tree import Node
from fedpipe.distributed.signals import Signals
from fedpipe.report.console import RunConsole
from fedpipe.report.sinks import check_sinks
from fedpipe.run.run_dir import RunDir

EXAMPLE = ("method.name=lora,full",)
"""What is compared where the user asks for nothing."""


@dataclass(frozen=True, kw_only=True)
class TuningGrid(Study[Cell[FinetuneConfig]]):
    """All fine-tunings of a grid."""

    task = "finetune"
    job = "fedpipe.commands.finetune.command:go_on"
    in_foreground = True
    directory: Path
    cells: tuple[Cell[FinetuneConfig], ...]

    @property
    def page(self) -> Path:
        """Its report."""
        return self.directory / "report.html"

    def reserve(self, cells: Sequence[Cell[Any]]) -> None:
        """Set the runs up: a job's errors are found before it is submitted."""
        for cell in cells:
            found = ranks.PROGRAM.located_run(cell.run, cell.config)
            ranks.PROGRAM.set_up(found, notify=lambda line: None)

    def run(self, cell: Cell[FinetuneConfig], *, console: RunConsole, signals: Signals) -> None:
        """Run a fine-tuning, and show its rounds."""
        from fedpipe.commands.finetune.command import tune

        tune(cell.run, cell.config, console, signals)

    def start(self, cell: Cell[FinetuneConfig], slot: Slot, log: Path) -> CommandProcess:
        """Start the fine-tuning of a cell."""
        return CommandProcess("finetune", cell.run_dir, log)

    def write_tables(self) -> str:
        """Write the report that compares the runs that are done; return its table."""
        from fedpipe.commands.finetune.report import result_table, write_comparison

        runs = [cell.run_dir for cell in self.cells if cell.is_done]
        if not runs:
            return "no run is done yet"
        write_comparison(self.directory, runs)
        return result_table(runs)

    def outcome(self, cell: Cell[FinetuneConfig]) -> str:
        """Say the score that a finished run has reached."""
        from fedpipe.commands.finetune.report import outcome_text

        return outcome_text(cell.run_dir)


def find_grid(
    config_path: str | Node | None,
    overrides: Sequence[str],
    grid_keys: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None,
) -> TuningGrid | None:
    """Find the grid that is asked for, checked cell by cell, and write it down.

    A grid that is there already is gone on with: what may change in its runs may change, and what
    they read must be what those that have begun began with.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        grid_keys: See ``parse_grid``; nothing for those of the grid in the directory, or, if
            nothing else is asked for, of the example.
        run_dir: Directory of the grid, or None.
        preset: What the YAML is laid over, or None.

    Returns:
        The grid; None where a single run is asked for.

    Raises:
        FedPipeError: What the user can mend; of a grid that is there, other values of keys that
            may not change.
    """
    chosen = any(override.startswith("method.name=") for override in overrides)
    found = RunDir.at(run_dir, "finetune", "finetune grid") if run_dir else None
    if not (config_path or preset or grid_keys or chosen or (found and not found.is_new)):
        grid_keys = EXAMPLE
    if not grid_keys and (found is None or found.kind == "finetune"):
        return None
    run, grid, cells = read_grid(TUNINGS, config_path, overrides, grid_keys, run_dir, preset=preset)
    write_grid(run, grid, cells)
    return TuningGrid(directory=run.path, cells=cells)


def check_tuning(run: RunDir, config: FinetuneConfig) -> None:
    """Refuse to go on with other examples, another base model, adapter or DeepSpeed JSON.

    Raises:
        FedPipeError: The content is another one, or cannot be read.
    """
    if not run.has_begun:  # what follows imports torch
        return
    from fedpipe.commands.finetune.setup import deepspeed_of, tuning_inputs

    run.check_content(deepspeed_of(config), partial(tuning_inputs, config))


def load_cell(base: Node, overrides: Sequence[str]) -> FinetuneConfig:
    """Load the configuration of a cell, and check what needs no torch.

    Raises:
        FedPipeError: The configuration cannot work.
    """
    config = load_finetune(base, overrides)
    check_sinks(config.log.to)
    return config


TUNINGS = Runs(
    kind="finetune",
    study_kind="finetune grid",
    title="the fine-tunings",
    home=".",
    read_tree=finetune_tree,
    read=load_finetune,
    load=load_cell,
    check_content=check_tuning,
)
"""What a grid consists of."""
