"""Ranks under somebody else's launcher watch each other: no supervisor sees them hang."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fedpipe.distributed.activity import Activity, Roll
from fedpipe.distributed.comm import Comm
from fedpipe.errors import LaunchError

_PERIOD_S = 1.0

Record = dict[str, Any]


class Peers:
    """Posts this rank's activity; rank 0 looks at everybody's, and rank 1 at rank 0's.

    They end themselves when one hangs, and the launcher ends the rest. The host of the store cannot
    be found out this way: under srun that is rank 0, under torchrun it is torchrun.
    """

    def __init__(
        self, *, timeout_s: float, on_steps: Callable[[list[Record]], None] | None = None
    ) -> None:
        """Start with nobody.

        Args:
            timeout_s: After this a rank hangs; 0 means never.
            on_steps: Told on rank 0 of the latest step of every stage of every rank, about once a
                second; None on the other ranks.
        """
        self._timeout_s = timeout_s
        self._roll = Roll(timeout_s=timeout_s)
        self._posts: dict[int, str] = {}
        self._posted_at = 0.0
        self._num_posted = 0
        self._lock = threading.Lock()
        self._on_steps = on_steps
        self._steps: dict[int, Record] = {}

    def saw(self, record: Record) -> None:
        """Take a step record of this rank; its last one goes to rank 0."""
        self._steps[record["stage"]] = record

    def __call__(self, activity: Activity, comm: Comm | None) -> None:
        """Tell the others, and look at them."""
        now = time.monotonic()
        with self._lock:
            if comm is None or now - self._posted_at < _PERIOD_S:
                return
            self._posted_at = now
            self._num_posted += 1
            steps = list(self._steps.copy().values())
            comm.post(f"alive/{comm.rank}", json.dumps([self._num_posted, asdict(activity), steps]))
            if comm.rank == 0:
                self._look(range(comm.env.world_size), comm, now)
            elif comm.rank == 1 and self._timeout_s:
                self._look(range(1), comm, now)

    def _look(self, ranks: range, comm: Comm, now: float) -> None:
        """Read what the ranks have posted."""
        texts = comm.posted([f"alive/{rank}" for rank in ranks])
        if texts is None:
            return
        steps = []
        for rank, text in zip(ranks, texts, strict=True):
            _, activity, records = json.loads(text)
            steps += records
            if text != self._posts.get(rank) and rank != comm.rank:
                self._posts[rank] = text
                self._roll.hear(rank, Activity(**activity))
        if self._on_steps is not None and steps:
            self._on_steps(steps)
        self._judge(ranks, comm, now)

    def _judge(self, ranks: range, comm: Comm, now: float) -> None:
        hung = self._roll.find_hung(ranks, clock_s=now)
        if hung is None:
            return
        rank, what = hung
        error = LaunchError(
            f"{self._roll.name(rank, comm.grid)} hangs: {what}. See the launcher's log of this "
            "rank; the same command resumes."
        )
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)  # the work itself waits for the rank that hangs
