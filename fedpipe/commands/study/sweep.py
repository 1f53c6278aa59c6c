"""``fedpipe sweep``: run a pre-training for every combination of values. No torch.

Every cell has an ordinary run directory with its config.yaml. This machine and job arrays start a
cell with ``fedpipe pretrain --run-dir CELL``, which also resumes it.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedpipe.commands import options
from fedpipe.commands.plan.plan import build_plan
from fedpipe.commands.study.pool import CommandProcess, run_study
from fedpipe.commands.study.report import Row, RunResult, draw_sweep, read_result, table
from fedpipe.commands.study.study import (
    Cell,
    GridKeys,
    Runs,
    Slot,
    Study,
    grid_words,
    naming_cell,
    prepare_texts,
    set_up_grid,
)
from fedpipe.config import load
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import Node
from fedpipe.data.corpus import Progress, check_sources
from fedpipe.errors import ConfigError
from fedpipe.files import write_text
from fedpipe.printable import printable
from fedpipe.report.drawing import render
from fedpipe.report.format import number
from fedpipe.report.records import Environment
from fedpipe.report.sinks import check_sinks
from fedpipe.run.run_dir import RunDir, describe_environment, inputs_of

_SEED = "seed"
"""Key of the seed; cells that differ in the seed only share a row of the table."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe sweep``, here and in ``fedpipe submit``."""
    options.add_run(command)
    options.add_grid(
        command,
        text="every combination of the values is a run: pipeline.cut=[2],[4] seed=0,1,2; default:"
        " the grid of the sweep in DIR",
    )
    options.add_parallel(command)


add_job_arguments = add_arguments


def run(args: argparse.Namespace) -> int:
    """Run the remaining cells of the sweep that the arguments describe."""
    return run_study(lambda console: to_submit(args), parallel=args.parallel)


def to_submit(args: argparse.Namespace) -> Sweep:
    """Check the sweep that the arguments describe, and return it for submission."""
    return set_up_sweep(args.config, args.overrides, args.grid, args.run_dir, preset=args.preset)


@dataclass(frozen=True, kw_only=True)
class Sweep(Study[Cell[RunConfig]]):
    """The pre-trainings of a sweep."""

    task = "sweep"
    job = "fedpipe.commands.pretrain.ranks"
    directory: Path
    grid_keys: GridKeys
    cells: tuple[Cell[RunConfig], ...]

    @property
    def page(self) -> Path:
        """Path of the table."""
        return self.directory / "sweep.md"

    def prepare(
        self, cells: Sequence[Cell[RunConfig]], *, progress: Progress | None = None
    ) -> None:
        """Prepare the text of the cells."""
        prepare_texts(cells, progress=progress)

    def start(self, cell: Cell[RunConfig], slot: Slot, log: Path) -> CommandProcess:
        """Start the pre-training of a cell."""
        return CommandProcess("pretrain", cell.run_dir, log)

    def outcome(self, cell: Cell[RunConfig]) -> str:
        """Return a text with the loss of a finished cell."""
        return f"loss {number(read_result(cell.run_dir).loss, 3)}"

    def write_tables(self) -> str:
        """Write sweep.json, sweep.md and sweep.png of the finished cells.

        Returns:
            The table of sweep.md.

        Raises:
            CheckpointError: metrics.jsonl of a cell is damaged.
        """
        return _gather(self)


def set_up_sweep(
    config_path: str | Node | None,
    overrides: Sequence[str],
    grid_keys: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None,
) -> Sweep:
    """Find and check every cell, then write sweep.yaml and config.yaml of every cell.

    Args:
        config_path: Path of a YAML file. None takes the configuration of the sweep in the
            directory, or the quick start if the sweep is new.
        overrides: Values ``section.key=value`` of all cells.
        grid_keys: Grid for ``parse_grid``; empty for the grid of the sweep in the directory.
        run_dir: Directory of the sweep, or None for ``runs/NAME``.
        preset: Name of a packaged configuration that the YAML file overrides, or None.

    Returns:
        The sweep; no cell has been started.

    Raises:
        FedPipeError: The user can correct the cause; the message names a cell that cannot run.
    """
    run, grid, cells = set_up_grid(
        PRETRAININGS, config_path, overrides, grid_keys, run_dir, preset=preset
    )
    return Sweep(directory=run.path, grid_keys=grid, cells=cells)


