"""``fedpipe throughput``: one replica's processes to measure schedules on this machine."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpipe.cluster.supervisor import set_up_here, supervise
from fedpipe.commands import options
from fedpipe.commands.study.axes import check_grid, parse_grid
from fedpipe.commands.study.sweep import (
    Cell,
    check_distinct,
    make_cells,
    prepare_texts,
)
from fedpipe.commands.throughput.files import write_documents, write_files
from fedpipe.commands.throughput.page import Report, terminal_text
from fedpipe.commands.throughput.points import (
    Point,
    content,
    points_blocks,
    points_headline,
    points_table,
)
from fedpipe.commands.throughput.report import (
    Measurement,
    ThroughputSettings,
    single_replica,
    summarise,
)
from fedpipe.config.schema import RunConfig
from fedpipe.data.corpus import prepare
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.distributed.topology import Grid
from fedpipe.report.console import RunConsole
from fedpipe.report.document import aligned
from fedpipe.report.format import count
from fedpipe.run.run_dir import RunSetup, describe_environment, locked, resolve_config

FOLDER = "throughput"
"""Of the reports, in the run directory."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe throughput``."""
    options.add_run(command)
    add_settings(command)
    options.add_grid(
        command,
        text="measure every combination of the values, one after the other, and compare them:"
        " pipeline.cut=[1],[2] pipeline.micro_batch_size=8,16",
    )


def add_settings(command: argparse.ArgumentParser) -> None:
    """Declare how to measure."""
    command.add_argument(
        "--repetitions", metavar="N", type=int, default=6, help="windows per schedule; default: 6"
    )
    command.add_argument(
        "--steps", metavar="N", type=int, default=6, help="local steps per window; default: 6"
    )
    command.add_argument(
        "--emulate-ms",
        metavar="MS",
        type=float,
        default=0.0,
        help="a layer's forward sleeps this long instead of computing (backward twice that)",
    )


