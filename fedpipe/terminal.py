"""Standard output and error that never end a run: whoever reads them, whatever they can show."""

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
_NOBODY = (errno.EPIPE, errno.EIO)
"""What writing gives where the reader of a pipe, or the terminal, has gone."""


def prepare_output() -> None:
    r"""Make writing to the process' standard output and error safe from now on.

    What a terminal cannot show is written as its escape (``\xe9``). What nobody reads, as after
    ``| head`` or with ``>&-``, is dropped. Called once where a process starts; streams that are not
    the process' own, such as those of a test that captures them, are left alone.
    """
    _open_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            setattr(sys, name, _safe(stream))


def show(line: str) -> None:
    """Write a line to the standard output at once."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def _open_closed() -> None:
    """Open the standard descriptors that the process was started without.

    The next file or pipe would take the number, and what is meant for people would go there.
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
    """A file descriptor that swallows what nobody reads."""

    def write(self, data: Any) -> int:
        """Write as ``FileIO`` does."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _NOBODY:
                raise
            return memoryview(data).nbytes


def nobody_reads() -> bool:
    """Whether the reader of the standard output, or of the standard error, has gone."""
    poll = select.poll()
    for descriptor in OUTPUT:
        poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
