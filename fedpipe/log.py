"""Set up the ``fedpipe`` logger: one handler, one format, and quiet libraries.

Modules log with ``logging.getLogger(__name__)``; this one alone decides which ranks show what.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from fedpipe.printable import printable

_NOISY = ("DeepSpeed", "transformers", "datasets")
"""Loggers of the libraries; DeepSpeed's is spelt like this."""
_VERBOSITY_VARIABLES = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY")
"""Environment variables that the libraries read at import; they override a level set before."""


class _Prefix(logging.Formatter):
    """Prefixes the time and the rank, and the level unless it is INFO."""

    def __init__(self, rank: int | None) -> None:
        self._rank = "" if rank is None else f"r{rank} "
        super().__init__(datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        prefix = f"{self.formatTime(record, self.datefmt)} {self._rank}{level}"
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return prefix + printable(text).replace("\n", "\n" + " " * len(prefix))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current ``sys.stderr``, which a live display replaces while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")


class _OnlyErrors(logging.Filter):
    """Keeps a library quiet even when its import sets its own level and handler afterwards."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def setup(level: str = "INFO", rank: int | None = None) -> None:
    """Configure the ``fedpipe`` logger; the root logger is never touched.

    At level INFO only rank 0 shows progress; other ranks show warnings and errors. At level DEBUG
    every rank shows everything, and the libraries log too. A later call replaces an earlier one.

    Args:
        level: Name of the lowest level that is shown, in upper or lower case.
        rank: This process's rank, shown in the prefix; ``None`` for a process outside the grid.
    """
    shown = logging.getLevelNamesMapping()[level.upper()]
    if rank not in (None, 0) and shown == logging.INFO:
        shown = logging.WARNING
    handler = _StderrHandler()
    handler.setFormatter(_Prefix(rank))
    logger = logging.getLogger("fedpipe")
    for old in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(shown)
    logger.propagate = False
    _quiet_libraries(quiet=shown > logging.DEBUG)


def _quiet_libraries(*, quiet: bool) -> None:
    for name in _NOISY:
        library = logging.getLogger(name)
        for old in [f for f in library.filters if isinstance(f, _OnlyErrors)]:
            library.removeFilter(old)
        if quiet:
            library.addFilter(_OnlyErrors())
            library.setLevel(logging.ERROR)
        elif library.level == logging.ERROR:
            library.setLevel(logging.INFO)
    if quiet:
        for variable in _VERBOSITY_VARIABLES:
            os.environ.setdefault(variable, "error")