def settings_of(args: argparse.Namespace) -> ThroughputSettings:
    """Return how to measure, as the arguments say."""
    return ThroughputSettings(
        repetitions=args.repetitions, num_steps=args.steps, emulate_ms=args.emulate_ms
    )


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments say."""
    if not args.grid:
        options.checked_config(args)
    return throughput(
        args.config,
        args.overrides,
        args.run_dir,
        preset=args.preset,
        axes=args.grid,
        settings=settings_of(args),
    )


def throughput(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
    axes: Sequence[str] = (),
    settings: ThroughputSettings,
) -> int:
    """Measure every schedule on this machine; the whole of ``fedpipe throughput``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        run_dir: Directory of the run, or None; the report goes to ``throughput/`` in it.
        preset: What the YAML is laid over, or None.
        axes: A grid, ``section.key=value,value``, whose points are measured one after the other.
        settings: How long to measure, and on what.

    Returns:
        0 when the report is written, 75 when the measurement was interrupted.

    Raises:
        FedPipeError: What the user can mend; nothing has been started.
        LaunchError: A process failed.
    """
    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0)
    signals = Signals()
    points: list[Point] = []
    try:
        with signals.caught():
            cells = _cells(config_path, overrides, run_dir, axes, preset=preset)
            first = cells[0].overrides if cells else ()
            setup = set_up_here(
                config_path, [*overrides, *first], run_dir, preset=preset, console=console
            )
            with locked(setup.run_dir):
                if cells:
                    _measure_points(setup, cells, axes, points, settings, console, signals)
                else:
                    measurement = _measure(setup, settings, console=console, signals=signals)
    except Interrupted:
        done = f"{len(points)} of {count(len(cells), 'point')}" if points else "nothing"
        console.text(f"interrupted; {done} {'were' if len(points) > 1 else 'was'} written")
        return EXIT_INTERRUPTED
    finally:
        console.close()
    if not cells:
        conclude(setup, measurement, settings, console=console)
    return 0


def conclude(
    setup: RunSetup, measurement: Measurement, settings: ThroughputSettings, *, console: RunConsole
) -> None:
    """Write the files of a measurement and show its table.

    Args:
        setup: The run.
        measurement: What rank 0 has collected.
        settings: How it was measured.
        console: Shows the table.
    """
    folder = setup.run_dir / FOLDER
    report = _write(setup, measurement, settings, folder=folder)
    console.text(terminal_text(report))
    console.text(f"report  {folder / 'report.html'}")


def _cells(
    config_path: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    axes: Sequence[str],
    *,
    preset: str | None,
) -> tuple[Cell, ...]:
    """Check every point of a grid; empty without one."""
    if not axes:
        return ()
    grid = parse_grid(axes)
    check_grid(grid, overrides)

    def configure(own: Sequence[str]) -> RunConfig:
        config, _, _ = resolve_config(config_path, [*overrides, *own], run_dir, preset=preset)
        single_replica(config)
        return config

    cells = make_cells(grid, Path(FOLDER), configure)
    check_distinct(cells)
    return cells


def _measure(
    setup: RunSetup, settings: ThroughputSettings, *, console: RunConsole, signals: Signals
) -> Measurement:
    measurements: list[Measurement] = []
    supervise(
        "throughput",
        setup,
        settings,
        grid=Grid.from_config(single_replica(setup.config)),
        shows={"note": console.text, "measurement": measurements.append},
        signals=signals,
    )
    return measurements[0]


def _measure_points(
    setup: RunSetup,
    cells: Sequence[Cell],
    axes: Sequence[str],
    points: list[Point],
    settings: ThroughputSettings,
    console: RunConsole,
    signals: Signals,
) -> None:
    """Measure one point after the other; what is done is on disk, whatever happens to the next."""
    folder = setup.run_dir / FOLDER
    prepare_texts(cells, progress=console.preparing)
    for index, cell in enumerate(cells):
        console.text(f"point   {index + 1}/{len(cells)}  {' '.join(cell.overrides)}")
        own = replace(setup, config=cell.config, data_dir=prepare(cell.config).directory)
        measurement = _measure(own, settings, console=console, signals=signals)
        report = _write(
            own, measurement, settings, folder=folder / cell.name, overrides=cell.overrides
        )
        points.append(Point(name=cell.name, overrides=cell.overrides, report=report))
        environment = describe_environment()
        environment["repeat"] = _command(setup, settings, end=["--grid", *axes])
        write_documents(
            folder,
            f"fedpipe throughput: {setup.config.name}",
            points_blocks(points, environment, num_points=len(cells)),
            content=content(points, environment),
        )
    lines = ["", *aligned(points_table(points)), "", points_headline(points).replace("`", "")]
    console.text("\n".join(lines))
    console.text(f"report  {folder / 'report.html'}")


def _write(
    setup: RunSetup,
    measurement: Measurement,
    settings: ThroughputSettings,
    *,
    folder: Path,
    overrides: Sequence[str] = (),
) -> Report:
    config = single_replica(setup.config)
    environment: dict[str, Any] = describe_environment() | {
        "emulate_ms": settings.emulate_ms,
        "repetitions": settings.repetitions,
        "num_steps": settings.num_steps,
        "repeat": _command(setup, settings, end=overrides),
    }
    report = summarise(measurement, config, environment=environment)
    write_files(folder, report, measurement, config=config)
    return report


def _command(setup: RunSetup, settings: ThroughputSettings, *, end: Sequence[str]) -> str:
    """What repeats a measurement with the configuration that it left behind."""
    words = [
        "fedpipe", "throughput", "--config", str(setup.run_dir / "config.yaml"),
        "--run-dir", f"{setup.run_dir}-again", "--repetitions", str(settings.repetitions),
        "--steps", str(settings.num_steps),
    ]  # fmt: skip
    if settings.emulate_ms:
        words += ["--emulate-ms", f"{settings.emulate_ms:g}"]
    return shlex.join([*words, *end])
