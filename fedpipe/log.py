"""Logging of the ``fedpipe`` logger: one handler, one format, and quiet libraries.

Modules use ``logging.getLogger(__name__)``; only this one decides what is shown, and by which rank.
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
"""Read by the libraries when they are imported, and stronger than a level set before that."""


class _Prefix(logging.Formatter):
    """Prefixes the time and the rank; a warning also says what it is."""

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
    """Writes to the ``sys.stderr`` of the moment, so that a live display can stand in for it."""

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

    Progress (INFO) is rank 0's to tell; the other ranks speak from WARNING on. With ``DEBUG`` every
    rank says everything and the libraries are heard too. A later call replaces an earlier one.

    Args:
        level: Name of the lowest level that is shown, in any case.
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
