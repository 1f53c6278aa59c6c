"""Ranks under somebody else's launcher watch each other: no supervisor sees them end or hang."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fedpipe.cluster.rank import LOST_PEER
from fedpipe.distributed.activity import Activity, Heartbeats, Ticks
from fedpipe.distributed.board import Board
from fedpipe.distributed.env import ProcessEnv
from fedpipe.distributed.signals import EXIT_INTERRUPTED
from fedpipe.distributed.topology import Grid
from fedpipe.errors import FedPipeError, LaunchError, error_named
from fedpipe.report.records import StepRecord

_PERIOD_S = 1.0
_TELL_S = 2.5
"""A rank that ends a run lives on this long: the others look for a verdict every ``_PERIOD_S``."""
_LEAVE_S = 6.0
"""When the store has gone, a rank that has done its part, or is asked to stop, has this long to end
by itself."""
_SILENT_S = 4.0
"""A rank that posts nothing for this long has ended."""
_VERDICT = "verdict"
_AT_FIRST_S = 120.0
"""``pipeline.hang_timeout_s`` by default, until the configuration is known here."""


class Peers:
    """Posts this rank's activity; rank 0 looks at everybody's, and rank 1 at rank 0's.

    A rank that finds another one dead or hanging posts a verdict, and all ranks that read it end
    themselves: no collective has a time-out, and not every launcher ends the ranks of other nodes.
    This cannot find a dead host of the store, so a thread watches whether the store answers. Its
    host is rank 0 under srun, and torchrun itself under torchrun.
    """

    def __init__(self, env: ProcessEnv) -> None:
        """Start with nobody.

        Args:
            env: This process' place in the run.
        """
        self.on_steps: Callable[[list[StepRecord]], None] | None = None
        """Told on rank 0 of the latest step of every stage of every rank, about once a second."""
        self._env = env
        self._board: Board | None = None
        self._watches, self._posted_verdict = True, False
        self._grid: Grid | None = None
        self._timeout_s = _AT_FIRST_S
        self._heartbeats = Heartbeats(timeout_s=self._timeout_s)
        self._posts: dict[int, list[Any]] = {}
        self._posted_at = 0.0
        self._num_posted = 0
        self._lock = threading.Lock()
        self._steps: dict[int, StepRecord] = {}

    def set_grid(self, grid: Grid, *, timeout_s: float) -> None:
        """Learn the grid and the time-out, which name ranks and find hung ones.

        Args:
            grid: Of the run.
            timeout_s: After this a rank hangs; 0 means never.
        """
        self._grid, self._timeout_s = grid, timeout_s
        self._heartbeats.timeout_s = timeout_s

    def record_step(self, record: StepRecord) -> None:
        """Take a step record of this rank; its last one goes to rank 0."""
        self._steps[record["stage"]] = record

    # -- what the watch tells ----------------------------------------------------------------

    def on_board(self, board: Board) -> None:
        """Begin to post and to look."""
        self._board = board
        threading.Thread(target=self._watch_store, name="guard", daemon=True).start()

    def __call__(self, activity: Activity) -> None:
        """Tell the others, and look at them."""
        board, now = self._board, time.monotonic()
        if not self._lock.acquire(blocking=False):
            return  # the watch is at it, and may wait for the store
        try:
            if board is None or not self._watches or now - self._posted_at < _PERIOD_S:
                return
            self._posted_at = now
            self._num_posted += 1
            steps = list(self._steps.copy().values())
            board.post(f"alive/{self._env.rank}", [self._num_posted, asdict(activity), steps])
            verdict = board.posted([_VERDICT])
            if verdict is not None:
                self._obey(*verdict[0])
            elif self._env.rank == 0:
                self._read_posts(range(self._env.world_size), board, now)
            elif self._env.rank == 1 and self._timeout_s:
                self._read_posts(range(1), board, now)
        finally:
            self._lock.release()

    def on_store_lost(self, failure: Exception, *, taking_part: Callable[[], bool]) -> None:
        """End this rank, unless it ends by itself: its work may wait for ranks that have gone."""
        deadline = time.monotonic() + _LEAVE_S
        while time.monotonic() < deadline:
            if not taking_part():
                return
            time.sleep(0.1)
        self._board = None
        if isinstance(failure, FedPipeError):
            self._end(type(failure).__name__, str(failure), tell=True)
        name = self._heartbeats.name(self._env.rank, self._grid)
        self._end(
            "LaunchError",
            f"{name} cannot go on: {failure}. See the log of rank 0; the same command resumes.",
            tell=True,
        )

    def on_leave(self) -> None:
        """Look no more."""
        self._watches = False

    def on_error(self, error: BaseException) -> BaseException:
        """Tell the others why this rank ends; one whose neighbour has gone looks for that one."""
        board = self._board
        reported = isinstance(error, FedPipeError) and error.reported
        if board is None or self._env.world_size == 1 or reported:
            return error
        neighbour = not isinstance(error, FedPipeError) and LOST_PEER.search(str(error))
        try:
            if neighbour:
                error = self._find_lost(board) or error
            self._post_error(board, error)
        except (ConnectionError, FedPipeError) as gone:
            if neighbour:
                return LaunchError(f"{gone}. See its log; the same command resumes.")
        return error

    def _post_error(self, board: Board, error: BaseException) -> None:
        kind, text = type(error).__name__, " ".join(str(error).split())[:1000]
        if isinstance(error, Exception) and not isinstance(error, FedPipeError):
            name = self._heartbeats.name(self._env.rank, self._grid)
            kind, text = "LaunchError", f"{name} failed: {kind}: {text}"
        if board.posted([_VERDICT]) is None:
            self._posted_verdict = True
            board.post(_VERDICT, [kind, text])
        if self._env.hosts_store:
            time.sleep(_TELL_S)

    # ----------------------------------------------------------------------------------------

    def _watch_store(self) -> None:
        """End this rank when a question to the store goes unanswered for too long."""
        ticks, question, since_s = Ticks(), 0, 0.0
        while (board := self._board) is not None and self._watches:
            time.sleep(_PERIOD_S)
            now_s, before = ticks(time.monotonic()), question
            question = board.unanswered()
            if not question or question != before:
                since_s = now_s
            elif self._timeout_s and now_s - since_s > self._timeout_s:
                where = ":".join(map(str, self._env.address))
                host = self._heartbeats.name(0, self._grid) if self._env.rank else "this rank"
                self._end(
                    "LaunchError",
                    f"{host} hangs: the store of the run at {where}, which it or its launcher "
                    f"hosts, has not answered for {now_s - since_s:.0f} s. See its log; the same "
                    "command resumes.",
                    tell=True,
                )

    def _read_posts(self, ranks: range, board: Board, now: float) -> None:
        """Read what the ranks have posted."""
        posts = board.posted([f"alive/{rank}" for rank in ranks])
        if posts is None:
            return
        steps = []
        for rank, post in zip(ranks, posts, strict=True):
            _, activity, records = post
            steps += records
            if post != self._posts.get(rank) and rank != self._env.rank:
                self._posts[rank] = post
                self._heartbeats.hear(rank, Activity(**activity))
        if self.on_steps is not None and steps:
            self.on_steps(steps)
        hung = self._heartbeats.find_hung(ranks, clock_s=now)
        if hung is not None:
            name = self._heartbeats.name(hung[0], self._grid)
            self._post_verdict(
                board,
                f"{name} hangs: {hung[1]}. See the launcher's log of this rank; the same command "
                "resumes.",
            )

    def _find_lost(self, board: Board) -> FedPipeError | None:
        """Find the rank that has gone: one that told why it ends, or one that no longer posts."""
        others = [rank for rank in range(self._env.world_size) if rank != self._env.rank]
        before = board.posted([f"alive/{rank}" for rank in others])
        deadline = time.monotonic() + _SILENT_S
        while time.monotonic() < deadline:
            verdict = board.posted([_VERDICT])
            if verdict is not None:
                kind, text = verdict[0]
                error = error_named(kind, text) or LaunchError(text)
                error.reported = True
                return error
            time.sleep(0.1)
        after = board.posted([f"alive/{rank}" for rank in others])
        for rank, first, last in zip(others, before or (), after or (), strict=False):
            if first == last:
                self._heartbeats.hear(rank, Activity(**last[1]))
                return LaunchError(
                    f"{self._heartbeats.name(rank, self._grid)} has ended without a word, last "
                    f"seen in {last[1]['doing']}: its peer, rank {self._env.rank}, lost the "
                    "connection. It was killed, most often for want of memory. See the launcher's "
                    "log of it; the same command resumes."
                )
        return None

    def _post_verdict(self, board: Board, text: str) -> None:
        """End the run."""
        board.post(_VERDICT, ["LaunchError", text])
        _say("LaunchError", text)
        time.sleep(_TELL_S)
        os._exit(1)  # the work itself waits for the rank that hangs

    def _obey(self, kind: str, text: str) -> None:
        """End this rank as a verdict says; its work may still end by itself, and say more."""
        deadline = time.monotonic() + _LEAVE_S
        while time.monotonic() < deadline:
            if not self._watches:
                return
            time.sleep(0.1)
        self._end(
            kind, text, tell=self._env.rank == 0 and not self._posted_verdict
        )  # people look there

    def _end(self, kind: str, text: str, *, tell: bool = False) -> None:
        if kind == "Interrupted":
            os._exit(EXIT_INTERRUPTED)
        if tell:
            _say(kind, text)
        error = error_named(kind, text)
        os._exit(1 if error is None or isinstance(error, LaunchError) else 2)


def _say(kind: str, text: str) -> None:
    sys.stderr.write(f"{kind}: {text}\n")
    sys.stderr.flush()
