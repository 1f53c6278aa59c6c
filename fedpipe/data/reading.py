"""Documents out of sources, one at a time, every fault named with its file and line."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fedpipe.data.sources import Columns, Source
from fedpipe.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Document = tuple[str, str]
"""A document's text, and its value of the partition column ("" without one)."""

NO_VALUE = "(none)"
"""Value of a document whose partition column is null."""

_HEAD_BYTES = 1 << 20
_TICK_LINES = 1024
_ROWS = 256
_SHOWN = 60


def check(source: Source, *, columns: Columns) -> None:
    """Check what can be checked without reading everything: the first megabyte, the first row.

    Args:
        source: Not of the hub: that would be a download.
        columns: Must exist.

    Raises:
        CorpusError: The head is binary, not UTF-8, empty or not in its format; a column is missing.
    """
    if source.kind == "parquet":
        columns.require(_parquet_columns(source), where=source.path)
    elif source.kind == "folder":
        columns.require(_folder_columns(source), where=source.path)
    elif source.kind != "hub":
        _check_head(source)
        first = next(read(source, columns=columns), None)
        if first is None:
            raise CorpusError(
                f"{source.key}: expected at least one document, got only empty ones in "
                f"{source.path!r}. Remove it from the list or fill it."
            )


def read(
    source: Source, *, columns: Columns, tick: Callable[[int], None] | None = None
) -> Iterator[Document]:
    """Read the documents of a source in order; empty ones are left out.

    Args:
        source: What to read.
        columns: Which columns hold text and owner.
        tick: Called now and then with the bytes read so far; text files only.

    Yields:
        Text and partition value.

    Raises:
        CorpusError: A line or row cannot be used.
    """
    if source.kind == "txt":
        columns.require([columns.text], where=f"{source.path}, which is plain text")
        for _, line in _lines(source, tick):
            if line.strip():
                yield line, ""
    elif source.kind == "jsonl":
        yield from _read_jsonl(source, columns, tick)
    else:
        yield from _read_rows(source, columns)


def open_dataset(source: Source) -> Dataset | IterableDataset:
    """Open a Parquet file (streamed), a folder or a hub dataset (both memory-mapped).

    Args:
        source: Not a text file.

    Returns:
        The dataset of Hugging Face ``datasets``.

    Raises:
        CorpusError: It cannot be opened or fetched.
    """
    import datasets

    # The caller shows progress; a second bar would tear its display.
    datasets.disable_progress_bars()
    try:
        if source.kind == "parquet":
            return datasets.Dataset.from_parquet(source.path, streaming=True)
        if source.kind == "folder":
            return datasets.load_from_disk(source.path)
        name, _, split = source.path.rpartition(":")
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # every backend of the hub raises classes of its own
        raise CorpusError(
            f"{source.key}: expected a readable dataset, got {source.path!r}: {_one_line(error)}. "
            "Where the network is closed, save it elsewhere with save_to_disk and name that folder."
        ) from error


def _read_rows(source: Source, columns: Columns) -> Iterator[Document]:
    dataset = open_dataset(source)
    if dataset.column_names is not None:
        columns.require(dataset.column_names, where=source.path)
    wanted = [name for name in dict.fromkeys((columns.text, columns.partition)) if name]
    first_row = 1
    batches = iter(dataset.select_columns(wanted).iter(batch_size=_ROWS))
    while True:
        try:
            batch: dict[str, list[Any]] | None = next(batches, None)
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{source.key}: expected readable rows in {source.path!r}, got a fault after row "
                f"{first_row - 1}: {_one_line(error)}. Write the file again."
            ) from error
        if batch is None:
            return
        texts = batch[columns.text]
        for index, text in enumerate(texts):
            value = batch[columns.partition][index] if columns.partition else ""
            where = f"row {first_row + index} of {source.path}"
            if document := _document(source, columns, text, value, where):
                yield document
        first_row += len(texts)


