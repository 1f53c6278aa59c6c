"""Stops a rank whose launcher has gone: nobody else could stop it, or would ever hear from it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from fedpipe.terminal import nobody_reads

_LOOK_S = 0.5


@contextlib.contextmanager
def stopped_with_launcher() -> Iterator[None]:
    """Send this process SIGTERM, once, when the process that started it has gone.

    A launcher that is killed says nothing to its ranks. Nor does one that has started them over ssh
    and ends with its terminal: a second launcher on the rank's node lives on, but what the ranks
    write leads nowhere. They would have no owner, and would keep the run's lock.
    """
    parent, closed = os.getppid(), threading.Event()

    def look() -> None:
        while not closed.wait(_LOOK_S):
            if os.getppid() != parent or nobody_reads():
                sys.stderr.write("what started this rank has gone: it saves and stops\n")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=look, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
