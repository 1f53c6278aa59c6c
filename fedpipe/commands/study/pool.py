"""Run the cells of a study on this machine: several processes at a time, or in the foreground."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from fedpipe.cluster.local import fork_server, num_threads
from fedpipe.commands.study.study import CellT, Slot, Study
from fedpipe.distributed.signals import (
    EXIT_INTERRUPTED,
    STOP_SIGNALS,
    Interrupted,
    Signals,
    end_with_parent,
    stop_signals,
)
from fedpipe.errors import ConfigError, FedPipeError, LaunchError, error_in, is_users
from fedpipe.report.console import RunConsole
from fedpipe.report.format import count, duration
from fedpipe.run.run_dir import locked

_USERS_ERROR = 2
"""Exit code of a cell after an error of the user, as on the command line."""
_LOOK_S = 0.1
_PROGRESS_S = 1.0
"""Seconds between two looks at the progress of running cells."""
_PATIENCE_S = 20.0
"""Seconds that a cell may take to stop at once before it is killed."""
_MAX_NAMED = 8
"""Number of cells that an error names."""
NOTHING_STARTED = "interrupted; nothing was started: give the same command again"
_GATHER_SHARE = 0.05
"""Largest share of the time for writing tables between cells; with many cells, some are skipped."""


class _Running(Generic[CellT]):
    """A running cell."""

    def __init__(self, study: Study[CellT], cell: CellT, slot: Slot) -> None:
        """Start the cell; the terminal's Ctrl-C does not reach it, and the pool forwards it."""
        self.cell, self.slot = cell, slot
        self.log = study.directory / "logs" / f"{cell.name}.log"
        self._started = time.monotonic()
        self.log.parent.mkdir(exist_ok=True)
        self._process = study.start(cell, slot, self.log)
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(self._process.pid, slot.cores)

    @property
    def code(self) -> int | None:
        return self._process.code

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._started

    def ask_to_stop(self) -> None:
        """Ask the cell to save and stop; a second request stops it at once."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Wait for the end of a cell that was asked to stop, and kill it after a time limit."""
        if not self._process.wait(_PATIENCE_S):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(None)

    def reason(self) -> str:
        """Return the reason of a failure, in one line."""
        code = self.code
        assert code is not None, "it has ended"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return last_line(self.log) or f"exit code {code}"


class Pool(Generic[CellT]):
    """Runs cells, several at a time; the failure of a cell does not end the others."""

    def __init__(
        self,
        study: Study[CellT],
        pending: Sequence[CellT],
        *,
        parallel: int,
        console: RunConsole,
        gathers: bool = True,
    ) -> None:
        """Start without a running cell.

        Args:
            study: The study, which starts its cells.
            pending: Cells to run.
            parallel: Number of cells at a time; they share the cores.
            console: Shows the course of the study.
            gathers: Whether tables are written between cells.
        """
        self._study, self._console, self._gathers = study, console, gathers
        self._waiting = list(reversed(pending))
        parallel = min(parallel, study.max_parallel or parallel, len(pending))
        cores = divide(sorted(os.sched_getaffinity(0)), parallel)
        self._slots = [Slot(index=i, cores=frozenset(own)) for i, own in enumerate(cores)]
        self._running: list[_Running[CellT]] = []
        self._number = {cell.name: index for index, cell in enumerate(study.cells, start=1)}
        self._num_failed, self._outdated = 0, False
        self._next_table = self._next_look = 0.0
        self._refused: dict[str, FedPipeError] = {}

    def run(self, signals: Signals) -> dict[str, FedPipeError]:
        """Run all pending cells.

        Returns:
            Errors that the user can correct, by the name of the cell.

        Raises:
            Interrupted: A signal asked to stop, and the cells have stopped. If all cells were done
                by then, nothing is raised.
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
                    self._look()
                if not self._reap(asked=asked):
                    time.sleep(_LOOK_S)
        finally:
            signals.patient = False
            for process in self._running:
                process.ask_to_stop()
            for process in self._running:
                process.wait()
        if asked and (self._waiting or self._num_failed):
            if self._gathers:
                self._study.write_tables()
            raise Interrupted
        return self._refused

    def _fill(self) -> None:
        """Start cells on free cores."""
        used = {process.slot for process in self._running}
        for slot in [slot for slot in self._slots if slot not in used]:
            if not self._waiting:
                return
            cell = self._waiting.pop()
            self._running.append(_Running(self._study, cell, slot))
            self._say(cell, "started")

    def _reap(self, *, asked: bool) -> bool:
        """Remove finished cells and show how each ended; return whether there were any."""
        ended = [process for process in self._running if process.code is not None]
        for process in ended:
            self._running.remove(process)
            if process.code == 0:
                outcome = self._study.outcome(process.cell)
                self._say(process.cell, f"done in {duration(process.age_s)}, {outcome}")
                continue
            self._num_failed += 1
            if not asked:
                reason = process.reason().rstrip(".")
                error = error_in(process.reason()) if process.code == _USERS_ERROR else None
                if error is not None:
                    self._refused[process.cell.name] = error
                self._say(process.cell, f"failed: {reason}. Full log: {process.log}")
        self._outdated |= bool(ended)
        return bool(ended)

    def _update_table(self) -> None:
        """Write the tables of finished cells, unless that was done a short time ago."""
        begin = time.monotonic()
        if self._gathers and self._outdated and self._running and begin >= self._next_table:
            self._study.write_tables()
            self._outdated = False
            self._next_table = begin + (time.monotonic() - begin) / _GATHER_SHARE

    def _look(self) -> None:
        """Show the progress of running cells, unless that was done a short time ago."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _PROGRESS_S
            self._study.show_progress(
                [process.cell.name for process in self._running], self._console
            )

    def _say(self, cell: CellT, what: str) -> None:
        clock = time.strftime("%H:%M:%S")
        where = f"{self._number[cell.name]}/{len(self._number)}"
        self._console.text(f"{clock} {where} cell {cell.name} {what}")


