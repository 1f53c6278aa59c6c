"""The ranks that a supervisor has started: what they said last, and which one is to blame."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from fedpipe.distributed.activity import Heartbeats
from fedpipe.distributed.topology import Grid
from fedpipe.errors import FedPipeError, LaunchError, TrainingError, error_in, is_users

LOST_PEER = re.compile(r"Connection (closed|reset)|BrokenPipe|Broken pipe|peer")
"""What a rank says whose neighbour has gone: it is not to blame."""


class Setup(Protocol):
    """What supervising a run of any kind needs to know of it."""

    @property
    def run_dir(self) -> Path:
        """Its directory."""

    @property
    def hang_timeout_s(self) -> float:
        """Seconds without a sign of life after which a process is taken for hung."""


class Ranks:
    """Processes of a run on this machine."""

    def __init__(self, task: str, setup: Setup, *, grid: Grid) -> None:
        """Start with no process.

        Args:
            task: What they do, for the advice in errors.
            setup: The run.
            grid: Says what a rank holds.
        """
        self.processes: list[BaseProcess] = []
        """By rank."""
        self.stopped_at = ""
        """Where the run has stopped because it was asked to."""
        self._task, self._setup, self._grid = task, setup, grid
        self._errors: dict[int, str] = {}
        self._heartbeats = Heartbeats(timeout_s=setup.hang_timeout_s)

    def hear(self, rank: int, kind: str, value: Any) -> None:
        """Take a message that is not for people."""
        if kind == "activity":
            self._heartbeats.hear(rank, value)
        elif kind == "error":
            self._errors[rank] = value
        elif kind == "stopped":
            self.stopped_at = value

    def has_failed(self, rank: int) -> bool:
        """Whether a rank that has closed its pipe ended badly."""
        self.processes[rank].join()
        return self.processes[rank].exitcode != 0

    def check_alive(self, running: Iterable[int]) -> None:
        """Look for a rank that hangs.

        Raises:
            LaunchError: One does.
        """
        hung = self._heartbeats.find_hung(running, clock_s=time.monotonic())
        if hung is not None:
            rank, what = hung
            raise self._error(rank, f"hangs: {what}")

    def ask_to_stop(self) -> None:
        """Ask every rank to save and stop."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, signal.SIGUSR2)

    def failure(self) -> FedPipeError:
        """Name the rank that failed first by cause: its neighbours only lost their connection.

        What the user can mend is said as it is, and so is a training that diverges: it is no
        rank's, and the same command would find the same.
        """
        failed = [r for r, p in enumerate(self.processes) if p.exitcode not in (None, 0)]
        killed = [r for r in failed if r not in self._errors]
        original = [r for r in failed if not LOST_PEER.search(self._errors.get(r, ""))]
        rank = next(iter(killed or original or failed))
        known = error_in(self._errors.get(rank, ""))
        if known is not None and (is_users(known) or isinstance(known, TrainingError)):
            return known
        code = self.processes[rank].exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return self._error(rank, f"failed: {self._errors.get(rank, how)}")

    def kill(self) -> None:
        """End all processes at once."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def _error(self, rank: int, what: str) -> LaunchError:
        run_dir = self._setup.run_dir
        return LaunchError(
            f"{self._heartbeats.name(rank, self._grid)} {what.removesuffix('.')}. "
            f"Full log: {run_dir / 'logs' / f'rank_{rank:05d}.log'}. "
            f"Run it again with: fedpipe {self._task} --run-dir {shlex.quote(str(run_dir))}"
        )