def _read_jsonl(
    source: Source, columns: Columns, tick: Callable[[int], None] | None
) -> Iterator[Document]:
    for number, line in _lines(source, tick):
        if not line or line.isspace():
            continue
        where = f"{source.path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise CorpusError(
                f"{source.key}: expected a JSON object per line, got {_shown(line)} in {where}. "
                "Correct the line, or rename the file to .txt if it is plain text."
            )
        if columns.text not in row or (columns.partition and columns.partition not in row):
            columns.require(row, where=where)
        text = row[columns.text]
        if isinstance(text, str) and "\\u" in line:
            # JSON can spell half a surrogate pair, which no tokenizer can encode.
            text = text.encode("utf-8", "replace").decode()
        value = row[columns.partition] if columns.partition else ""
        if document := _document(source, columns, text, value, where):
            yield document


def _document(
    source: Source, columns: Columns, text: object, value: object, where: str
) -> Document | None:
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        raise CorpusError(
            f"data.text_column: expected text in column {columns.text!r} of {where}, "
            f"got {_shown(repr(text))}. Choose the column that holds the documents."
        )
    return text, NO_VALUE if value is None else str(value)


def _lines(source: Source, tick: Callable[[int], None] | None) -> Iterator[tuple[int, str]]:
    """Read numbered lines without their end; a byte order mark is dropped."""
    with _opened(source) as (stream, raw):
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if b"\0" in line:
                raise _binary(source, number)
            try:
                yield number, line.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(source, number, line[error.start]) from error
            if tick is not None and number % _TICK_LINES == 0:
                tick(raw.tell())


@contextmanager
def _opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a text file; gives the unpacked stream and the file itself."""
    try:
        with open(source.path, "rb") as raw:
            if not source.path.endswith(".gz"):
                yield raw, raw
                return
            with gzip.open(raw, "rb") as stream:
                yield stream, raw  # type: ignore[misc]  # a GzipFile reads like any binary file
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(
            f"{source.key}: expected a readable file, got {source.path!r}: {_one_line(error)}. "
            "Check its permissions, or pack it again."
        ) from error


def _check_head(source: Source) -> None:
    """Decode the first megabyte, before any line is parsed."""
    with _opened(source) as (stream, _):
        head = stream.read(_HEAD_BYTES)
    if not head:
        raise CorpusError(
            f"{source.key}: expected text, got the empty archive {source.path!r}. "
            "Remove it from the list or fill it."
        )
    zero = head.find(b"\0")
    if zero >= 0:
        raise _binary(source, head.count(b"\n", 0, zero) + 1)
    try:
        # Not final: the cut at a megabyte may fall inside a character.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise _not_utf8(source, head.count(b"\n", 0, error.start) + 1, head[error.start]) from error


def _parquet_columns(source: Source) -> list[str]:
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(source.path).names)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{source.key}: expected a Parquet file, got {source.path!r}: {_one_line(error)}. "
            "Write the file again."
        ) from error


def _folder_columns(source: Source) -> list[str]:
    try:
        content = json.loads(Path(source.path, "dataset_info.json").read_text(encoding="utf-8"))
        return list(content["features"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{source.key}: expected a folder written by save_to_disk, got {source.path!r} with an "
            "unreadable dataset_info.json. Save the dataset again."
        ) from error


def _binary(source: Source, line: int) -> CorpusError:
    return CorpusError(
        f"{source.key}: expected text, got a NUL byte (binary data) in {source.path}:{line}. "
        "Remove the file from the list or convert it to text."
    )


def _not_utf8(source: Source, line: int, byte: int) -> CorpusError:
    return CorpusError(
        f"{source.key}: expected UTF-8 text, got the byte 0x{byte:02x} in {source.path}:{line}. "
        "Convert the file, for example with iconv -f latin1 -t utf-8."
    )


def _shown(line: str) -> str:
    return repr(line if len(line) <= _SHOWN else line[:_SHOWN] + "...")


def _one_line(error: BaseException) -> str:
    """Shorten an exception of a library to its first line, without the full stop."""
    text = next(itertools.chain(str(error).splitlines(), [""]))
    return f"{type(error).__name__}: {text}".rstrip(". ")
