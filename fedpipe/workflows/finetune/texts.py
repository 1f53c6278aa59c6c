"""Examples beside those of ``fedpipe evaluate``: plain texts, sentiment and topics, columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe.config.finetune import CAUSAL_LM, TaskConfig
from fedpipe.data.lines import json_rows, shown
from fedpipe.data.reading import NO_VALUE
from fedpipe.data.tasks.files import TaskFiles
from fedpipe.data.tasks.reading import Example
from fedpipe.data.tasks.registry import Defaults, Task
from fedpipe.data.values import name_of, text_of
from fedpipe.errors import CorpusError

_SETTINGS = Defaults(learning_rate=2e-5, batch_size=32, num_epochs=3, max_length=128)


def _text_task(name: str, labels: tuple[str, ...], *files: str, cites: str) -> Task:
    return Task(
        name=name, kind="classification", metrics=("accuracy",), defaults=_SETTINGS, labels=labels,
        files=files, cites=cites,
    )  # fmt: skip


SENTIMENT_TASKS = {
    task.name: task
    for task in (
        _text_task("imdb", ("negative", "positive"), "imdb_subset", cites="Maas et al. 2011"),
        _text_task(
            "movie-reviews", ("negative", "positive"), "movie_reviews_v2",
            cites="Pang and Lee 2004",
        ),
        _text_task(
            "ag-news", ("World", "Sports", "Business", "Sci/Tech"), cites="Zhang et al. 2015"
        ),
    )
}  # fmt: skip
"""Text classification of the studies with many clients."""

_TRAIN, _TEST = ("train",), ("test", "valid", "dev")


def read_texts(
    task: TaskConfig,
) -> tuple[list[list[Example]], tuple[Sequence[str], Sequence[str]] | None]:
    """Read the texts of a language-model task.

    Args:
        task: ``data`` is a folder with a train and a test, valid or dev file: ``*train*.jsonl`` and
            the like, gzipped or not, with a column ``text``.

    Returns:
        Examples of the training and of the held-out texts; with ``column`` its values.

    Raises:
        CorpusError: A file is missing or cannot be read.
    """
    splits, columns = [], []
    for path in text_files(task):
        rows = _rows(path)
        splits.append([Example((_text(row, where),), 0) for where, row in rows])
        if task.column:
            columns.append([_owner(row, task.column, where) for where, row in rows])
    return splits, (columns[0], columns[1]) if columns else None


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


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(where, row) for where, _, row in json_rows(str(path), key="task.data")]


def _text(row: dict[str, Any], where: str) -> str:
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
    return text


def _owner(row: dict[str, Any], column: str, where: str) -> str:
    value = _cell(row, column, where)
    try:
        return name_of(value) or NO_VALUE
    except TypeError as error:
        raise CorpusError(
            f"task.column: expected text or a number in column {column!r} of {where}, got"
            f" {shown(repr(value))}. Choose the column that names the owner."
        ) from error


def _cell(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise CorpusError(
            f"task.data: expected a column {column!r} in {where}, got {', '.join(row) or 'none'}."
            " Rename the column."
        )
    return row[column]


def column_values(files: TaskFiles, split: str, column: str) -> list[str]:
    """Read a column of a split beside the task's own.

    Args:
        files: Of the task.
        split: Name of the split.
        column: Of its rows.

    Raises:
        CorpusError: The files are no JSON lines, or a row does not have the column.
    """
    if files.format != "jsonl":
        raise CorpusError(
            f"task.column: expected JSON lines, got {files.format_name} in {files.folder}. Use"
            " another task.split."
        )
    return [_owner(row, column, where) for where, row in _rows(Path(files.splits[split]))]
