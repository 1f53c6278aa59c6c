"""``fedpipe finetune``: all workers on this machine; one run, or one after another over a grid."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from fedpipe.cluster.launched import note_attempt, position_of
from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.commands import options
from fedpipe.commands.finetune import ranks
from fedpipe.commands.finetune.grid import (
    EXAMPLE,
    Cell,
    again,
    read_cells,
    write_cells,
)
from fedpipe.commands.study.axes import check_grid, parse_grid
from fedpipe.config.finetune import FinetuneConfig, finetune_presets, load_finetune
from fedpipe.config.tree import Node, parse_override
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.errors import ConfigError
from fedpipe.report.console import RunConsole
from fedpipe.run.checkpoint import find_latest
from fedpipe.run.run_dir import RunDir, locked, resolve, way_back


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe finetune``."""
    options.add_run(command, presets=f"a published study: {', '.join(finetune_presets())}")
    text = "count what every method trains on every family's base model; start nothing"
    command.add_argument("--count", action="store_true", help=text)
    options.add_task_files(command)
    options.add_launcher(command)
    options.add_grid(
        command,
        text="run every combination of the values, one after the other, and compare them:"
        " method.name=lora,full seed=0,1",
    )


def run(args: argparse.Namespace) -> int:
    """Fine-tune what the arguments say, be one rank of that, or count."""
    if args.count:
        return count_here()
    args.overrides = [*args.overrides, *task_overrides(args.task_file)]
    if options.is_launched(args):
        from fedpipe.cluster.launched import start_rank

        check_library()
        return start_rank(ranks.PROGRAM, options.request_of(args))
    return finetune(args.config, args.overrides, args.run_dir, preset=args.preset, axes=args.grid)


def task_overrides(task_files: Sequence[str]) -> list[str]:
    """Return ``--task-file`` as overrides.

    Raises:
        ConfigError: There are several.
    """
    if len(task_files) > 1:
        raise ConfigError(
            f"--task-file: expected one file with finetune, got {', '.join(task_files)}. Remove"
            " one, or run --grid task.file=A,B."
        )
    return [f"task.file={json.dumps(path)}" for path in task_files]


def finetune(
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
    axes: Sequence[str] = (),
    signals: Signals | None = None,
) -> int:
    """Fine-tune on this machine, or resume; the whole of ``fedpipe finetune``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None.
        preset: What the YAML is laid over, or None.
        axes: A grid, ``section.key=value,value``; every combination is a run of its own.
        signals: Caught meanwhile; for whoever wants to know which one has come.

    Returns:
        0 when everything is done, 75 when it was interrupted and can be resumed.

    Raises:
        FedPipeError: What the user can mend; nothing has been started.
        LaunchError: A process failed.
    """
    check_library()
    console = ranks.plain_console()
    signals = signals or Signals()
    run: RunDir | None = None
    try:
        with signals.caught():
            study = choose_cells(config_path, overrides, run_dir, preset=preset, axes=axes)
            if study is not None:
                run = RunDir.open(study[0], "finetune grid")
                _grid(*study, console, signals)
                console.text(compare_runs(*study))
                return 0
            run, config = resolve("finetune", config_path, overrides, run_dir, preset=preset)
            _one(run, config, console, signals)
    except Interrupted as where:
        console.text(f"interrupted{where}; {way_back('finetune', run)}")
        return EXIT_INTERRUPTED
    for line in ranks.PROGRAM.closing(run.path):
        console.text(line)
    return 0


def go_on(run_dir: str, *, job_id: str, signals: Signals) -> int:
    """Go on with a run, or begin it, in a job of one task; see ``finetune``."""
    note_attempt(Path(run_dir), position_of(find_latest(Path(run_dir))[0]), job_id=job_id)
    return finetune(None, [], run_dir, signals=signals)


def count_here() -> int:
    """Print what every method trains on every family's base model; return 0."""
    check_library()
    from fedpipe.commands.finetune.count import count_rows, count_table

    ranks.plain_console().text(count_table(count_rows()))
    return 0


