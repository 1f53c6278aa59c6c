"""Read documents from sources, one at a time; every error names the file and line or row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpipe.data.lines import check_head, json_rows, one_line, shown, text_lines
from fedpipe.data.sources import Columns, Source
from fedpipe.data.values import name_of, text_of
from fedpipe.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Document = tuple[str, str]
"""Text of a document, and its value in the partition column ("" without such a column)."""

NO_VALUE = "(none)"
"""Value of a document whose cell in the partition column is missing."""

_ROWS = 256


def check(source: Source, *, columns: Columns) -> None:
    """Check what needs no full reading: the first megabyte, the first row and the columns.

    Args:
        source: The source; nothing of a hub dataset is checked, because it would be downloaded.
        columns: The columns that must exist.

    Raises:
        CorpusError: The head is empty, binary or not UTF-8, or a column is missing.
    """
    if source.kind == "parquet":
        columns.require(_parquet_columns(source), where=source.path)
    elif source.kind == "folder":
        columns.require(_folder_columns(source), where=source.path)
    elif source.kind != "hub":
        check_head(source.path, key=source.key)
        first = next(read(source, columns=columns), None)
        if first is None:
            raise CorpusError(
                f"{source.key}: expected at least one document, got only empty ones in "
                f"{source.path!r}. Remove it from the list or fill it."
            )


def read(
    source: Source, *, columns: Columns, tick: Callable[[int], None] | None = None
) -> Iterator[Document]:
    """Read the documents of a source in order; rows without text are skipped.

    Args:
        source: The source to read.
        columns: The columns that hold text and owner.
        tick: Called every 1024 lines of a text file with the bytes read so far.

    Yields:
        Text and partition value of each document.

    Raises:
        CorpusError: A line or row cannot be used.
    """
    if source.kind == "txt":
        columns.require([columns.text], where=f"{source.path}, which is plain text")
        for _, line in text_lines(source.path, key=source.key, tick=tick):
            if (text := text_of(line)) is not None:
                yield text, ""
    elif source.kind == "jsonl":
        yield from _read_jsonl(source, columns, tick)
    else:
        yield from _read_rows(source, columns)


def open_dataset(source: Source) -> Dataset | IterableDataset:
    """Open a Parquet file (streamed), a folder or a hub dataset (both memory-mapped).

    Args:
        source: Any source that is not a text file.

    Returns:
        A dataset of Hugging Face ``datasets``.

    Raises:
        CorpusError: The dataset cannot be opened or downloaded.
    """
    import datasets

    # The caller shows progress; the bars of datasets would break its display.
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
            f"{source.key}: expected a readable dataset, got {source.path!r}: {one_line(error)}. "
            "Where the network is closed, save it elsewhere with save_to_disk and name that folder."
        ) from error


def _read_rows(source: Source, columns: Columns) -> Iterator[Document]:
    dataset = open_dataset(source)
    if dataset.column_names is not None:
        columns.require(dataset.column_names, where=source.path)
    wanted = [name for name in dict.fromkeys((columns.text, columns.partition)) if name]
    # A column of classes holds their numbers; the features hold their names.
    owners = (dataset.features or {}).get(columns.partition)
    names = getattr(owners, "names", None)
    first_row = 1
    batches = iter(dataset.select_columns(wanted).iter(batch_size=_ROWS))
    while True:
        try:
            batch: dict[str, list[Any]] | None = next(batches, None)
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{source.key}: expected readable rows in {source.path!r}, got a fault after row "
                f"{first_row - 1}: {one_line(error)}. Write the file again."
            ) from error
        if batch is None:
            return
        texts = batch[columns.text]
        for index, text in enumerate(texts):
            value = batch[columns.partition][index] if columns.partition else ""
            if names and isinstance(value, int):
                value = names[value] if 0 <= value < len(names) else None
            where = f"row {first_row + index} of {source.path}"
            if document := _document(columns, text, value, where):
                yield document
        first_row += len(texts)


def _read_jsonl(
    source: Source, columns: Columns, tick: Callable[[int], None] | None
) -> Iterator[Document]:
    for where, _, row in json_rows(source.path, key=source.key, tick=tick):
        if columns.text not in row or (columns.partition and columns.partition not in row):
            columns.require(row, where=where)
        value = row[columns.partition] if columns.partition else ""
        if document := _document(columns, row[columns.text], value, where):
            yield document


def _document(columns: Columns, cell: object, owner: object, where: str) -> Document | None:
    try:
        text = text_of(cell)
    except TypeError as error:
        raise CorpusError(
            f"data.text_column: expected text in column {columns.text!r} of {where}, "
            f"got {shown(repr(cell))}. Choose the column that holds the documents."
        ) from error
    if text is None:
        return None
    if not columns.partition:
        return text, ""
    try:
        return text, name_of(owner) or NO_VALUE
    except TypeError as error:
        raise CorpusError(
            f"data.partition_column: expected text or a number in column {columns.partition!r} of "
            f"{where}, got {shown(repr(owner))}. Choose the column that names the owner."
        ) from error


def _parquet_columns(source: Source) -> list[str]:
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_metadata(source.path)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{source.key}: expected a Parquet file, got {source.path!r}: {one_line(error)}. "
            "Write the file again."
        ) from error
    if found.num_rows == 0:
        raise CorpusError(
            f"{source.key}: expected at least one document, got the Parquet file {source.path!r} "
            "without rows. Remove it from the list or fill it."
        )
    return list(found.schema.to_arrow_schema().names)


def _folder_columns(source: Source) -> list[str]:
    try:
        content = json.loads(Path(source.path, "dataset_info.json").read_text(encoding="utf-8"))
        return list(content["features"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{source.key}: expected a folder written by save_to_disk, got {source.path!r} with an "
            "unreadable dataset_info.json. Save the dataset again."
        ) from error
