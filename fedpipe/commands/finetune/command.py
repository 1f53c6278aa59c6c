"""``fedpipe finetune``: one fine-tuning on this machine, or all fine-tunings of a grid."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from fedpipe.cluster.launched import note_attempt, position_of
from fedpipe.cluster.local import set_up_here, supervise
from fedpipe.cluster.rank import JobRun
from fedpipe.commands import options
from fedpipe.commands.finetune import ranks
from fedpipe.commands.study.pool import CommandProcess, run_study
from fedpipe.commands.study.study import (
    ONE_TASK,
    Cell,
    Runs,
    Slot,
    Study,
    set_up_grid,
)
from fedpipe.config.finetune import FinetuneConfig, finetune_presets, finetune_tree, load_finetune
from fedpipe.config.tree import Node
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.errors import ConfigError
from fedpipe.report.console import RunConsole
from fedpipe.report.sinks import check_sinks
from fedpipe.run.checkpoint import find_latest
from fedpipe.run.run_dir import RunDir, locked, resolve, resume_hint

_EXAMPLE = ("method.name=lora,full",)
"""Grid that is compared if the user gives no arguments."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe finetune``."""
    add_job_arguments(command)
    text = "count the trained parameters of every method and family; start nothing"
    command.add_argument("--count", action="store_true", help=text)
    options.add_launcher(command)


def add_job_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe submit finetune``."""
    options.add_run(command, presets=f"a published study: {', '.join(finetune_presets())}")
    options.add_task_files(command)
    options.add_grid(
        command,
        text="run every combination of the values, and compare them:"
        " method.name=lora,full seed=0,1",
    )
    options.add_parallel(command)


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the arguments say, run one rank of a launcher, or count parameters."""
    if args.count:
        return count_here()
    _add_task_file(args)
    if options.is_launched(args):
        from fedpipe.cluster.launched import start_rank

        check_library()
        return start_rank(ranks.PROGRAM, options.request_of(args))
    return finetune(
        args.config,
        args.overrides,
        args.run_dir,
        preset=args.preset,
        grid_keys=args.grid,
        parallel=args.parallel,
    )


def _add_task_file(args: argparse.Namespace) -> None:
    """Turn ``--task-file`` into an override.

    Raises:
        ConfigError: There are several.
    """
    if len(args.task_file) > 1:
        raise ConfigError(
            f"--task-file: expected one file with finetune, got {', '.join(args.task_file)}. Remove"
            " one, or run --grid task.file=A,B."
        )
    own = (f"task.file={json.dumps(path)}" for path in args.task_file)
    args.overrides = [*args.overrides, *own]


def to_submit(args: argparse.Namespace) -> JobRun | TuningGrid:
    """Check the fine-tuning of the arguments, or a grid of them, and return it for submission."""
    _add_task_file(args)
    check_library()
    path, overrides, run_dir = args.config, args.overrides, args.run_dir
    grid = find_grid(path, overrides, args.grid, run_dir, preset=args.preset)
    if grid is not None:
        return grid
    found = ranks.PROGRAM.locate(options.request_of(args))
    run, num_rounds = found.run, found.config.federation.num_rounds
    _check_tuning(run, found.config)

    def write() -> str:
        lines: list[str] = []
        ranks.PROGRAM.set_up(found, notify=lines.append)
        return "\n".join(lines)

    return JobRun(
        run_dir=run.path,
        name=found.config.name,
        grid=ONE_TASK,
        workers=found.grid.world_size,
        done=lambda: _done_line(run.path) if run.is_done(num_rounds=num_rounds) else "",
        job=TuningGrid.job,
        reserve=write,
        view=partial(ranks.view, num_rounds=num_rounds),
        closing=partial(ranks.PROGRAM.closing, run.path),
    )


def finetune(
    config_path: str | Node | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
    grid_keys: Sequence[str] = (),
    parallel: int = 1,
    signals: Signals | None = None,
) -> int:
    """Fine-tune on this machine, or resume a run. This is all that ``fedpipe finetune`` does.

    Args:
        config_path: Path of a YAML file, or None.
        overrides: Values ``section.key=value``, which win over the file.
        run_dir: Directory of the run, or None for the default one.
        preset: Name of a packaged configuration that the YAML file overrides, or None.
        grid_keys: A grid, ``section.key=value,value``; every combination is a run.
        parallel: Number of runs of a grid at a time; they share the cores.
        signals: Signals to catch meanwhile; a caller passes its own to learn which one came.

    Returns:
        0 when everything is done, 75 when it was interrupted and can be resumed.

    Raises:
        FedPipeError: The user can correct the cause; nothing has been started.
        LaunchError: A process failed.
    """
    check_library()
    console = RunConsole(interactive=False)
    signals = signals or Signals()
    grid = find_grid(config_path, overrides, grid_keys, run_dir, preset=preset)
    if grid is not None:
        for cell in grid.cells:
            if cell.is_done:
                console.text(_done_line(cell.run_dir))
        return run_study(lambda console: grid, parallel=parallel, signals=signals)
    if parallel != 1:
        raise ConfigError(f"--parallel: expected 1 without --grid, got {parallel}. Leave it out.")
    run: RunDir | None = None
    try:
        with signals.caught():
            run, config = resolve("finetune", config_path, overrides, run_dir, preset=preset)
            _tune(run, config, console, signals)
    except Interrupted as where:
        console.text(f"interrupted{where}; {resume_hint('finetune', run)}")
        return EXIT_INTERRUPTED
    for line in ranks.PROGRAM.closing(run.path):
        console.text(line)
    return 0


def go_on(run_dir: str, *, job_id: str, signals: Signals) -> int:
    """Start or resume a run in a job of one task; see ``finetune``."""
    note_attempt(Path(run_dir), position_of(find_latest(Path(run_dir))[0]), job_id=job_id)
    return finetune(None, [], run_dir, signals=signals)


