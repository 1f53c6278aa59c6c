"""``fedpipe finetune``: all workers on this machine; one run, or one after another over a grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from fedpipe.config.tree import parse_override
from fedpipe.distributed.topology import Grid
from fedpipe.distributed.watch import EXIT_INTERRUPTED
from fedpipe.errors import ConfigError
from fedpipe.launcher.fork_server import fork_server
from fedpipe.launcher.supervisor import Interrupted, Signals, supervise
from fedpipe.launcher.worker import FINETUNE_PRELOAD
from fedpipe.metrics.console import RunConsole
from fedpipe.workflows.finetune.grid import EXAMPLE, Cell, read_cells, write_cells
from fedpipe.workflows.grid import check_grid, parse_grid
from fedpipe.workflows.run_dir import locked


def finetune(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
    axes: Sequence[str] = (),
) -> int:
    """Fine-tune on this machine, or resume; the whole of ``fedpipe finetune``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None.
        preset: What the YAML is laid over, or None.
        axes: A grid, ``section.key=value,value``; every combination is a run of its own.

    Returns:
        0 when everything is done, 75 when it was interrupted and can be resumed.

    Raises:
        FedPipeError: What the user can mend; nothing has been started.
        LaunchError: A process failed.
    """
    _check_library()
    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0, interactive=False)
    signals = Signals()
    chosen = any(override.startswith("method.name=") for override in overrides)
    if not (config_path or preset or axes or chosen or _is_run(run_dir) or _is_grid(run_dir)):
        axes = EXAMPLE
    try:
        with signals.caught():
            if axes or _is_grid(run_dir):
                run_dir = _grid(config_path, overrides, run_dir, preset, axes, console, signals)
                _show_comparison(Path(run_dir), console)
                return 0
            directory = _one(config_path, overrides, run_dir, preset, console, signals)
    except Interrupted as where:
        console.text(f"interrupted{where}; {_way_back(run_dir)}")
        return EXIT_INTERRUPTED
    _show_result(directory, console)
    return 0


def count_here() -> int:
    """Print what every method trains on every family's base model; return 0."""
    _check_library()
    from fedpipe.workflows.finetune.count import count_rows, count_table

    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0, interactive=False)
    console.text(count_table(count_rows()))
    return 0


def _check_library() -> None:
    """Refuse to start without the library, which pins transformers and so is an extra."""
    if find_spec("adapters") is None:
        raise ConfigError(
            "finetune: expected the adapters library to be installed, got none. Install it: "
            "pip install -e '.[finetune]'."
        )


def _is_run(run_dir: str | None) -> bool:
    return run_dir is not None and (Path(run_dir) / "config.yaml").is_file()


def _is_grid(run_dir: str | None) -> bool:
    return run_dir is not None and (Path(run_dir) / "cells.json").is_file()


def _way_back(run_dir: str | None) -> str:
    if not (_is_run(run_dir) or _is_grid(run_dir)):
        return "give the same command again"
    return f"resume with: fedpipe finetune --run-dir {run_dir}"


def _one(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    preset: str | None,
    console: RunConsole,
    signals: Signals,
) -> Path:
    """Run what is not done of one fine-tuning; return its directory."""
    from fedpipe.config.finetune import load_finetune

    if not _is_run(run_dir):
        load_finetune(config_path, overrides, preset=preset)  # before anything is imported
    fork_server(FINETUNE_PRELOAD)
    from fedpipe.workflows.finetune.setup import is_finetuned, set_up_finetune

    setup = set_up_finetune(config_path, overrides, run_dir, preset=preset, notify=console.text)
    federation = setup.config.federation
    if is_finetuned(setup.run_dir, num_rounds=federation.num_rounds):
        console.text(f"{setup.run_dir} is done: see {setup.run_dir / 'report.html'}")
        return setup.run_dir
    grid = Grid(num_stages=1, num_replicas=federation.num_replicas, data_parallel_degree=1)
    shows: dict[str, Callable[[Any], None]] = {
        "round": lambda record: console.text(_round_line(record, federation.num_rounds)),
        "eval": lambda record: console.text(_score_line(record, federation.num_rounds)),
        "note": console.text,
    }
    with locked(setup.run_dir):
        supervise("finetune", setup, grid=grid, shows=shows, signals=signals)
    return setup.run_dir


