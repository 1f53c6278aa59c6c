"""Cells on this machine, several at a time, each a process of its own; one may fail alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedpipe.distributed.signals import Interrupted, Signals
from fedpipe.errors import FedPipeError, LaunchError, error_in, is_users
from fedpipe.report.console import RunConsole
from fedpipe.report.format import count, duration

_LIBC = ctypes.CDLL(None)
_USERS_ERROR = 2
"""A cell's exit code, as the command line's."""
_LOOK_S = 0.1
_PATIENCE_S = 20.0
"""How long a cell may take to stop at once before it is killed."""
_GATHER_SHARE = 0.05
"""Of the time may go into tables between cells: with many of them, not every one gets a new one."""


class Cell(Protocol):
    """What is known of a cell here."""

    @property
    def name(self) -> str:
        """Of its folder and its log."""


class Plan(Protocol):
    """What cells belong to."""

    @property
    def directory(self) -> Path:
        """Where they are."""

    @property
    def cells(self) -> Sequence[Cell]:
        """All of them, in their order."""

    def pending(self) -> Sequence[Cell]:
        """Those that are not done."""


class CellProcess(Protocol):
    """A process, however it was started."""

    @property
    def pid(self) -> int:
        """Its number; it leads a process group."""

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs; -9 is killed by signal 9."""

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for its end; False if that has not come."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where a cell runs."""

    index: int
    """From 0; cells at work at the same time have different ones."""
    cores: frozenset[int]
    """Cores that are its own, or that it shares where there are too few."""


Start = Callable[[str, Slot, Path], CellProcess]
"""Takes a cell's name, its slot and its log; starts it in a session of its own."""


class _Running:
    """A cell at work."""

    def __init__(self, name: str, *, slot: Slot, log: Path, start: Start) -> None:
        """Start it; Ctrl-C reaches it only through us."""
        self.name, self.slot, self.log = name, slot, log
        self._started = time.monotonic()
        log.parent.mkdir(exist_ok=True)
        self._process = start(name, slot, log)
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


class CellRunner:
    """Runs cells, several at a time; one that fails does not take the others along."""

    def __init__(
        self,
        cells: Sequence[Cell],
        pending: Sequence[Cell],
        *,
        parallel: int,
        logs: Path,
        start: Start,
        gather: Callable[[], object],
        outcome: Callable[[str], str],
        console: RunConsole,
        look: Callable[[Sequence[str]], None] = lambda running: None,
    ) -> None:
        """Start with none at work.

        Args:
            cells: All of them, in their order.
            pending: Those to run.
            parallel: Cells at a time; they share the cores.
            logs: Folder of their logs.
            start: Starts one.
            gather: Writes tables of what is done.
            outcome: Says by name what a finished cell has reached.
            console: Shows what happens.
            look: Called now and then with the names of the cells at work.
        """
        self._waiting = [cell.name for cell in reversed(pending)]
        cores = divide(sorted(os.sched_getaffinity(0)), min(parallel, len(pending)))
        self._slots = [Slot(index=i, cores=frozenset(own)) for i, own in enumerate(cores)]
        self._running: list[_Running] = []
        self._number = {cell.name: index for index, cell in enumerate(cells, start=1)}
        self._logs, self._start, self._outcome = logs, start, outcome
        self._gather, self._look, self._console = gather, look, console
        self._num_failed, self._outdated, self._next_table = 0, False, 0.0
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
                    self._look([process.name for process in self._running])
                if not self._reap(asked=asked):
                    time.sleep(_LOOK_S)
        finally:
            signals.patient = False
            for process in self._running:
                process.ask_to_stop()
            for process in self._running:
                process.wait()
        if asked and (self._waiting or self._num_failed):
            self._gather()
            raise Interrupted
        return self._refused

    def _fill(self) -> None:
        """Start cells where cores are free."""
        used = {process.slot for process in self._running}
        for slot in [slot for slot in self._slots if slot not in used]:
            if not self._waiting:
                return
            name = self._waiting.pop()
            log = self._logs / f"{name}.log"
            self._running.append(_Running(name, slot=slot, log=log, start=self._start))
            self._say(name, "started")

    def _reap(self, *, asked: bool) -> bool:
        """Take leave of the cells that have ended, if any."""
        ended = [process for process in self._running if process.code is not None]
        for process in ended:
            self._running.remove(process)
            if process.code == 0:
                outcome = self._outcome(process.name)
                self._say(process.name, f"done in {duration(process.age_s)}, {outcome}")
                continue
            self._num_failed += 1
            if not asked:
                reason = process.reason().rstrip(".")
                error = error_in(process.reason()) if process.code == _USERS_ERROR else None
                if error is not None:
                    self._refused[process.name] = error
                self._say(process.name, f"failed: {reason}. Full log: {process.log}")
        self._outdated |= bool(ended)
        return bool(ended)

    def _update_table(self) -> None:
        """Gather what is done, but not all the time."""
        begin = time.monotonic()
        if self._outdated and self._running and begin >= self._next_table:
            self._gather()
            self._outdated = False
            self._next_table = begin + (time.monotonic() - begin) / _GATHER_SHARE

    def _say(self, name: str, what: str) -> None:
        clock = time.strftime("%H:%M:%S")
        where = f"{self._number[name]}/{len(self._number)}"
        self._console.text(f"{clock} {where} cell {name} {what}")


def again(task: str, directory: Path, *, parallel: int) -> str:
    """Return the command that goes on with cells."""
    several = ["--parallel", str(parallel)] if parallel > 1 else []
    return shlex.join(["fedpipe", task, "--run-dir", str(directory), *several])


def interrupted(plan: Plan | None, command: str) -> str:
    """Say what is left of an interrupted plan, None for one that was not made yet."""
    if plan is None:
        return "interrupted; nothing was started: give the same command again"
    done = len(plan.cells) - len(plan.pending())
    cells = count(len(plan.cells), "cell")
    return f"interrupted after {done} of {cells}; resume with: {command}"


def check_all_done(
    task: str, plan: Plan, *, way_out: str, refused: Mapping[str, FedPipeError] | None = None
) -> None:
    """Name the cells that are left.

    Args:
        task: What a user calls all of them.
        plan: What they belong to.
        way_out: For those that failed.
        refused: What cells found that the user can mend, by their names.

    Raises:
        LaunchError: There are some.
        FedPipeError: There are only some that the user can mend: the error of the first of them.
    """
    left = plan.pending()
    check_refused([cell.name for cell in left], refused or {})
    if left:
        raise LaunchError(
            f"{task}: expected {count(len(plan.cells), 'finished cell')}, got "
            f"{len(plan.cells) - len(left)}: not done are {', '.join(cell.name for cell in left)}."
            f" {way_out}"
        )


def check_refused(left: Sequence[str], refused: Mapping[str, FedPipeError]) -> None:
    """Raise what the user can mend, where nothing else is in the way.

    Args:
        left: Names of the cells that are not done.
        refused: What cells found that the user can mend, by their names.

    Raises:
        FedPipeError: The error of the first of the cells, if each of them has one.
    """
    if left and all(name in refused for name in left):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise type(refused[left[0]])(f"cell {left[0]}{more}: {refused[left[0]]}")


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
def saying_to(log: str, *, anew: bool = False) -> Iterator[None]:
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


def save_when_the_parent_dies() -> None:
    """Ask Linux to send a cell SIGTERM when its parent is killed: nobody would wait for it."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM)
