"""Signals that are heard whatever the main thread does, also while it waits in C for a peer."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType


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


def _forget() -> None:
    with contextlib.suppress(ValueError):  # forked by another thread
        signal.set_wakeup_fd(-1)


# A signal to a forked child, such as the end of a pool, is none to this process.
os.register_at_fork(after_in_child=_forget)