def count_here() -> int:
    """Print the trained parameters of every method on the base model of every family; return 0."""
    check_library()
    from fedpipe.commands.finetune.count import count_rows, count_table

    RunConsole(interactive=False).text(count_table(count_rows()))
    return 0


def check_library() -> None:
    """Refuse to start without the adapters library, or with a transformers that it cannot use.

    It is an extra of fedpipe, because it pins the version of transformers.

    Raises:
        ConfigError: The library is not installed, or needs another version of transformers.
    """
    from packaging.requirements import Requirement

    try:
        needs = [Requirement(line) for line in metadata.requires("adapters") or ()]
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "finetune: expected the adapters library to be installed, got none. Install it: "
            "pip install -e '.[finetune]'."
        ) from None
    found = metadata.version("transformers")
    wanted = next(need.specifier for need in needs if need.name == "transformers")
    if found not in wanted:
        raise ConfigError(
            f"finetune: expected transformers {wanted}, which the adapters library needs, got"
            f" {found}. Install both in an environment of their own: pip install -e '.[finetune]'."
        )


def _done_line(run_dir: Path) -> str:
    return f"{run_dir} is done: see {run_dir / 'report.html'}"


def _tune(run: RunDir, config: FinetuneConfig, console: RunConsole, signals: Signals) -> None:
    """Run the remaining rounds of a fine-tuning."""
    if run.is_done(num_rounds=config.federation.num_rounds):
        _check_tuning(run, config)
        console.text(_done_line(run.path))
        return
    setup = set_up_here(ranks.PROGRAM, ranks.PROGRAM.located_run(run, config), console=console)
    with locked(setup.run_dir):
        supervise(ranks.PROGRAM, setup, signals=signals)


# -- a grid ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TuningGrid(Study[Cell[FinetuneConfig]]):
    """The fine-tunings of a grid."""

    task = "finetune"
    job = f"{__name__}:go_on"
    in_foreground = True
    directory: Path
    cells: tuple[Cell[FinetuneConfig], ...]

    @property
    def page(self) -> Path:
        """Path of the report of the grid."""
        return self.directory / "report.html"

    def reserve(self, cells: Sequence[Cell[Any]]) -> None:
        """Set the runs up, so that their errors are found before a job is submitted."""
        for cell in cells:
            found = ranks.PROGRAM.located_run(cell.run, cell.config)
            ranks.PROGRAM.set_up(found, notify=lambda line: None)

    def run(self, cell: Cell[FinetuneConfig], *, console: RunConsole, signals: Signals) -> None:
        """Run a fine-tuning in this process, and show its rounds."""
        _tune(cell.run, cell.config, console, signals)

    def start(self, cell: Cell[FinetuneConfig], slot: Slot, log: Path) -> CommandProcess:
        """Start the fine-tuning of a cell."""
        return CommandProcess("finetune", cell.run_dir, log)

    def write_tables(self) -> str:
        """Write the report that compares the finished runs, and return its table."""
        from fedpipe.commands.finetune.report import result_table, write_comparison

        runs = [cell.run_dir for cell in self.cells if cell.is_done]
        if not runs:
            return "no run is done yet"
        write_comparison(self.directory, runs)
        return result_table(runs)

    def outcome(self, cell: Cell[FinetuneConfig]) -> str:
        """Return a text with the score of a finished run."""
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
    """Find the grid that the user asks for, check every cell, and write the grid.

    A grid that exists already is resumed. Only the keys that may change in a resumed run may have
    other values, and the files that the runs read must have the same content as before.

    Args:
        config_path: Path of a YAML file, or None.
        overrides: Values ``section.key=value``, which win over the file.
        grid_keys: See ``parse_grid``; nothing for those of the grid in the directory, or, if
            nothing else is asked for, of the example.
        run_dir: Directory of the grid, or None for the default one.
        preset: Name of a packaged configuration that the YAML file overrides, or None.

    Returns:
        The grid; None if the user asks for a single run.

    Raises:
        FedPipeError: The user can correct the cause, such as another value of a key that may not
            change in a resumed run.
    """
    chosen = any(override.startswith("method.name=") for override in overrides)
    found = RunDir.at(run_dir, "finetune", "finetune grid") if run_dir else None
    if not (config_path or preset or grid_keys or chosen or (found and not found.is_new)):
        grid_keys = _EXAMPLE
    if not grid_keys and (found is None or found.kind == "finetune"):
        return None
    run, _, cells = set_up_grid(_RUNS, config_path, overrides, grid_keys, run_dir, preset=preset)
    return TuningGrid(directory=run.path, cells=cells)


def _check_tuning(run: RunDir, config: FinetuneConfig) -> None:
    """Refuse to go on with other examples, another base model, adapter or DeepSpeed JSON.

    Raises:
        FedPipeError: The content differs, or cannot be read.
    """
    if not run.has_begun:  # what follows imports torch
        return
    from fedpipe.commands.finetune.setup import deepspeed_of, tuning_inputs

    run.check_content(deepspeed_of(config), partial(tuning_inputs, config))


def _load_cell(base: Node, overrides: Sequence[str]) -> FinetuneConfig:
    """Load the configuration of a cell, and check what needs no torch.

    Raises:
        FedPipeError: The configuration cannot work.
    """
    config = load_finetune(base, overrides)
    check_sinks(config.log.to)
    return config


_RUNS = Runs(
    kind="finetune",
    study_kind="finetune grid",
    title="the fine-tunings",
    home=".",
    read_tree=finetune_tree,
    read=load_finetune,
    load=_load_cell,
    check_content=_check_tuning,
)
"""How the runs of a grid are read and checked."""
