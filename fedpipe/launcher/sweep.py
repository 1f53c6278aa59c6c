"""``fedpipe sweep``: cells of a grid on this machine, each in a ``fedpipe pretrain`` of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedpipe.distributed.watch import EXIT_INTERRUPTED
from fedpipe.errors import ConfigError, LaunchError
from fedpipe.launcher.supervisor import Interrupted, Signals
from fedpipe.metrics.console import RunConsole
from fedpipe.metrics.format import count, duration, number
from fedpipe.metrics.sweep_report import read_result
from fedpipe.workflows.run_dir import locked
from fedpipe.workflows.sweep import Cell, Sweep, gather, prepare_texts, set_up_sweep

_LIBC = ctypes.CDLL(None)
_LOOK_S = 0.1
_PATIENCE_S = 20.0
"""How long a cell may take to stop at once before it is killed."""
_GATHER_SHARE = 0.05
"""Of the time may go into tables between cells: with many of them, not every one gets a new one."""


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
            if pending:
                with locked(plan.directory):
                    prepare_texts(pending, progress=console.preparing)
                    console.close()
                    _Runner(plan, pending, parallel=parallel, console=console).run(signals)
    except Interrupted:
        console.text(_interrupted(plan, parallel))
        return EXIT_INTERRUPTED
    finally:
        console.close()
    console.text(gather(plan))
    left = plan.pending()
    if left:
        names = ", ".join(cell.name for cell in left)
        raise LaunchError(
            f"sweep: expected {count(len(plan.cells), 'finished cell')}, got "
            f"{len(plan.cells) - len(left)}: not done are {names}. Run them again with: "
            f"{_same(plan, parallel)}"
        )
    nothing = "" if pending else "nothing to do: "
    console.text(f"{nothing}all {count(len(plan.cells), 'cell')} of {plan.directory} are done")
    console.text(f"report  {plan.directory / 'sweep.md'}")
    return 0


def _interrupted(plan: Sweep | None, parallel: int) -> str:
    if plan is None:
        return "interrupted; nothing was started: give the same command again"
    done = len(plan.cells) - len(plan.pending())
    return f"interrupted after {done} of {count(len(plan.cells), 'cell')}; resume with: " + _same(
        plan, parallel
    )


def _same(plan: Sweep, parallel: int) -> str:
    several = f" --parallel {parallel}" if parallel > 1 else ""
    return f"fedpipe sweep --run-dir {plan.directory}{several}"


class _Process:
    """A cell at work."""

    def __init__(self, cell: Cell, *, slot: int, log: Path, cores: set[int]) -> None:
        """Start it as a user would, in a session of its own: Ctrl-C reaches it only through us."""
        self.cell, self.slot, self.log = cell, slot, log
        self._started = time.monotonic()
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedpipe", "pretrain", "--run-dir", str(cell.run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_save_when_the_parent_dies,
            )
        os.sched_setaffinity(self._process.pid, cores)

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def ask_to_stop(self) -> None:
        """Ask it to save; asked again, it stops at once."""
        self._process.terminate()

    def wait(self) -> None:
        """Wait for the end of a cell that was asked to stop, but not for ever."""
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def reason(self) -> str:
        """Why it has failed, in one line."""
        code = self._process.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")


class _Runner:
    """Runs cells, several at a time; one that fails does not take the others along."""

    def __init__(
        self, plan: Sweep, pending: Sequence[Cell], *, parallel: int, console: RunConsole
    ) -> None:
        """Start with none at work."""
        self._plan, self._console = plan, console
        self._waiting = list(reversed(pending))
        self._slots = _divide(sorted(os.sched_getaffinity(0)), min(parallel, len(pending)))
        self._running: list[_Process] = []
        self._number = {cell.name: index for index, cell in enumerate(plan.cells, start=1)}
        self._outdated, self._next_table = False, 0.0

    def run(self, signals: Signals) -> None:
        """Run all that wait.

        Raises:
            Interrupted: Asked to stop; the cells have.
        """
        signals.patient = True
        asked = False
        try:
            while self._running or (self._waiting and not asked):
                if signals.asked and not asked:
                    asked = True
                    self._console.text(
                        "stopping: the running cells save; a second signal stops at once"
                    )
                    for process in self._running:
                        process.ask_to_stop()
                if not asked:
                    self._fill()
                    self._update_table()
                if not self._reap(asked=asked):
                    time.sleep(_LOOK_S)
        finally:
            signals.patient = False
            for process in self._running:
                process.ask_to_stop()
            for process in self._running:
                process.wait()
        if asked and self._plan.pending():
            gather(self._plan)
            raise Interrupted

    def _fill(self) -> None:
        """Start cells where cores are free."""
        used = {process.slot for process in self._running}
        for slot in set(range(len(self._slots))) - used:
            if not self._waiting:
                return
            cell = self._waiting.pop()
            log = self._plan.directory / "logs" / f"{cell.name}.log"
            process = _Process(cell, slot=slot, log=log, cores=self._slots[slot])
            self._running.append(process)
            self._say(cell, "started")

    def _reap(self, *, asked: bool) -> bool:
        """Take leave of the cells that have ended, if any."""
        ended = [process for process in self._running if process.code is not None]
        for process in ended:
            self._running.remove(process)
            if process.code == 0:
                loss = number(read_result(process.cell.run_dir).loss, 3)
                self._say(process.cell, f"done in {duration(process.age_s)}, loss {loss}")
            elif not asked:
                reason = process.reason().rstrip(".")
                self._say(process.cell, f"failed: {reason}. Full log: {process.log}")
        self._outdated |= bool(ended)
        return bool(ended)

    def _update_table(self) -> None:
        """Gather what is done, but not all the time."""
        begin = time.monotonic()
        if self._outdated and self._running and begin >= self._next_table:
            gather(self._plan)
            self._outdated = False
            self._next_table = begin + (time.monotonic() - begin) / _GATHER_SHARE

    def _say(self, cell: Cell, what: str) -> None:
        total = len(self._plan.cells)
        clock = time.strftime("%H:%M:%S")
        where = f"{self._number[cell.name]}/{total}"
        self._console.text(f"{clock} {where} cell {cell.name} {what}")


def _divide(cores: list[int], num_slots: int) -> list[set[int]]:
    """Give every slot cores of its own, or one that it shares where there are too few."""
    if len(cores) < num_slots:
        return [{cores[slot % len(cores)]} for slot in range(num_slots)]
    return [set(cores[slot::num_slots]) for slot in range(num_slots)]


def _save_when_the_parent_dies() -> None:
    """Ask Linux to send a cell SIGTERM when the sweep is killed: nobody would wait for it."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)
