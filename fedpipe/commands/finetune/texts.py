"""Texts without labels, and the column that says whose an example is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpipe.config.finetune import CAUSAL_LM, TaskConfig
from fedpipe.data.lines import shown
from fedpipe.data.reading import NO_VALUE
from fedpipe.data.tasks.files import TaskFiles
from fedpipe.data.tasks.reading import (
    Example,
    LeftOut,
    csv_rows,
    json_lines,
    left_out_text,
    usable,
)
from fedpipe.data.values import name_of, text_of
from fedpipe.errors import CorpusError

_TRAIN, _TEST = ("train",), ("test", "valid", "dev")


def read_texts(
    task: TaskConfig,
) -> tuple[list[list[Example]], tuple[Sequence[str], Sequence[str]] | None, LeftOut]:
    """Read the texts of a language-model task.

    Args:
        task: ``data`` is a folder with a train and a test, valid or dev file: ``*train*.jsonl`` and
            the like, gzipped or not, with a column ``text``.

    Returns:
        Examples of the training and of the held-out texts; with ``column`` its values; what was
        left out.

    Raises:
        CorpusError: A file is missing, cannot be read, or has too many rows without text.
    """
    splits, columns = [], []
    left_out: LeftOut = {}
    for name, path in zip(("train", "test"), text_files(task), strict=True):
        examples, faults, first = usable(json_lines(str(path), key="task.data"), _text)
        splits.append(examples)
        if first is not None:
            left_out[name] = left_out_text(first, faults, len(examples), folder=task.data)
        if task.column:
            columns.append(_owners(path, task.column, examples))
    return splits, (columns[0], columns[1]) if columns else None, left_out


def text_files(task: TaskConfig) -> tuple[Path, Path]:
    """Find the files of a language-model task: training texts, and held-out ones.

    Raises:
        CorpusError: One is missing.
    """
    folder = Path(task.data)
    return _find(folder, _TRAIN), _find(folder, _TEST)


def _find(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        found = sorted(folder.glob(f"*{name}*.jsonl*")) if folder.is_dir() else []
        if found:
            return found[0]
    raise CorpusError(
        f"task.data: expected a folder with a file *{names[0]}*.jsonl for task.name={CAUSAL_LM},"
        f" got {str(folder)!r}. Write one JSON object with a column 'text' per line."
    )


def _owners(path: Path, column: str, examples: Sequence[Example]) -> list[str]:
    """Read a column of the rows that the examples are of."""
    read = json_lines if ".jsonl" in path.name else csv_rows
    rows = dict(read(str(path), key="task.data"))
    chosen = ((rows[example.where], example.where) for example in examples)
    return [_owner(row, column, where) for row, where in chosen if isinstance(row, Mapping)]


def _text(row: Mapping[str, Any], where: str) -> Example:
    value = _cell(row, "text", where)
    try:
        text = text_of(value)
    except TypeError:
        text = None
    if text is None:
        raise CorpusError(
            f"task.data: expected text in column 'text' of {where}, got {shown(repr(value))}."
            " Correct the row."
        )
    return Example((text,), 0, where)


def _owner(row: Mapping[str, Any], column: str, where: str) -> str:
    value = _cell(row, column, where)
    try:
        return name_of(value) or NO_VALUE
    except TypeError as error:
        raise CorpusError(
            f"task.column: expected text or a number in column {column!r} of {where}, got"
            f" {shown(repr(value))}. Choose the column that names the owner."
        ) from error


def _cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise CorpusError(
            f"task.data: expected a column {column!r} in {where}, got {', '.join(row) or 'none'}."
            " Rename the column."
        )
    return row[column]


def column_values(
    files: TaskFiles, split: str, column: str, examples: Sequence[Example]
) -> list[str]:
    """Read a column of a split beside the task's own.

    Args:
        files: Of the task.
        split: Name of the split.
        column: Of its rows.
        examples: Of the split; rows without one are left out.

    Raises:
        CorpusError: The files are neither JSON lines nor CSV, or a row does not have the column.
    """
    if files.format not in ("jsonl", "csv"):
        raise CorpusError(
            f"task.column: expected JSON lines or CSV, got {files.format_name} in {files.folder}."
            " Use another task.split."
        )
    return _owners(Path(files.splits[split]), column, examples)
