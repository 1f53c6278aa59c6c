"""Read and tokenise the examples of a fine-tuning, and assign them to clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.commands.finetune.clients import (
    Labels,
    class_labels,
    deal_out,
    describe,
    no_labels,
    number_labels,
    tag_labels,
)
from fedpipe.commands.finetune.prepared import TuningData
from fedpipe.config.evaluation import DEFAULT_TASK, Kind
from fedpipe.config.finetune import CAUSAL_LM, FinetuneConfig, TaskConfig
from fedpipe.data.digests import FileDigests, file_digests
from fedpipe.data.lines import shown
from fedpipe.data.reading import NO_VALUE
from fedpipe.data.tasks.encoding import Encoded, encode
from fedpipe.data.tasks.files import TaskFiles, find_files
from fedpipe.data.tasks.reading import (
    Example,
    LeftOut,
    csv_rows,
    hub_fingerprint,
    json_lines,
    left_out_text,
    read_task,
    usable,
)
from fedpipe.data.tasks.registry import SENTIMENT_TASKS, Task, TaskSpec, find_task, tag_names
from fedpipe.data.tasks.task_file import is_known, own_tasks, read_task_file
from fedpipe.data.values import name_of, text_of
from fedpipe.errors import ConfigError, CorpusError

_USED = ("train", "test")
"""Splits that a fine-tuning reads."""
_TRAIN, _TEST = ("train",), ("test", "valid", "dev")
"""Words in the names of the files of a language-model task."""


def tuning_task(config: FinetuneConfig) -> Task | None:
    """Return the task of a configuration; None for a language-model task.

    Raises:
        ConfigError: The task does not exist, or its task file cannot be used.
    """
    asked = config.task
    name = asked.name
    if asked.file:
        task = read_task_file(asked.file, key="task.file")
        if name not in ("", task.name):
            raise ConfigError(
                f"task.name: expected {task.name}, the task of {task.file} (task.file), got"
                f" {name!r}. Leave task.file out, or set task.name={task.name}."
            )
        return task
    if name == CAUSAL_LM:
        return None
    if name in SENTIMENT_TASKS:
        return SENTIMENT_TASKS[name]
    own = own_tasks(asked.data) if not is_known(name) else []
    if not name and len(own) > 1:
        raise ConfigError(
            f"task.name: expected one of {', '.join(task.name for task in own)}, the task files in"
            f" {asked.data}, got nothing. Choose one."
        )
    if not name and own:
        return own[0]
    try:
        return find_task(name or DEFAULT_TASK, own=own)
    except ConfigError as error:
        others = ", ".join((CAUSAL_LM, *SENTIMENT_TASKS))
        text = str(error).replace("evaluation.tasks: expected one of ", "")
        raise ConfigError(f"task.name: expected one of {others}, {text}") from error


def kind_of(config: FinetuneConfig) -> Kind:
    """Return the kind of output that the head of a configuration's task predicts."""
    task = tuning_task(config)
    return "causal-lm" if task is None else task.kind


def prepare_examples(config: FinetuneConfig, tokenizer: Any) -> TuningData:
    """Read the examples of the task, tokenise them and assign them to clients.

    Args:
        config: The run, for task, clients and seed.
        tokenizer: Fast tokenizer of transformers with a pad token.

    Returns:
        The examples.

    Raises:
        CorpusError: The task's files are wrong, or there are too few examples for the clients.
    """
    task = tuning_task(config)
    with _named_as_task():
        splits, columns, left_out = _read(config, task)
    limits = (config.task.max_train_examples, config.task.max_test_examples)
    chosen = [
        _drawn(len(examples), limit, seed=config.seed)
        for examples, limit in zip(splits, limits, strict=True)
    ]
    splits = [[split[i] for i in rows] for split, rows in zip(splits, chosen, strict=True)]
    if columns is not None:
        first, second = (
            [values[i] for i in rows] for values, rows in zip(columns, chosen, strict=True)
        )
        columns = (first, second)
    length = config.task.max_length
    stand_in = task or SENTIMENT_TASKS["imdb"]  # a text as any other
    train, test = (encode(stand_in, split, tokenizer, max_length=length) for split in splits)
    of_train, of_test = _labels(task, splits)
    owned_train, owned_test = deal_out(
        config.task,
        of_train,
        of_test,
        num_clients=config.federation.num_clients,
        seed=config.seed,
        columns=columns,
    )
    facts = describe(of_train, owned_train, owned_test)
    if not any(fact.num_test_examples for fact in facts):
        raise CorpusError(
            "task.split: expected held-out examples for at least one client, got none. Their values"
            f" of {config.task.column!r} belong to no client. Correct the files, or set"
            " task.split=iid."
        )
    return TuningData(
        task=TaskSpec.of(task, pad_id=int(tokenizer.pad_token_id)),
        train=train,
        test=test,
        train_sequences=[_sequences(train, mine) for mine in owned_train],
        test_sequences=[_sequences(test, mine) for mine in owned_test],
        facts=tuple(facts),
        left_out=tuple(f"{split}: {rows}" for split, rows in left_out.items()),
    )