def _grid(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    preset: str | None,
    axes: Sequence[str],
    console: RunConsole,
    signals: Signals,
) -> str:
    """Run the cells of a grid that are not done, one after another; return its directory."""
    from fedpipe.config.finetune import load_finetune

    if _is_grid(run_dir) and not axes:
        assert run_dir is not None
        directory, cells = Path(run_dir), read_cells(Path(run_dir))
    else:
        grid = parse_grid(axes)
        check_grid(grid, overrides)
        keys = [key for key, _ in grid]
        combinations = product(*(values for _, values in grid))
        cells = [
            Cell(
                name=_name(keys, values),
                config_path=config_path, preset=preset,
                overrides=[*overrides, *(f"{k}={v}" for k, v in zip(keys, values, strict=True))],
            )
            for values in combinations
        ]  # fmt: skip
        configs = [load_finetune(c.config_path, c.overrides, preset=c.preset) for c in cells]
        directory = Path(run_dir or Path("runs") / configs[0].name)
        write_cells(directory, cells)
    for index, cell in enumerate(cells):
        console.text(f"{time.strftime('%H:%M:%S')} run {index + 1}/{len(cells)}: {cell.name}")
        path = directory / cell.name
        arguments = (None, []) if _is_run(str(path)) else (cell.config_path, cell.overrides)
        preset = None if _is_run(str(path)) else cell.preset
        _one(*arguments, str(path), preset, console, signals)
    return str(directory)


def _name(keys: Sequence[str], values: Sequence[str]) -> str:
    """Name a cell after its values; keys only where a value does not speak for itself."""
    parts = []
    for key, value in zip(keys, values, strict=True):
        short = key.rpartition(".")[2]
        node = parse_override(f"x={value}").value["x"].value
        says = short == "name" and isinstance(node, str)
        parts.append(str(node) if says else f"{short}={value}")
    return "_".join("".join(c if c.isalnum() or c in "._+-=" else "-" for c in p) for p in parts)


def _round_line(record: dict[str, Any], num_rounds: int) -> str:
    lost = f", {len(record['dropped'])} lost" if record["dropped"] else ""
    slow = f", {len(record['stragglers'])} slow" if record["stragglers"] else ""
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
    return (
        f"{time.strftime('%H:%M:%S')} round {record['round'] + 1:>{len(str(num_rounds))}}"
        f"/{num_rounds} trained {len(record['clients'])} clients{slow}{lost},"
        f" {record['examples']:,} examples in {record['seconds']:.1f} s"
        f" (sync {record['sync_s']:.2f} s)  loss {loss}"
    )


def _score_line(record: dict[str, Any], num_rounds: int) -> str:
    worst = "-" if record["worst"] is None else f"{record['worst']:.4f}"
    return (
        f"{time.strftime('%H:%M:%S')} round {record['round'] + 1:>{len(str(num_rounds))}}"
        f"/{num_rounds} {record['metric']} {record['score']:.4f}  worst client {worst}"
        f" (client {record['worst_client']})"
    )


def _show_result(directory: Path, console: RunConsole) -> None:
    from fedpipe.metrics.finetune_report import result_table

    console.text(result_table([directory]))
    for name in ("adapter", "base", "export"):
        if (directory / name).is_dir():
            console.text(f"{name:<8}{directory / name}")
    console.text(f"report  {directory / 'report.html'}")


def _show_comparison(directory: Path, console: RunConsole) -> None:
    from fedpipe.metrics.finetune_report import result_table, write_comparison

    runs = [directory / cell.name for cell in read_cells(directory)]
    write_comparison(directory, runs)
    console.text(result_table(runs))
    console.text(f"report  {directory / 'report.html'}")
