"""``fedpipe throughput``: measure schedules with the processes of one replica on this machine."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.cluster.rank import JobRun, RunRequest
from fedpipe.commands import options
from fedpipe.commands.pretrain.command import pipeline_run
from fedpipe.commands.study.pool import run_study
from fedpipe.commands.study.study import (
    Cell,
    Study,
    check_grid,
    make_cells,
    parse_grid,
    prepare_texts,
)
from fedpipe.commands.study.sweep import check_cell
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
from fedpipe.config.tree import Node
from fedpipe.data.corpus import Progress, prepare
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.report.console import RunConsole
from fedpipe.report.document import aligned
from fedpipe.report.format import count
from fedpipe.run.run_dir import RunDir, RunSetup, describe_environment, locked, resolve


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe throughput``."""
    add_job_arguments(command)
    options.add_launcher(command)
    options.add_grid(
        command,
        text="measure every combination of the values, one after the other, and compare them:"
        " pipeline.cut=[1],[2] pipeline.micro_batch_size=8,16",
    )


def add_job_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe submit throughput``."""
    options.add_run(command)
    command.add_argument(
        "--repetitions",
        metavar="N",
        type=options.whole_number,
        default=6,
        help="measurements of every schedule; default: 6",
    )
    command.add_argument(
        "--steps",
        metavar="N",
        type=options.whole_number,
        default=6,
        help="local steps per measurement; default: 6",
    )
    command.add_argument(
        "--emulate-ms",
        metavar="MS",
        type=float,
        default=0.0,
        help="instead of computing, sleep this long in the forward pass of a layer, and twice as"
        " long in its backward pass",
    )


def _request_of(args: argparse.Namespace) -> RunRequest:
    return options.request_of(args, options=Measuring(settings=settings_of(args)))


def settings_of(args: argparse.Namespace) -> ThroughputSettings:
    """Return the settings of the measurement from the arguments."""
    return ThroughputSettings(
        repetitions=args.repetitions, num_steps=args.steps, emulate_ms=args.emulate_ms
    )


def run(args: argparse.Namespace) -> int:
    """Measure as the arguments say, or run one rank if a launcher started this process."""
    if options.is_launched(args):
        from fedpipe.cluster.launched import start_rank

        return start_rank(ranks.PROGRAM, _request_of(args))
    return throughput(
        args.config,
        args.overrides,
        args.run_dir,
        preset=args.preset,
        grid_keys=args.grid,
        settings=settings_of(args),
    )


def to_submit(args: argparse.Namespace) -> JobRun:
    """Check the measurement of the arguments, and return it as a job; every job starts anew."""
    return replace(pipeline_run(ranks.PROGRAM, _request_of(args)), done=lambda: "")


def throughput(
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
    grid_keys: Sequence[str] = (),
    settings: ThroughputSettings,
) -> int:
    """Measure every schedule on this machine. This is all that ``fedpipe throughput`` does.

    Args:
        config_path: Path of a YAML file, or None.
        overrides: Values ``section.key=value``, which win over the file.
        run_dir: Directory of the run, or None; the report goes to ``throughput/`` in it.
        preset: Name of a packaged configuration that the YAML file overrides, or None.
        grid_keys: A grid, ``section.key=value,value``, whose points are measured one after the
            other.
        settings: Settings of the measurement.

    Returns:
        0 when the report is written, 75 when the measurement was interrupted.

    Raises:
        FedPipeError: The user can correct the cause; nothing has been started.
        LaunchError: A process failed.
    """
    if grid_keys:
        return run_study(
            lambda console: _points(
                config_path,
                overrides,
                grid_keys,
                run_dir,
                preset=preset,
                settings=settings,
                console=console,
            ),
        )
    console = RunConsole()
    signals = Signals()
    try:
        with signals.caught():
            run, config = resolve("pretrain", config_path, overrides, run_dir, preset=preset)
            found = ranks.PROGRAM.located_run(run, config)
            setup = set_up_here(ranks.PROGRAM, found, console=console)
            console.close()
            with locked(setup.run_dir):
                supervise(ranks.PROGRAM, setup, Measuring(settings=settings), signals=signals)
    except Interrupted:
        console.text("interrupted; nothing was written")
        return EXIT_INTERRUPTED
    finally:
        console.close()
    for line in ranks.PROGRAM.closing(setup.run_dir):
        console.text(line)
    return 0


@dataclass(frozen=True, kw_only=True)
class Points(Study[Cell[RunConfig]]):
    """The points of a grid, which are measured one after the other on the same machine."""

    task = "throughput"
    in_foreground = True
    directory: Path
    """Directory of the run, with the reports of the points in folders below it."""
    setup: RunSetup
    """Setup of the first point."""
    cells: tuple[Cell[RunConfig], ...]
    grid_keys: Sequence[str]
    settings: ThroughputSettings
    measured: list[Point] = field(default_factory=list)
    """Points that are done; a measurement is not resumed."""

    @property
    def page(self) -> Path:
        """The report over all points."""
        return self.directory / FOLDER / "report.html"

    def pending(self) -> list[Cell[RunConfig]]:
        """Points that this command has not measured yet."""
        done = [cell for cell, _ in self.measured]
        return [cell for cell in self.cells if cell not in done]

    def prepare(
        self, cells: Sequence[Cell[RunConfig]], *, progress: Progress | None = None
    ) -> None:
        """Prepare the text of the points."""
        prepare_texts(cells, progress=progress)

    def run(self, cell: Cell[RunConfig], *, console: RunConsole, signals: Signals) -> None:
        """Measure a point, and write its report and the one over all points so far."""
        own = replace(self.setup, config=cell.config, data_dir=prepare(cell.config).directory)
        how = Measuring(
            settings=self.settings, folder=f"{FOLDER}/{cell.name}", overrides=cell.overrides
        )
        supervise(ranks.PROGRAM, own, how, signals=signals)
        self.measured.append((cell, read_report(self.directory / how.folder)))
        environment = describe_environment()
        end = ["--grid", *self.grid_keys]
        environment["repeat"] = repeating_command(self.setup, self.settings, end=end)
        write_documents(
            self.page.parent,
            f"fedpipe throughput: {self.setup.config.name}",
            points_blocks(self.measured, environment, num_points=len(self.cells)),
            content=content(self.measured, environment),
        )

    def write_tables(self) -> str:
        """Return the table over all points, and its summary in one sentence."""
        if not self.measured:
            return "no point was measured"
        headline = points_headline(self.measured).replace("`", "")
        return "\n".join(["", *aligned(points_table(self.measured)), "", headline])

    def outcome(self, cell: Cell[RunConfig]) -> str:
        """Return an empty text, because the table has the results."""
        return ""

    def start_message(self, cell: Cell[RunConfig], number: int) -> str:
        """Return the line that names the values of a point."""
        return f"point   {number}/{len(self.cells)}  {' '.join(cell.overrides)}"

    def resume_command(self, *, parallel: int = 1) -> str:
        """Return the command that measures all points again."""
        words = [
            "fedpipe",
            "throughput",
            "--run-dir",
            str(self.directory),
            "--grid",
            *self.grid_keys,
        ]
        return shlex.join(words)

    def interruption_message(self, *, parallel: int = 1) -> str:
        """Return the line with the number of finished points."""
        num, points = len(self.measured), count(len(self.cells), "point")
        done = f"{num} of {points}" if num else "nothing"
        return f"interrupted; {done} {'were' if num > 1 else 'was'} written"


def _points(
    config_path: str | Node | None,
    overrides: Sequence[str],
    grid_keys: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None,
    settings: ThroughputSettings,
    console: RunConsole,
) -> Points:
    """Check every point of a grid, and set the first one up."""
    asked = parse_grid(grid_keys)
    check_grid(asked, overrides)
    run = RunDir.at(run_dir, "pretrain") if run_dir else None
    own_file = run and run.saved and not (config_path or preset)
    source = None if own_file else load.run_tree(config_path, preset=preset)

    def configure(own: Sequence[str]) -> RunConfig:
        _, config = resolve("pretrain", source, [*overrides, *own], run)
        single_replica(config)
        check_cell(config)
        return config

    cells = make_cells(asked, Path(FOLDER), configure, kind="pretrain")
    first = resolve("pretrain", source, [*overrides, *cells[0].overrides], run)
    setup = set_up_here(ranks.PROGRAM, ranks.PROGRAM.located_run(*first), console=console)
    return Points(
        directory=setup.run_dir, setup=setup, cells=cells, grid_keys=grid_keys, settings=settings
    )
