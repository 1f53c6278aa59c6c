"""A sweep: one pre-training run per cell of a grid, resumable cell by cell. No torch.

A cell's run directory is an ordinary one that already has its config.yaml, so whoever starts cells
(this machine, a job array) says ``fedpipe pretrain --run-dir CELL`` and nothing more.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedpipe.commands.plan.plan import build_plan
from fedpipe.commands.study.axes import Grid, check_grid, parse_grid
from fedpipe.commands.study.report import Row, draw_sweep, read_result, short_names, table
from fedpipe.config import load
from fedpipe.config.deepspeed import deepspeed_config
from fedpipe.config.schema import RunConfig
from fedpipe.config.tree import Node, dump, wrap
from fedpipe.data.corpus import Progress, check_sources, prepare
from fedpipe.errors import CheckpointError, ConfigError, FedPipeError
from fedpipe.files import write_text
from fedpipe.printable import printable
from fedpipe.report.drawing import render
from fedpipe.run.resume import check_config
from fedpipe.run.run_dir import RunDir, describe_environment, inputs_of, shared_freedom

_SEED = "seed"
"""Cells that differ in nothing else are repetitions of one row."""
_MAX_NAME = 200
"""Characters of a folder's name; file systems take 255 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of a sweep."""

    name: str
    """Of its folder, ``cut=2_seed=0``."""
    overrides: tuple[str, ...]
    """``section.key=value``, one per axis."""
    run_dir: Path
    """``SWEEP_DIR/cells/NAME``."""
    config: RunConfig
    """All of its configuration."""

    @property
    def is_done(self) -> bool:
        """Whether all its rounds are trained, exported and reported."""
        run = RunDir.at(self.run_dir, "pretrain")
        return run.is_done(num_rounds=self.config.federation.num_rounds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """All runs of a sweep; every one has been checked."""

    directory: Path
    grid: Grid
    cells: tuple[Cell, ...]
    """The product of the grid; the last axis varies fastest."""

    def pending(self) -> list[Cell]:
        """Cells whose run is not complete, in their order."""
        return [cell for cell in self.cells if not cell.is_done]


def set_up_sweep(
    config_path: str | Node | None,
    overrides: Sequence[str],
    axes: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None,
) -> Sweep:
    """Resolve and check every cell, then write sweep.yaml and each cell's config.yaml.

    Args:
        config_path: YAML, or None for that of the sweep in the directory, else the quick start.
        overrides: ``section.key=value``, of all cells.
        axes: The grid (see ``parse_grid``), or nothing for that of the sweep in the directory.
        run_dir: Directory of the sweep, or None for ``runs/NAME``.
        preset: What the YAML is laid over, or None.

    Returns:
        The sweep; nothing has been started.

    Raises:
        FedPipeError: Anything a user can get wrong; a cell that cannot run is named.
    """
    grid = parse_grid(axes)
    run = RunDir.at(run_dir, "sweep") if run_dir else None
    saved = _read_saved(run) if run else None
    if run and saved and not (config_path or preset):
        base = wrap(saved[1], str(run.config_file))
    else:
        base = load.run_tree(config_path, preset=preset)
    if run is None:
        first = [f"{key}={values[0]}" for key, values in grid]
        run = RunDir.at(f"runs/{load.read_config(base, [*overrides, *first]).name}", "sweep")
        saved = _read_saved(run)
    grid = grid or (saved[0] if saved else ())
    check_grid(grid, overrides)
    cells = make_cells(
        grid, run.path / "cells", lambda own: load.load_config(base, [*overrides, *own])
    )
    check_distinct(cells)
    if saved is not None:
        _check_same(run, saved, grid, cells)
    _write(run, grid, cells)
    return Sweep(directory=run.path, grid=grid, cells=cells)


def _refuse_open_cut(config: RunConfig) -> None:
    """Refuse ``pipeline.cut: auto``: cells that measured it could each be cut elsewhere."""
    if config.pipeline.is_open:
        raise ConfigError(
            "pipeline.cut: expected a list, the same wherever a cell runs, got auto. Find one with "
            "fedpipe plan --measure."
        )


def make_cells(
    grid: Grid, home: Path, configure: Callable[[Sequence[str]], RunConfig]
) -> tuple[Cell, ...]:
    """Make the product of a grid, and the quick checks of ``fedpipe pretrain`` on every cell.

    Args:
        grid: From ``parse_grid``.
        home: Where the cells' folders are.
        configure: Makes a configuration of a cell's own overrides.

    Returns:
        The cells, the last axis varying fastest.

    Raises:
        FedPipeError: A cell cannot run; it is named.
    """
    keys = [key for key, _ in grid]
    cells = []
    for values in itertools.product(*(values for _, values in grid)):
        own = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        name = _folder_name(keys, values)
        try:
            config = configure(own)
            _refuse_open_cut(config)
            check_sources(config)
            build_plan(config)
        except FedPipeError as error:
            raise type(error)(f"cell {name}: {error}") from error
        cells.append(Cell(name=name, overrides=own, run_dir=home / name, config=config))
    return tuple(cells)


def _folder_name(keys: Sequence[str], values: Sequence[str]) -> str:
    parts = []
    for key, value in zip(short_names(keys), values, strict=True):
        # "[2, 4]" is 2-4; what a file system or a shell could misread becomes a dash.
        text = re.sub(r"[^A-Za-z0-9.+-]+", "-", value.strip("[]'\" "))
        parts.append(f"{key}={text or 'none'}")
    return "_".join(parts)


def check_distinct(cells: Iterable[Cell]) -> None:
    """Refuse cells that are the same run, or whose folders collide or cannot be.

    Raises:
        ConfigError: There are such cells.
    """
    names: dict[str, Cell] = {}
    configs: dict[RunConfig, Cell] = {}
    for cell in cells:
        if len(cell.name) > _MAX_NAME:
            raise ConfigError(
                f"cell {cell.name}: expected a folder name of at most {_MAX_NAME} characters, got "
                f"{len(cell.name)}. Use fewer keys or shorter values."
            )
        other = names.setdefault(cell.name, cell)
        if other is not cell:
            raise ConfigError(
                f"--grid: expected cells with folders of their own, got {cell.name} for both "
                f"{' '.join(other.overrides)} and {' '.join(cell.overrides)}. Change or remove one "
                "of the values."
            )
        other = configs.setdefault(cell.config, cell)
        if other is not cell:
            raise ConfigError(
                f"--grid: expected cells that differ, got the same configuration for {other.name} "
                f"and {cell.name}. Remove one of the values."
            )


def _read_saved(run: RunDir) -> tuple[Grid, dict[str, Any]] | None:
    """Read the grid and the configuration of the sweep in a directory, if there is one."""
    if run.saved is None:
        return None
    content = run.saved.plain()
    axes, config = content.get("grid"), content.get("config")
    if not (isinstance(axes, list) and axes and isinstance(config, dict)):
        raise CheckpointError(
            f"{run.config_file}: expected the grid and the configuration of a sweep, got"
            f" {sorted(content)}. Restore the file, or choose a new --run-dir."
        )
    return parse_grid([str(axis) for axis in axes]), config


def _check_same(
    run: RunDir, saved: tuple[Grid, dict[str, Any]], grid: Grid, cells: Sequence[Cell]
) -> None:
    """Refuse another sweep than that of the directory."""
    way_out = "Continue it with --run-dir alone, or choose a new --run-dir."
    if grid != saved[0]:
        raise CheckpointError(
            f"{run.path}: expected the grid of the sweep that is there, "
            f"{shlex.join(_axes(saved[0]))}, got {shlex.join(_axes(grid))}. {way_out}"
        )
    check_config(
        run.path, load.from_dict(saved[1], source=str(run.config_file)), cells[0].config,
        may_change=shared_freedom(RunDir.at(cell.run_dir, "pretrain") for cell in cells),
        what="configuration of the sweep", way_out=way_out,
    )  # fmt: skip
    check_cells(cells)


def check_cells(cells: Iterable[Cell]) -> None:
    """Refuse to go on where a cell, done or not, has begun with other content than there is now.

    Raises:
        FedPipeError: There is such a cell; it is named.
    """
    for cell in cells:
        try:
            run = RunDir.at(cell.run_dir, "pretrain")
            run.check_content(deepspeed_config(cell.config), partial(inputs_of, cell.config))
        except FedPipeError as error:
            raise type(error)(f"cell {cell.name}: {error}") from error


def _axes(grid: Grid) -> list[str]:
    return [f"{key}={','.join(values)}" for key, values in grid]


def _write(run: RunDir, grid: Grid, cells: Sequence[Cell]) -> None:
    # The first cell's values of the grid's keys stand for all: every cell has its own.
    content = {"grid": _axes(grid), "config": load.to_dict(cells[0].config)}
    run.make().write(dump(content))
    write_configs(cells)


def write_configs(cells: Iterable[Cell]) -> None:
    """Write every cell's config.yaml, unless it is there already."""
    for cell in cells:
        RunDir.at(cell.run_dir, "pretrain").make().write(load.to_yaml(cell.config))


def prepare_texts(cells: Iterable[Cell], *, progress: Progress | None = None) -> None:
    """Prepare the text of cells, once for all that share it, so that none does it beside another.

    Args:
        cells: Those that are to run.
        progress: Called while files are hashed, checked and tokenised.

    Raises:
        CorpusError: The text of a cell cannot be used; the cell is named.
    """
    seen = set()
    for cell in cells:
        config = cell.config
        what = (config.data, config.federation.num_clients, config.seed)
        if what in seen:
            continue
        seen.add(what)
        try:
            prepare(config, progress=progress)
        except FedPipeError as error:
            raise type(error)(f"cell {cell.name}: {error}") from error


def gather(sweep: Sweep) -> str:
    """Write sweep.json, sweep.md and sweep.png from the cells that are done.

    Args:
        sweep: Its cells may be at work meanwhile.

    Returns:
        The table of sweep.md.

    Raises:
        CheckpointError: The record of a cell is damaged.
    """
    results = {cell: read_result(cell.run_dir) for cell in sweep.cells if cell.is_done}
    groups: dict[tuple[str, ...], list[Cell]] = {}
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
    content = {
        "grid": _axes(sweep.grid),
        "rows": [row.to_dict() for row in rows],
        "cells": [
            {"name": cell.name, "values": dict(map(_halves, cell.overrides))}
            | {"done": cell in results}
            | (results[cell].to_dict() if cell in results else {})
            for cell in sweep.cells
        ],
        "environment": describe_environment(),
    }
    figure = draw_sweep(rows)
    if figure is not None:
        draw, height = figure
        render(draw, sweep.directory / "sweep.png", height=height)
    text = table(rows)
    write_text(sweep.directory / "sweep.json", json.dumps(content, indent=2) + "\n")
    page = _document(sweep, text, content, set(results))
    write_text(sweep.directory / "sweep.md", printable(page))
    return text


def _without_seed(cell: Cell) -> tuple[str, ...]:
    return tuple(o for o in cell.overrides if _halves(o)[0] != _SEED)


def _halves(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value


def _document(sweep: Sweep, text: str, content: dict[str, Any], done: set[Cell]) -> str:
    environment = content["environment"]
    packages = environment["packages"]
    hosts = sorted({cell["host"] for cell in content["cells"] if cell["done"] and cell["host"]})
    missing = [f"`{cell.name}`" for cell in sweep.cells if cell not in done]
    config = sweep.cells[0].run_dir / "config.yaml"
    again = [
        "fedpipe", "sweep", "--config", str(config), "--run-dir", f"{sweep.directory}-again",
        "--grid", *_axes(sweep.grid),
    ]  # fmt: skip
    lines = [
        f"# fedpipe sweep: {sweep.directory.resolve().name}",
        text,
        "Validation loss of the final head after the last round, in nats; sd is the standard "
        "deviation over the seeds (n - 1), a dash where there is one run. Training time and "
        "tokens/s count rounds with averaging, not start-up and validation.",
        "![Final loss and speed of every row](sweep.png)" if done else "",
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