def check_library() -> None:
    """Refuse to start without the library, which pins transformers and so is an extra.

    Raises:
        ConfigError: It is not there.
    """
    # once imported it has no spec: its module replaces itself
    if "adapters" not in sys.modules and find_spec("adapters") is None:
        raise ConfigError(
            "finetune: expected the adapters library to be installed, got none. Install it: "
            "pip install -e '.[finetune]'."
        )


def _one(run: RunDir, config: FinetuneConfig, console: RunConsole, signals: Signals) -> None:
    """Run what is not done of one fine-tuning."""
    setup = set_up_here(ranks.PROGRAM, ranks.PROGRAM.located(run, config), console=console)
    if run.is_done(num_rounds=config.federation.num_rounds):
        console.text(f"{setup.run_dir} is done: see {setup.run_dir / 'report.html'}")
        return
    with locked(setup.run_dir):
        supervise(ranks.PROGRAM, setup, signals=signals)


def choose_cells(
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None,
    axes: Sequence[str],
) -> tuple[Path, list[Cell]] | None:
    """Find the grid that is asked for, checked cell by cell, and write it down.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the grid, or None.
        preset: What the YAML is laid over, or None.
        axes: The grid; empty for that of the directory, or, if nothing else is asked for, the
            example.

    Returns:
        Its directory and its cells; None where a single run is asked for.

    Raises:
        FedPipeError: What the user can mend; of a grid that is there, other values of keys that
            may not change.
    """
    chosen = any(override.startswith("method.name=") for override in overrides)
    run = RunDir.at(run_dir, "finetune", "finetune grid") if run_dir else None
    if not (config_path or preset or axes or chosen or (run and not run.is_new)):
        axes = EXAMPLE
    saved = read_cells(run.path) if run and run.kind == "finetune grid" else []
    if not (axes or saved):
        return None
    cells = _cells(config_path, overrides, preset, axes) if axes else saved
    if saved and run_dir and not (axes and (config_path or preset)):
        known = {cell.name: cell for cell in saved}
        cells = [
            again(
                known[cell.name], Path(run_dir), config_path=config_path, preset=preset,
                overrides=cell.overrides if axes else overrides,
            )
            if cell.name in known else cell
            for cell in cells
        ]  # fmt: skip
    first = load_finetune(cells[0].config_path, cells[0].overrides, preset=cells[0].preset)
    directory = Path(run_dir or Path("runs") / first.name)
    write_cells(directory, cells)
    return directory, cells


def _cells(
    config_path: str | Node | None,
    overrides: Sequence[str],
    preset: str | None,
    axes: Sequence[str],
) -> list[Cell]:
    """Return the product of a grid."""
    grid = parse_grid(axes)
    check_grid(grid, overrides)
    keys = [key for key, _ in grid]
    return [
        Cell(
            name=_name(keys, values),
            config_path=config_path, preset=preset,
            overrides=[*overrides, *(f"{k}={v}" for k, v in zip(keys, values, strict=True))],
        )
        for values in product(*(values for _, values in grid))
    ]  # fmt: skip


def _grid(directory: Path, cells: Sequence[Cell], console: RunConsole, signals: Signals) -> None:
    """Run the cells of a grid that are not done, one after another."""
    for index, cell in enumerate(cells):
        console.text(f"{time.strftime('%H:%M:%S')} run {index + 1}/{len(cells)}: {cell.name}")
        run, config = resolve("finetune", None, [], str(directory / cell.name))
        _one(run, config, console, signals)


def _name(keys: Sequence[str], values: Sequence[str]) -> str:
    """Name a cell after its values; keys only where a value does not speak for itself."""
    parts = []
    for key, value in zip(keys, values, strict=True):
        short = key.rpartition(".")[2]
        node = parse_override(f"x={value}").value["x"].value
        says = short == "name" and isinstance(node, str)
        parts.append(str(node) if says else f"{short}={value}")
    return "_".join("".join(c if c.isalnum() or c in "._+-=" else "-" for c in p) for p in parts)


def compare_runs(directory: Path, cells: Sequence[Cell]) -> str:
    """Write the report that compares finished runs of a grid; return its table, for people."""
    from fedpipe.commands.finetune.report import result_table, write_comparison

    runs = [directory / cell.name for cell in cells]
    write_comparison(directory, runs)
    return f"{result_table(runs)}\nreport  {directory / 'report.html'}"