def task_content(config: FinetuneConfig) -> dict[str, FileDigests]:
    """Compute the digests of a task's files, by configuration key: its examples and task file.

    Args:
        config: The run, which names the task and the place of its files.

    Raises:
        FedPipeError: The task does not exist, or its files cannot be read.
    """
    task = tuning_task(config)
    with _named_as_task():
        if task is None:
            return {"task.data": file_digests(text_files(config.task), key="task.data", root=None)}
        files = find_files(task, config.task.data, alone=True)
        if files.format == "hub":
            found = {"task.data": [(files.folder, hub_fingerprint(files))]}
        else:
            found = {"task.data": file_digests(files.paths(), key="task.data", root=None)}
        if task.file:
            found["task.file"] = file_digests([task.file], key="task.file", root=None)
        return found


@contextmanager
def _named_as_task() -> Iterator[None]:
    """Replace the key in an error by its name in the configuration of a fine-tuning."""
    try:
        yield
    except CorpusError as error:
        raise CorpusError(str(error).replace("evaluation.data", "task.data")) from error


def _read(
    config: FinetuneConfig, task: Task | None
) -> tuple[list[list[Example]], tuple[Sequence[str], Sequence[str]] | None, LeftOut]:
    if task is None:
        return read_texts(config.task)
    files = find_files(task, config.task.data, alone=True)
    splits, test, left_out = read_task(files, typed=False)
    chosen = [splits["train"], splits["test"]]
    columns = None
    if config.task.column:
        first, second = (
            column_values(files, split, config.task.column, examples)
            for split, examples in zip(("train", test), chosen, strict=True)
        )
        columns = (first, second)
    return chosen, columns, {name: rows for name, rows in left_out.items() if name in _USED}


def _drawn(size: int, limit: int, *, seed: int) -> NDArray[np.int64]:
    if not 0 < limit < size:
        return np.arange(size)
    return np.sort(np.random.default_rng([seed % 2**64, 3]).permutation(size)[:limit])


def _labels(task: Task | None, splits: Sequence[Sequence[Example]]) -> tuple[Labels, Labels]:
    if task is None:
        first, second = (no_labels(len(split)) for split in splits)
    elif task.kind == "ner":
        names = tag_names(task, typed=False)
        first, second = (tag_labels([e.label for e in split], names) for split in splits)  # type: ignore[misc]
    else:
        train, test = (np.array([e.label for e in split], dtype=np.float64) for split in splits)
        if task.kind == "regression":
            return number_labels(train, like=train), number_labels(test, like=train)
        first, second = (class_labels(values, task.labels) for values in (train, test))
    return first, second


def _sequences(split: Encoded, examples: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.flatnonzero(np.isin(split.examples, examples))


def read_texts(
    task: TaskConfig,
) -> tuple[list[list[Example]], tuple[Sequence[str], Sequence[str]] | None, LeftOut]:
    """Read the texts of a language-model task.

    Args:
        task: The task. ``data`` is a folder with a train file and a test, valid or dev file, such
            as ``*train*.jsonl``, gzipped or not, with a column ``text``.

    Returns:
        Examples by split; with ``column``, its values by split; and the rows that were left out.

    Raises:
        CorpusError: A file is missing or cannot be read, or too many of its rows have no text.
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
    """Find the files of a language-model task: the training text and the held-out text.

    Raises:
        CorpusError: A file is missing.
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
    """Read a column of the rows from which the examples were made."""
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
    """Read a column of a split that the task itself does not use.

    Args:
        files: Files of the task.
        split: Name of the split.
        column: Name of the column.
        examples: Examples of the split; rows that became no example are skipped.

    Raises:
        CorpusError: The files are neither JSON lines nor CSV, or a row does not have the column.
    """
    if files.format not in ("jsonl", "csv"):
        raise CorpusError(
            f"task.column: expected JSON lines or CSV, got {files.format_name} in {files.folder}."
            " Use another task.split."
        )
    return _owners(Path(files.splits[split]), column, examples)
