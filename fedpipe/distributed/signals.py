"""Signals that ask a run to stop, handled even while the main thread waits in C code. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_LIBC = ctypes.CDLL(None)
"""Opened here, because a child between fork and exec must not."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
"""Signals of a scheduler, of Ctrl-C, of a cluster before the time limit, and of a closed
terminal."""
EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: the same command continues where this one has ended."""
_REPEATED_S = 3.0
"""A second signal within this time counts as the same request, because a launcher may repeat the
signal that the terminal has sent."""


def stop_signals() -> list[signal.Signals]:
    """Return ``STOP_SIGNALS``, without SIGHUP if the process ignores it, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]


class SignalThread:
    """A thread that gets the number of every handled signal as soon as it arrives.

    Python runs signal handlers in its main thread only, and not while that waits inside torch. But
    the C part of Python's handling writes the number to a descriptor at once, which the thread
    reads.
    """

    def __init__(self, take: Callable[[int], None]) -> None:
        """Start to listen. Main thread only.

        Args:
            take: Called in the thread with the number of each signal.
        """
        self._take = take
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def close(self) -> None:
        """Stop to listen, and restore the descriptor that was set before. Main thread only."""
        signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)
        os.close(self._writer)

    def _run(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                self._take(number)
        os.close(self._reader)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask Linux to send this process a signal when its parent dies, as by SIGKILL."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    _LIBC.prctl(pr_set_pdeathsig, number)


def no_action(number: int, frame: FrameType | None) -> None:
    """Do nothing in the main thread, because a ``SignalThread`` handles the signal."""


class Interrupted(BaseException):
    """The user or the system has asked the run to stop; the message says where it is saved.

    Like ``KeyboardInterrupt`` it can be raised anywhere, and must pass a library's ``except
    Exception``.
    """


class Signals:
    """Signals of the supervisor: they stop it at once, or first make it ask the ranks to stop."""

    def __init__(self, *, at_once_s: float | None = None) -> None:
        """Start without a request.

        Args:
            at_once_s: Seconds after which the process is ended if it has to stop at once but its
                main thread waits inside torch; None never ends it.
        """
        self._at_once_s = at_once_s
        self.patient = False
        """Whether the ranks are training, so that they can be asked to save and stop."""
        self.asked = False
        """Whether the ranks have been or must be asked to stop."""
        self.number = 0
        """Number of the first signal; 0 before there is one."""
        self._ended = threading.Event()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Raise ``Interrupted`` on a signal; the first one while ``patient`` sets ``asked``.

        Outside the main thread, Python handles no signals: there the program's own handlers stay.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        thread = SignalThread(self._insist)
        before = {number: signal.signal(number, self._take) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            thread.close()
            self._ended.set()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self.asked or not self.patient:
            raise Interrupted
        self.asked = True

    def _insist(self, number: int) -> None:
        """End the process if its main thread does not; called in the signal thread."""
        if self._at_once_s is None or self.patient or number not in stop_signals():
            return
        if not self._ended.wait(self._at_once_s):
            os._exit(EXIT_INTERRUPTED)


class StopSignals:
    """Records a request to stop this process; a second request ends it at once."""

    def __init__(self) -> None:
        """Create the object without catching signals."""
        self._asked_at: float | None = None
        self._before: dict[int, Any] = {}
        self._thread: SignalThread | None = None
        self.number = 0
        """Number of the first signal; 0 before there is one."""

    def catch(self) -> None:
        """Catch the signals from now on, including those that were blocked. Main thread only."""
        self._thread = SignalThread(self._take)
        for number in stop_signals():
            self._before[number] = signal.signal(number, no_action)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def release(self) -> None:
        """Restore the handlers that were set before. Main thread only."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    @property
    def catches(self) -> bool:
        """Whether the signals are caught now."""
        return bool(self._before)

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived."""
        return self._asked_at is not None

    def _take(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        if self._asked_at is None:
            self.number = number
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > _REPEATED_S:
            os._exit(EXIT_INTERRUPTED)


def _forget() -> None:
    with contextlib.suppress(ValueError):  # forked by another thread
        signal.set_wakeup_fd(-1)


# A signal to a forked child, such as at the end of a pool, must not reach this process' thread.
os.register_at_fork(after_in_child=_forget)