def checked_cell(base: Node, overrides: Sequence[str]) -> RunConfig:
    """Build the configuration of a cell, and make the quick checks of ``fedpipe pretrain``.

    Raises:
        FedPipeError: The cell cannot run, or ``pipeline.cut`` is auto, which could give every cell
            another cut.
    """
    config = load.load_config(base, overrides)
    check_cell(config)
    return config


def check_cell(config: RunConfig) -> None:
    """Make the quick checks of ``checked_cell``."""
    if config.pipeline.is_open:
        raise ConfigError(
            "pipeline.cut: expected a list, the same wherever a cell runs, got auto. Find one with "
            "fedpipe plan --measure."
        )
    check_sinks(config.log.to)
    check_sources(config)
    build_plan(config)


def check_cells(cells: Iterable[Cell[RunConfig]]) -> None:
    """Refuse to resume a sweep if the inputs of a cell have changed since it started.

    Raises:
        FedPipeError: The inputs of the named cell have changed.
    """
    for cell in cells:
        with naming_cell(cell.name):
            _check_content(cell.run, cell.config)


def _check_content(run: RunDir, config: RunConfig) -> None:
    run.check_content(deepspeed_config(config), partial(inputs_of, config))


PRETRAININGS = Runs(
    kind="pretrain",
    study_kind="sweep",
    title="the sweep",
    home="cells",
    read_tree=load.run_tree,
    read=load.read_config,
    load=checked_cell,
    check_content=_check_content,
)
"""How the runs of a sweep are read and checked."""


def _gather(sweep: Sweep) -> str:
    results = {cell: read_result(cell.run_dir) for cell in sweep.cells if cell.is_done}
    groups: dict[tuple[str, ...], list[Cell[RunConfig]]] = {}
    for cell in sweep.cells:
        groups.setdefault(_without_seed(cell), []).append(cell)
    rows = [
        Row(
            values=dict(_halves(override) for override in values),
            num_cells=len(cells),
            runs=tuple(results[cell] for cell in cells if cell in results),
        )
        for values, cells in groups.items()
    ]
    environment = describe_environment()
    content = {
        "grid": grid_words(sweep.grid_keys),
        "rows": [row.to_dict() for row in rows],
        "cells": [
            {"name": cell.name, "values": dict(map(_halves, cell.overrides))}
            | {"done": cell in results}
            | (results[cell].to_dict() if cell in results else {})
            for cell in sweep.cells
        ],
        "environment": environment,
    }
    figure = draw_sweep(rows)
    if figure is not None:
        draw, height = figure
        render(draw, sweep.directory / "sweep.png", height=height)
    text = table(rows)
    write_text(sweep.directory / "sweep.json", json.dumps(content, indent=2) + "\n")
    page = _document(sweep, text, results, environment)
    write_text(sweep.page, printable(page))
    return text


def _without_seed(cell: Cell[RunConfig]) -> tuple[str, ...]:
    return tuple(o for o in cell.overrides if _halves(o)[0] != _SEED)


def _halves(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value


def _document(
    sweep: Sweep,
    text: str,
    results: Mapping[Cell[RunConfig], RunResult],
    environment: Environment,
) -> str:
    packages = environment["packages"]
    hosts = sorted({result.host for result in results.values() if result.host})
    missing = [f"`{cell.name}`" for cell in sweep.cells if cell not in results]
    config = sweep.cells[0].run_dir / "config.yaml"
    again = [
        "fedpipe",
        "sweep",
        "--config",
        str(config),
        "--run-dir",
        f"{sweep.directory}-again",
        "--grid",
        *grid_words(sweep.grid_keys),
    ]
    lines = [
        f"# fedpipe sweep: {sweep.directory.resolve().name}",
        text,
        "Validation loss of the final head after the last round, in nats; sd is the standard "
        "deviation over the seeds (n - 1), a dash where there is one run. Training time and "
        "tokens/s count rounds with averaging, not start-up and validation.",
        "![Final loss and speed of every row](sweep.png)" if results else "",
        f"Not done: {', '.join(missing)}." if missing else "",
        "## Repeat this sweep",
        f"```sh\n{shlex.join(again)}\n```",
        "## Environment",
        f"- command: `{environment['command']}`\n"
        f"- commit: {environment['commit'] or 'unknown'}, fedpipe {environment['fedpipe']}\n"
        f"- runs on: {', '.join(hosts) or environment['host']} ({environment['processor']}, "
        f"{environment['cores']} cores)\n"
        f"- python {environment['python']}, torch {packages['torch']}, "
        f"deepspeed {packages['deepspeed']}, transformers {packages['transformers']}",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"
