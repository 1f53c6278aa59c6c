"""Fine-tunings that are run one after another and compared: the cells of a grid. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from fedpipe.config.finetune import FinetuneConfig, finetune_yaml, load_finetune
from fedpipe.config.tree import Node
from fedpipe.errors import CheckpointError, FedPipeError
from fedpipe.files import write_text
from fedpipe.run.resume import continued
from fedpipe.run.run_dir import RunDir

EXAMPLE = ("method.name=lora,full",)
"""What is compared where the user asks for nothing."""
_FILE = "cells.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of a grid."""

    name: str
    """Its directory below the grid's."""
    config_path: str | Node | None
    preset: str | None
    overrides: list[str]


def write_cells(directory: Path, cells: Sequence[Cell]) -> None:
    """Write down what a grid consists of, and the whole configuration of every cell.

    A grid that is there already is gone on with: what may change in its runs may change, and what
    they read must be what those that have begun began with.

    Args:
        directory: Of the grid.
        cells: As they are asked for.

    Raises:
        CheckpointError: The directory holds another grid, a run or something else, or a cell has
            another configuration or content; it is named.
    """
    run = RunDir.at(directory, "finetune grid")
    saved = [] if run.is_new else read_cells(directory)
    if saved and [cell.name for cell in saved] != [cell.name for cell in cells]:
        raise CheckpointError(
            f"--run-dir: expected the grid that is in {directory}, got another one. Resume with"
            " --run-dir alone, or choose a new --run-dir."
        )
    configs = [load_finetune(c.config_path, c.overrides, preset=c.preset) for c in cells]
    if saved:
        configs = [
            _check_same(directory, cell, config)
            for cell, config in zip(saved, configs, strict=True)
        ]
    else:
        run.make()
        text = json.dumps([asdict(cell) for cell in cells], indent=1)
        write_text(directory / _FILE, text + "\n")
    for cell, config in zip(cells, configs, strict=True):
        RunDir.at(directory / cell.name, "finetune").make().write(finetune_yaml(config))


def read_cells(directory: Path) -> list[Cell]:
    """Read what ``write_cells`` wrote; nothing where it was interrupted before."""
    if not (directory / _FILE).is_file():
        return []
    content = json.loads((directory / _FILE).read_text(encoding="utf-8"))
    return [Cell(**cell) for cell in content]


def config_of(cell: Cell, directory: Path) -> Path:
    """Return where the configuration of a cell is."""
    return directory / cell.name / "config.yaml"


def again(
    cell: Cell,
    directory: Path,
    *,
    config_path: str | Node | None,
    overrides: Sequence[str],
    preset: str | None,
) -> Cell:
    """Ask for a cell of a grid again: as it is, or as a file or a preset says, with overrides."""
    path = config_of(cell, directory)
    if config_path or preset or not path.is_file():
        if not (config_path or preset):
            config_path, preset = cell.config_path, cell.preset
        own = [*cell.overrides, *overrides]
        return Cell(name=cell.name, config_path=config_path, preset=preset, overrides=own)
    return Cell(name=cell.name, config_path=str(path), preset=None, overrides=list(overrides))


def check_tuning(run: RunDir, config: FinetuneConfig) -> None:
    """Refuse to go on with other examples, another base model, adapter or DeepSpeed JSON.

    Raises:
        FedPipeError: The content is another one, or cannot be read.
    """
    if not run.has_begun:  # what follows imports torch
        return
    from fedpipe.commands.finetune.setup import deepspeed_of, tuning_inputs

    run.check_content(deepspeed_of(config), partial(tuning_inputs, config))


def _check_same(directory: Path, cell: Cell, now: FinetuneConfig) -> FinetuneConfig:
    saved = again(cell, directory, config_path=None, overrides=[], preset=None)
    before = load_finetune(saved.config_path, saved.overrides, preset=saved.preset)
    run = RunDir.at(directory / cell.name, "finetune")
    try:
        now = continued(run.path, before, now, may_change=run.may_change)
        check_tuning(run, now)
        return now
    except FedPipeError as error:
        raise type(error)(f"cell {cell.name}: {error}") from error
