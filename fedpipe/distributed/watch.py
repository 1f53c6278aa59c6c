"""A thread beside a rank's work: signs of life, and the agreement where to stop. No torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from fedpipe.distributed.activity import Activity
from fedpipe.distributed.stopping import Moment, StopPoint

if TYPE_CHECKING:
    from fedpipe.distributed.comm import Comm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""Ask a run to stop: a scheduler's, Ctrl-C, and a cluster's warning ahead of time."""
EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on where this one ended."""
_PERIOD_S = 0.25
_REPEATED_S = 3.0
"""A launcher may pass on the signal that the terminal has sent already; later ones are meant."""
_REQUEST = "stop/requested"


class StopSignals:
    """Remembers that this process was asked to stop; a second request ends it at once."""

    def __init__(self) -> None:
        """Catch nothing yet."""
        self._asked_at: float | None = None
        self._before: dict[int, Any] = {}
        self.number = 0
        """The first signal that has come; 0 while there is none."""

    def catch(self) -> None:
        """Catch the signals from now on, also those that were blocked. Main thread only."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def release(self) -> None:
        """Give the signals back to whoever caught them before. Main thread only."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def catches(self) -> bool:
        """They are caught now."""
        return bool(self._before)

    @property
    def asked(self) -> bool:
        """One has come."""
        return self._asked_at is not None

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self.number = number
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > _REPEATED_S:
            os._exit(EXIT_INTERRUPTED)


class Watch:
    """Reports what a rank does, and finds where the run stops when any of its ranks is asked to.

    One thread, which looks a few times a second; the ranks meet in the store of their process
    group, so it works under every launcher, and the work itself never asks the store.
    """

    def __init__(
        self,
        *,
        signals: StopSignals | None = None,
        report: Callable[[Activity, Comm | None], None] = lambda activity, comm: None,
    ) -> None:
        """Make a watch; ``with`` starts and ends its thread.

        Args:
            signals: Caught as soon as the rank has joined the run; None for a process that is not
                asked itself.
            report: Told what the rank does, a few times a second, by the watch's thread or
                another; with the run's groups while the rank takes part in it.
        """
        self.stop = StopPoint()
        self.stop_signal = 0
        """The signal that stops the run, whichever rank it reached; 0 while there is none."""
        self.activity: Callable[[], Activity] = Activity
        """Says what the rank does; called in the watch's thread."""
        self._signals, self._report = signals or StopSignals(), report
        self._catches = signals is not None
        self._comm: Comm | None = None
        self._requested = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        """Start to report."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=_PERIOD_S)  # it may wait for a store that has gone

    def join_run(self, comm: Comm) -> None:
        """Take part in agreements from now on, and catch signals."""
        self._comm = comm
        if self._catches:
            self._signals.catch()

    def leave_run(self) -> None:
        """Take part in nothing more: the run is over and the others may be gone."""
        self._comm = None
        self.activity = partial(Activity, doing="finishing")

    def beat(self) -> None:
        """Report now: what the rank does has just changed."""
        self._report(self.activity(), self._comm)

    def _run(self) -> None:
        while not self._closed.wait(_PERIOD_S):
            try:
                self.beat()
                comm = self._comm
                if comm is not None and self.stop.end is None:
                    self._look_for_stop(comm)
            except RuntimeError as failure:  # the store is gone, with the process that hosted it
                self.stop.fail(failure)
                self._comm = None

    def _look_for_stop(self, comm: Comm) -> None:
        if not self._requested:
            if self._signals.asked:
                comm.post(_REQUEST, str(self._signals.number))
            requests = comm.posted([_REQUEST])
            if requests is None:
                return
            self._requested = True
            self.stop_signal = int(requests[0])
            comm.post(f"stop/{comm.rank}", "{} {}".format(*self.stop.freeze()))
        texts = comm.posted([f"stop/{rank}" for rank in range(comm.env.world_size)])
        if texts is not None:
            self.stop.settle(max(_moment(text) for text in texts))


def _moment(text: str) -> Moment:
    round_id, step = map(int, text.split())
    return round_id, step