def run_cells(
    study: Study[CellT],
    pending: Sequence[CellT],
    *,
    parallel: int,
    console: RunConsole,
    signals: Signals,
    gathers: bool = True,
) -> dict[str, FedPipeError]:
    """Run cells on this machine; the failure of a cell does not end the others.

    Args:
        study: The study of the cells.
        pending: Cells to run.
        parallel: Number of cells at a time.
        console: Shows the course of the study.
        signals: Signals, which the caller catches.
        gathers: Whether tables are written between cells.

    Returns:
        Errors that the user can correct, by the name of the cell.

    Raises:
        Interrupted: A signal asked to stop, and the cells have stopped.
    """
    if not (study.in_foreground and parallel == 1):
        pool = Pool(study, pending, parallel=parallel, console=console, gathers=gathers)
        return pool.run(signals)
    refused = {}
    for number, cell in enumerate(study.cells, start=1):
        if cell not in pending:
            continue
        console.text(study.start_message(cell, number))
        try:
            study.run(cell, console=console, signals=signals)
        except FedPipeError as error:
            if is_users(error):
                refused[cell.name] = error
            console.text(f"failed  {error}")
        if signals.asked:  # too late for this cell to stop
            raise Interrupted
    return refused


def run_study(
    make: Callable[[RunConsole], Study[Any]], *, parallel: int = 1, signals: Signals | None = None
) -> int:
    """Run the remaining cells of a study on this machine, and show its table.

    Args:
        make: Makes the study; it shows its progress on the console.
        parallel: Number of cells at a time.
        signals: Signals to catch meanwhile; a caller passes its own to learn which one came.

    Returns:
        0 when all cells are done, 75 when the study was interrupted and can be resumed.

    Raises:
        FedPipeError: The user can correct the cause; nothing has been started.
        LaunchError: A cell failed; the others are done.
    """
    if parallel < 1:
        raise ConfigError(f"--parallel: expected 1 or more, got {parallel}. 1 is usual.")
    console = RunConsole()
    signals = signals or Signals()
    study: Study[Any] | None = None
    refused: dict[str, FedPipeError] = {}
    try:
        with signals.caught():
            study = make(console)
            pending = study.pending()
            if pending:
                with locked(study.directory):
                    study.prepare(pending, progress=console.preparing)
                    console.close()
                    refused = run_cells(
                        study, pending, parallel=parallel, console=console, signals=signals
                    )
    except Interrupted:
        console.text(study.interruption_message(parallel=parallel) if study else NOTHING_STARTED)
        return EXIT_INTERRUPTED
    finally:
        console.close()
    console.text(study.write_tables())
    way_out = f"Run them again with: {study.resume_command(parallel=parallel)}"
    check_all_done(study, way_out=way_out, refused=refused)
    if not study.in_foreground:
        nothing = "" if pending else "nothing to do: "
        cells = count(len(study.cells), "cell")
        console.text(f"{nothing}all {cells} of {study.directory} are done")
    console.text(f"report  {study.page}")
    return 0


