"""The cells of a study on this machine: several at a time in processes, or in the foreground."""

from __future__ import annotations

import contextlib
import ctypes
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
    stop_signals,
)
from fedpipe.errors import ConfigError, FedPipeError, LaunchError, error_in, is_users
from fedpipe.report.console import RunConsole
from fedpipe.report.format import count, duration
from fedpipe.run.run_dir import locked

_LIBC = ctypes.CDLL(None)
_USERS_ERROR = 2
"""A cell's exit code, as the command line's."""
_LOOK_S = 0.1
_PROGRESS_S = 1.0
"""How often the progress of running cells is looked at."""
_PATIENCE_S = 20.0
"""How long a cell may take to stop at once before it is killed."""
_MAX_NAMED = 8
"""Cells that an error names."""
NOTHING_STARTED = "interrupted; nothing was started: give the same command again"
_GATHER_SHARE = 0.05
"""Of the time may go into tables between cells: with many of them, not every one gets a new one."""


class _Running(Generic[CellT]):
    """A cell at work."""

    def __init__(self, study: Study[CellT], cell: CellT, slot: Slot) -> None:
        """Start it; Ctrl-C reaches it only through us."""
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
        """Ask it to save; asked again, it stops at once."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def wait(self) -> None:
        """Wait for the end of a cell that was asked to stop, but not for ever."""
        if not self._process.wait(_PATIENCE_S):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(None)

    def reason(self) -> str:
        """Why it has failed, in one line."""
        code = self.code
        assert code is not None, "it has ended"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return last_line(self.log) or f"exit code {code}"


class Pool(Generic[CellT]):
    """Runs cells, several at a time; one that fails does not take the others along."""

    def __init__(
        self,
        study: Study[CellT],
        pending: Sequence[CellT],
        *,
        parallel: int,
        console: RunConsole,
        gathers: bool = True,
    ) -> None:
        """Start with none at work.

        Args:
            study: The cells, how they are started, and what they end in.
            pending: Those to run.
            parallel: Cells at a time; they share the cores.
            console: Shows what happens.
            gathers: Tables are written between cells.
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
        """Run all that wait.

        Returns:
            What cells found that the user can mend, by their names.

        Raises:
            Interrupted: Asked to stop; the cells have. (Not where all of them were done by then.)
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
        """Start cells where cores are free."""
        used = {process.slot for process in self._running}
        for slot in [slot for slot in self._slots if slot not in used]:
            if not self._waiting:
                return
            cell = self._waiting.pop()
            self._running.append(_Running(self._study, cell, slot))
            self._say(cell, "started")

    def _reap(self, *, asked: bool) -> bool:
        """Remove the cells that have ended, and say how; return whether there were any."""
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
        """Gather what is done, but not all the time."""
        begin = time.monotonic()
        if self._gathers and self._outdated and self._running and begin >= self._next_table:
            self._study.write_tables()
            self._outdated = False
            self._next_table = begin + (time.monotonic() - begin) / _GATHER_SHARE

    def _look(self) -> None:
        """Look how far the running cells are, but not all the time."""
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
    """Run cells on this machine; one that fails does not take the others along.

    Args:
        study: What they belong to.
        pending: Those to run.
        parallel: At a time.
        console: Shows what happens.
        signals: Caught by the caller.
        gathers: Tables are written between cells.

    Returns:
        What cells found that the user can mend, by their names.

    Raises:
        Interrupted: Asked to stop; the cells have.
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
    """Run what is not done of a study on this machine, and show its table.

    Args:
        make: Makes the study, and shows what it does meanwhile.
        parallel: Cells at a time.
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
    """Name the cells that are left.

    Args:
        study: What they belong to.
        way_out: For those that failed.
        refused: What cells found that the user can mend, by their names.
        task: The command, if it is not the study's own.
        what: One that is done is, for people.

    Raises:
        LaunchError: There are some.
        FedPipeError: There are only some that the user can mend: the error of the first of them.
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
    """Give every slot cores of its own, or one that it shares where there are too few."""
    if len(cores) < num_slots:
        return [{cores[slot % len(cores)]} for slot in range(num_slots)]
    return [set(cores[slot::num_slots]) for slot in range(num_slots)]


def last_line(log: Path) -> str | None:
    """Return the last line of a log that says something, None if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


@contextlib.contextmanager
def redirect_output(log: str, *, anew: bool = False) -> Iterator[None]:
    """Send what this process says to a log; an error of ours ends it with its code and one line.

    Args:
        log: The file; written to its end, or with ``anew`` from its beginning.
        anew: Forget what it holds.
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
    """A cell, started as a user would start it."""

    def __init__(self, task: str, run_dir: Path, log: Path) -> None:
        """Start ``fedpipe TASK --run-dir RUN_DIR``, in a session of its own."""
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedpipe", task, "--run-dir", str(run_dir)],
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


class ForkedProcess:
    """A cell, forked from the server that has made its imports."""

    def __init__(
        self,
        work: Callable[[str, int], object],
        run_dir: Path,
        slot: Slot,
        log: Path,
        *,
        preload: Sequence[str],
    ) -> None:
        """Start it, in a session of its own.

        Args:
            work: Takes the cell's directory and the index of its slot; of a module.
            run_dir: Of the cell.
            slot: Where it runs.
            log: Takes what it says.
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
        """Its number."""
        return int(self._process.pid)

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for its end; False if that has not come."""
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
    """Run a cell in this process, which ends with it; what it says goes to its log."""
    os.setsid()
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    save_when_the_parent_dies()
    with redirect_output(log):
        import torch

        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        work(run_dir, index)


def save_when_the_parent_dies() -> None:
    """Ask Linux to send a cell SIGTERM when its parent is killed: nobody would wait for it."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)
