"""Read text files line by line; every error names the file and the line. No torch."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from fedpipe.errors import CorpusError

_HEAD_BYTES = 1 << 20
_TICK_LINES = 1024
_SHOWN = 60


def json_rows(
    path: str, *, key: str, tick: Callable[[int], None] | None = None
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Read the rows of a JSON Lines file; empty lines are skipped.

    Args:
        path: The file; gzipped if its name ends with .gz.
        key: The configuration key that names the file, for errors.
        tick: Called every 1024 lines with the bytes read so far.

    Yields:
        The place of the row (``file:line``), its line, and the parsed row.

    Raises:
        CorpusError: A line is not a JSON object, or the file cannot be read.
    """
    for number, line in text_lines(path, key=key, tick=tick):
        if not line or line.isspace():
            continue
        where = f"{path}:{number}"
        yield where, line, json_row(line, where, key=key)


def json_row(line: str, where: str, *, key: str) -> dict[str, Any]:
    """Parse a line of a JSON Lines file.

    Args:
        line: A line that is not empty.
        where: The place of the line, for errors.
        key: The configuration key that names the file, for errors.

    Raises:
        CorpusError: The line is not a JSON object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise CorpusError(
            f"{key}: expected a JSON object per line, got {shown(line)} in {where}. Correct "
            "the line, or rename the file if it is not JSON lines."
        )
    return row


def text_lines(
    path: str, *, key: str, tick: Callable[[int], None] | None = None
) -> Iterator[tuple[int, str]]:
    """Read lines with their numbers, without line ends and without a byte order mark.

    The arguments are those of ``json_rows``.

    Raises:
        CorpusError: The file cannot be read, is binary or is not UTF-8.
    """
    for number, line in lines_or_faults(path, key=key, tick=tick):
        if isinstance(line, CorpusError):
            raise line
        yield number, line


def lines_or_faults(
    path: str, *, key: str, tick: Callable[[int], None] | None = None
) -> Iterator[tuple[int, str | CorpusError]]:
    """Read lines as ``text_lines`` does, but yield the error of a line that is not text.

    The arguments are those of ``json_rows``.

    Raises:
        CorpusError: The file cannot be read.
    """
    with _opened(path, key) as (stream, raw):
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            yield number, _decoded(line, path, key, number)
            if tick is not None and number % _TICK_LINES == 0:
                tick(raw.tell())


def _decoded(line: bytes, path: str, key: str, number: int) -> str | CorpusError:
    if b"\0" in line:
        return _binary(path, key, number)
    try:
        return line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        return _not_utf8(path, key, number, line[error.start])


def check_head(path: str, *, key: str) -> None:
    """Check that the first megabyte of a file is text, before any line is parsed.

    Raises:
        CorpusError: The file is empty or cannot be read, or its head is binary or not UTF-8.
    """
    with _opened(path, key) as (stream, _):
        head = stream.read(_HEAD_BYTES)
    if not head:
        raise CorpusError(
            f"{key}: expected text, got the empty archive {path!r}. Remove it from the list or "
            "fill it."
        )
    zero = head.find(b"\0")
    if zero >= 0:
        raise _binary(path, key, head.count(b"\n", 0, zero) + 1)
    try:
        # Incremental, because the first megabyte may end inside a character.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        number = head.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, key, number, head[error.start]) from error


@contextmanager
def _opened(path: str, key: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a text file; yield the unpacked stream and the file itself."""
    try:
        with open(path, "rb") as raw:
            if not path.endswith(".gz"):
                yield raw, raw
                return
            with gzip.open(raw, "rb") as stream:
                yield stream, raw  # type: ignore[misc]  # a GzipFile reads like any binary file
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(
            f"{key}: expected a readable file, got {path!r}: {one_line(error)}. Check its "
            "permissions, or pack it again."
        ) from error


def _binary(path: str, key: str, line: int) -> CorpusError:
    return CorpusError(
        f"{key}: expected text, got a NUL byte (binary data) in {path}:{line}. Remove the file "
        "from the list or convert it to text."
    )


def _not_utf8(path: str, key: str, line: int, byte: int) -> CorpusError:
    return CorpusError(
        f"{key}: expected UTF-8 text, got the byte 0x{byte:02x} in {path}:{line}. Convert the "
        "file, for example with iconv -f latin1 -t utf-8."
    )


def shown(text: str) -> str:
    """Shorten a text for an error message."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def one_line(error: BaseException) -> str:
    """Shorten an exception of a library to its class and first line, without the full stop."""
    text = next(itertools.chain(str(error).splitlines(), [""]))
    return f"{type(error).__name__}: {text}".rstrip(". ")
