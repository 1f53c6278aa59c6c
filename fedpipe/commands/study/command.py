"""``fedpipe sweep``: cells of a grid on this machine, each in a ``fedpipe pretrain`` of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedpipe.commands import options
from fedpipe.commands.study.pool import (
    CellRunner,
    again,
    check_all_done,
    interrupted,
    save_when_the_parent_dies,
)
from fedpipe.commands.study.report import read_result
from fedpipe.commands.study.sweep import Cell, Sweep, gather, prepare_texts, set_up_sweep
from fedpipe.distributed.signals import EXIT_INTERRUPTED, Interrupted, Signals
from fedpipe.errors import ConfigError, FedPipeError
from fedpipe.report.console import RunConsole
from fedpipe.report.format import count, number
from fedpipe.run.run_dir import locked


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedpipe sweep``."""
    options.add_run(command)
    options.add_grid(
        command,
        text="every combination of the values is a run: pipeline.cut=[2],[4] seed=0,1,2; default:"
        " that of the sweep in DIR",
    )
    options.add_parallel(command)


def run(args: argparse.Namespace) -> int:
    """Run the sweep that the arguments say."""
    return sweep(
        args.config,
        args.overrides,
        args.grid,
        args.run_dir,
        preset=args.preset,
        parallel=args.parallel,
    )


def sweep(
    config_path: str | None,
    overrides: Sequence[str],
    axes: Sequence[str],
    run_dir: str | None,
    *,
    preset: str | None = None,
    parallel: int = 1,
) -> int:
    """Run what is not done of a sweep on this machine; the whole of ``fedpipe sweep``.

    Args:
        config_path: YAML, or None.
        overrides: ``section.key=value``.
        axes: The grid, ``section.key=value,value``.
        run_dir: Directory of the sweep, or None.
        preset: What the YAML is laid over, or None.
        parallel: Cells at a time; they share the cores.

    Returns:
        0 when all cells are done, 75 when the sweep was interrupted and can be resumed.

    Raises:
        FedPipeError: What the user can mend; nothing has been started.
        LaunchError: A cell failed; the others are done.
    """
    if parallel < 1:
        raise ConfigError(f"--parallel: expected 1 or more, got {parallel}. 1 is usual.")
    console = RunConsole(num_rounds=0, steps_per_round=0, num_stages=0)
    signals = Signals()
    plan: Sweep | None = None
    try:
        with signals.caught():
            plan = set_up_sweep(config_path, overrides, axes, run_dir, preset=preset)
            pending = plan.pending()
            refused: dict[str, FedPipeError] = {}
            if pending:
                with locked(plan.directory):
                    prepare_texts(pending, progress=console.preparing)
                    console.close()
                    runner = _runner(plan, pending, parallel=parallel, console=console)
                    refused = runner.run(signals)
    except Interrupted:
        command = again("sweep", plan.directory, parallel=parallel) if plan else ""
        console.text(interrupted(plan, command))
        return EXIT_INTERRUPTED
    finally:
        console.close()
    console.text(gather(plan))
    command = again("sweep", plan.directory, parallel=parallel)
    check_all_done("sweep", plan, way_out=f"Run them again with: {command}", refused=refused)
    nothing = "" if pending else "nothing to do: "
    console.text(f"{nothing}all {count(len(plan.cells), 'cell')} of {plan.directory} are done")
    console.text(f"report  {plan.directory / 'sweep.md'}")
    return 0


class _Process:
    """A cell, started as a user would start it."""

    def __init__(self, cell: Cell, log: Path) -> None:
        """Start it, in a session of its own."""
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedpipe", "pretrain", "--run-dir", str(cell.run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=save_when_the_parent_dies,
            )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for its end; False if that has not come."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def _runner(
    plan: Sweep, pending: Sequence[Cell], *, parallel: int, console: RunConsole
) -> CellRunner:
    cells = {cell.name: cell for cell in plan.cells}
    return CellRunner(
        plan.cells,
        pending,
        parallel=parallel,
        logs=plan.directory / "logs",
        start=lambda name, slot, log: _Process(cells[name], log),
        gather=lambda: gather(plan),
        outcome=lambda name: f"loss {number(read_result(cells[name].run_dir).loss, 3)}",
        console=console,
    )
