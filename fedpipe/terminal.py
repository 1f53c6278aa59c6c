"""Keep a run alive when its output cannot be shown, or when its reader has gone."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any

from fedpipe.printable import printable

_STANDARD = {"stdin": 0, "stdout": 1, "stderr": 2}
OUTPUT = (1, 2)
"""Descriptors of the standard output and error."""
_READER_GONE = (errno.EPIPE, errno.EIO)
"""Errors of a write to a pipe without a reader, or to a terminal that was closed."""


def prepare_output() -> None:
    r"""Make writing to the standard output and error of this process safe from now on.

    A character that the terminal cannot show is written as its escape (``\xe9``). Text without a
    reader, as after ``| head`` or with ``>&-``, is dropped. Called once when a process starts; a
    stream that was replaced before, for example by a test that captures it, is left alone.
    """
    _open_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            setattr(sys, name, _safe(stream))


def show(line: str) -> None:
    """Write a line to the standard output and flush it."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def _open_closed() -> None:
    """Open the standard descriptors that the process was started without.

    Otherwise the next file or pipe would get their number, and messages for people would go there.
    """
    for name, number in _STANDARD.items():
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number
        if getattr(sys, name) is None:
            stream = open(number, "w" if number in OUTPUT else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _safe(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    descriptor = _Descriptor(stream.fileno(), "w", closefd=False)
    buffered = isinstance(stream.buffer, io.BufferedWriter)  # not under python -u
    return io.TextIOWrapper(
        io.BufferedWriter(descriptor) if buffered else descriptor,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Descriptor(io.FileIO):
    """A file descriptor that drops what is written after its reader has gone."""

    def write(self, data: Any) -> int:
        """Write as ``FileIO`` does."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READER_GONE:
                raise
            return memoryview(data).nbytes


def reader_has_gone() -> bool:
    """Whether the reader of the standard output, or of the standard error, has gone."""
    poll = select.poll()
    for descriptor in OUTPUT:
        poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