def check_all_done(
    study: Study[Any],
    *,
    way_out: str,
    refused: Mapping[str, FedPipeError],
    task: str | None = None,
    what: str = "finished cell",
) -> None:
    """Raise an error that names the cells that are not done.

    Args:
        study: The study of the cells.
        way_out: Advice for failed cells.
        refused: Errors that the user can correct, by the name of the cell.
        task: Name of the command, if it is not that of the study.
        what: Word for a finished cell in the message.

    Raises:
        LaunchError: A cell is not done.
        FedPipeError: All cells that are not done have errors of the user; it is the first one.
    """
    left, total = [cell.name for cell in study.pending()], len(study.cells)
    if not left:
        return
    if all(name in refused for name in left):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise type(refused[left[0]])(f"cell {left[0]}{more}: {refused[left[0]]}")
    more = f" and {len(left) - _MAX_NAMED} more" if len(left) > _MAX_NAMED else ""
    raise LaunchError(
        f"{task or study.task}: expected {count(total, what)}, got {total - len(left)}: not done"
        f" are {', '.join(left[:_MAX_NAMED])}{more}. {way_out}"
    )


def divide(cores: list[int], num_slots: int) -> list[set[int]]:
    """Give every slot its own cores, or a shared core if there are too few."""
    if len(cores) < num_slots:
        return [{cores[slot % len(cores)]} for slot in range(num_slots)]
    return [set(cores[slot::num_slots]) for slot in range(num_slots)]


def last_line(log: Path) -> str | None:
    """Return the last line of a log that is not blank; None if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


@contextlib.contextmanager
def redirect_output(log: str, *, anew: bool = False) -> Iterator[None]:
    """Redirect the output of this process to a log; our errors end it with a code and one line.

    Args:
        log: Path of the log, to which output is appended.
        anew: Whether to empty the log first.
    """
    how = os.O_TRUNC if anew else os.O_APPEND
    output = os.open(log, os.O_WRONLY | os.O_CREAT | how, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        yield
    except FedPipeError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.stderr.flush()
        sys.exit(_USERS_ERROR if is_users(error) else 1)


class CommandProcess:
    """The process of a cell, started by the same command that a user gives."""

    def __init__(self, task: str, run_dir: Path, log: Path) -> None:
        """Start ``fedpipe TASK --run-dir RUN_DIR``, in a session of its own."""
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedpipe", task, "--run-dir", str(run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code; None while the process runs."""
        return self._process.poll()

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for the end of the process; return False after the time limit."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


class ForkedProcess:
    """The process of a cell, forked from the server that has imported its modules."""

    def __init__(
        self,
        work: Callable[[str, int], object],
        run_dir: Path,
        slot: Slot,
        log: Path,
        *,
        preload: Sequence[str],
    ) -> None:
        """Start the process in a session of its own.

        Args:
            work: Function of a module; its arguments are the directory and the index of the slot.
            run_dir: Directory of the cell.
            slot: Slot with the cores of the cell.
            log: Log for the output of the cell.
            preload: Modules that the server imports.
        """
        threads = num_threads(len(slot.cores))
        self._process = fork_server(preload).Process(
            target=_work,
            daemon=True,
            args=(work, str(run_dir), str(log.absolute()), slot.index, slot.cores, threads),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid)

    @property
    def code(self) -> int | None:
        """Exit code; None while the process runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for the end of the process; return False after the time limit."""
        self._process.join(timeout_s)
        return self.code is not None


def _work(
    work: Callable[[str, int], object],
    run_dir: str,
    log: str,
    index: int,
    cores: frozenset[int],
    threads: int,
) -> None:
    """Run a cell in this process, which ends with the cell; output goes to the log."""
    os.setsid()
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    end_with_parent()
    with redirect_output(log):
        import torch

        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        work(run_dir, index)
