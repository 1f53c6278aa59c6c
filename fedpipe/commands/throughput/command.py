"""``fedpipe throughput``: one replica's processes to measure schedules on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.cluster.rank import RunRequest
from fedpipe.commands import options
from fedpipe.commands.study.axes import check_grid, parse_grid
from fedpipe.commands.study.sweep import (
    Cell,
    check_distinct,
    make_cells,
    prepare_texts,
)
from fedpipe.commands.throughput import ranks
from fedpipe.commands.throughput.files import write_documents
from fedpipe.commands.throughput.points import (
    Point,
    content,
    points_blocks,
    points_headline,
    points_table,
)
from fedpipe.commands.throughput.ranks import FOLDER, Measuring, read_report, repeating_command
from fedpipe.commands.throughput.report import (
    ThroughputSettings,
    single_replica,
)
from fedpipe.config import load
from fedpipe.config.schema import RunConfig
from fedpipe.data.corpus import prepare
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.report.console import RunConsole
from fedpipe.report.document import aligned
from fedpipe.report.format import count
from fedpipe.run.run_dir import RunDir, RunSetup, describe_environment, locked, resolve


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe throughput``."""
    options.add_run(command)
    options.add_launcher(command)
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
    """Measure what the arguments say, or be one rank of that."""
    if options.is_launched(args):
        from fedpipe.cluster.launched import start_rank

        how = Measuring(settings=settings_of(args))
        return start_rank(ranks.PROGRAM, options.request_of(args, options=how))
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
            request = RunRequest(
                config_path=config_path, overrides=[*overrides, *first], run_dir=run_dir,
                preset=preset,
            )  # fmt: skip
            setup = set_up_here(ranks.PROGRAM, ranks.PROGRAM.locate(request), console=console)
            console.close()
            with locked(setup.run_dir):
                if cells:
                    _measure_points(setup, cells, axes, points, settings, console, signals)
                else:
                    how = Measuring(settings=settings)
                    supervise(ranks.PROGRAM, setup, how, signals=signals)
    except Interrupted:
        done = f"{len(points)} of {count(len(cells), 'point')}" if points else "nothing"
        console.text(f"interrupted; {done} {'were' if len(points) > 1 else 'was'} written")
        return EXIT_INTERRUPTED
    finally:
        console.close()
    if not cells:
        for line in ranks.PROGRAM.closing(setup.run_dir):
            console.text(line)
    return 0


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
    run = RunDir.at(run_dir, "pretrain") if run_dir else None
    own_file = run and run.saved and not (config_path or preset)
    source = None if own_file else load.run_tree(config_path, preset=preset)

    def configure(own: Sequence[str]) -> RunConfig:
        _, config = resolve("pretrain", source, [*overrides, *own], run)
        single_replica(config)
        return config

    cells = make_cells(grid, Path(FOLDER), configure)
    check_distinct(cells)
    return cells


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
        place = f"{FOLDER}/{cell.name}"
        how = Measuring(settings=settings, folder=place, overrides=tuple(cell.overrides))
        supervise(ranks.PROGRAM, own, how, signals=signals)
        report = read_report(folder / cell.name)
        points.append(Point(name=cell.name, overrides=cell.overrides, report=report))
        environment = describe_environment()
        environment["repeat"] = repeating_command(setup, settings, end=["--grid", *axes])
        write_documents(
            folder,
            f"fedpipe throughput: {setup.config.name}",
            points_blocks(points, environment, num_points=len(cells)),
            content=content(points, environment),
        )
    lines = ["", *aligned(points_table(points)), "", points_headline(points).replace("`", "")]
    console.text("\n".join(lines))
    console.text(f"report  {folder / 'report.html'}")
