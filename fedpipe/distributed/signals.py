"""Signals that ask a run to stop, heard whatever the main thread does. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
"""Ask a run to stop: a scheduler, Ctrl-C, a cluster's warning ahead of time, a closed terminal."""
EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on where this one ended."""
_REPEATED_S = 3.0
"""A launcher may pass on the signal that the terminal has sent already; later ones are meant."""


def stop_signals() -> list[signal.Signals]:
    """Return those of ``STOP_SIGNALS`` that count here: nohup has a process ignore SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]


class SignalThread:
    """A thread that is told of every signal with a handler in Python, as soon as it comes.

    Python runs handlers between two steps of its main thread; one that waits inside torch makes
    none. The C part of its handling writes the number to a descriptor at once.
    """

    def __init__(self, take: Callable[[int], None]) -> None:
        """Start to listen. Main thread only.

        Args:
            take: Called in the thread with the number of the signal.
        """
        self._take = take
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def close(self) -> None:
        """Give the signals back to whoever listened before. Main thread only."""
        signal.set_wakeup_fd(self._before, warn_on_full_buffer=False)
        os.close(self._writer)

    def _run(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                self._take(number)
        os.close(self._reader)


def no_action(number: int, frame: FrameType | None) -> None:
    """Handle a signal in the main thread: a ``SignalThread`` has taken it already."""


class Interrupted(BaseException):
    """The user or the system asked the run to stop; the text says where it is saved.

    Like ``KeyboardInterrupt`` it may rise anywhere, so a library's ``except Exception`` must not
    swallow it.
    """


class Signals:
    """What the signals mean to the supervisor: stop at once, or first of all ask the ranks to."""

    def __init__(self, *, at_once_s: float | None = None) -> None:
        """Nobody has asked yet.

        Args:
            at_once_s: After this a process ends that is to stop at once and does not, because its
                main thread waits inside torch; None leaves that to it.
        """
        self._at_once_s = at_once_s
        self.patient = False
        """The ranks train: they can be asked to save and stop."""
        self.asked = False
        """They are to be, or have been, asked."""
        self.number = 0
        """The first signal that has come; 0 while there is none."""
        self._ended = threading.Event()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Turn the signals into ``Interrupted``, the first one while patient into ``asked``."""
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
        """End the process if its main thread does not. Called in a thread of its own."""
        if self._at_once_s is None or self.patient or number not in stop_signals():
            return
        if not self._ended.wait(self._at_once_s):
            os._exit(EXIT_INTERRUPTED)


class StopSignals:
    """Remembers that this process was asked to stop; a second request ends it at once."""

    def __init__(self) -> None:
        """Catch nothing yet."""
        self._asked_at: float | None = None
        self._before: dict[int, Any] = {}
        self._thread: SignalThread | None = None
        self.number = 0
        """The first signal that has come; 0 while there is none."""

    def catch(self) -> None:
        """Catch the signals from now on, also those that were blocked. Main thread only."""
        self._thread = SignalThread(self._take)
        for number in stop_signals():
            self._before[number] = signal.signal(number, no_action)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def release(self) -> None:
        """Give the signals back to whoever caught them before. Main thread only."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    @property
    def catches(self) -> bool:
        """They are caught now."""
        return bool(self._before)

    @property
    def asked(self) -> bool:
        """One has come."""
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


# A signal to a forked child, such as the end of a pool, is none to this process.
os.register_at_fork(after_in_child=_forget)
