"""Labelled examples out of files, every fault named with its file and line. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpipe.data.lines import json_rows, text_lines
from fedpipe.data.tasks.files import TaskFiles, check_splits, split_of
from fedpipe.data.tasks.registry import Task, tag_names
from fedpipe.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset

_KEY = "evaluation.data"
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a task."""

    words: tuple[str, ...]
    """A NER task's words; else the text, and the second one of a pair."""
    label: tuple[int, ...] | int | float
    """A tag per word, a class or a number."""


Splits = dict[str, list[Example]]
"""Examples of ``train``, of ``dev`` where there is one to choose the epoch on, and of ``test``."""


class _Unlabelled(Exception):  # noqa: N818
    """A row has no label: such splits are kept back by those who publish a task."""


def read_task(files: TaskFiles, *, typed: bool) -> tuple[Splits, str]:
    """Read the examples of all splits.

    Where no labelled test split is published (GLUE), the dev split becomes the test.

    Args:
        files: From ``find_files``.
        typed: Keep several entity types apart.

    Returns:
        The examples, and which split is the test: ``test`` or ``dev``.

    Raises:
        CorpusError: A column is missing, a label unknown, a split empty or missing, or a sentence
            has another number of tags than of words.
    """
    task = files.task
    splits: Splits = {}
    for split, rows in _rows(files):
        try:
            splits[split] = [_example(task, row, where, split, typed=typed) for where, row in rows]
        except _Unlabelled as place:
            if split == "train":
                raise CorpusError(
                    f"evaluation.data: expected a label in every row, got none in {place}. Use a "
                    "file with labels."
                ) from None
            continue
        if not splits[split]:
            raise CorpusError(
                f"evaluation.data: expected examples in the {split} split of {task.name}, got an "
                f"empty file in {files.folder}. Fill it or remove it."
            )
    check_splits(task, splits, where=files.folder)
    if "test" in splits:
        return splits, "test"
    splits["test"] = splits.pop("dev")
    return splits, "dev"


def hub_fingerprint(files: TaskFiles) -> str:
    """Identify the content of a dataset of the hub."""
    return " ".join(f"{name}={data._fingerprint}" for name, data in _load_hub(files).items())


Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, and its columns."""


def _rows(files: TaskFiles) -> Iterator[tuple[str, Iterator[Row]]]:
    if files.format == "hub":
        for name, dataset in _load_hub(files).items():
            if known := split_of(name):
                yield known, _dataset_rows(files.task, dataset, f"{files.folder}, {name}")
        return
    for split, path in files.splits.items():
        if files.format == "saved":
            yield split, _dataset_rows(files.task, _load_saved(path), path)
        elif files.format == "jsonl":
            yield split, ((where, row) for where, _, row in json_rows(path, key=_KEY))
        elif files.format == "conll":
            yield split, _conll_rows(path)
        else:
            yield split, _tsv_rows(files.task, path)


def _lines(path: str) -> Iterator[tuple[str, str]]:
    for number, line in text_lines(path, key=_KEY):
        yield f"{path}:{number}", line


def _conll_rows(path: str) -> Iterator[Row]:
    words: list[str] = []
    tags: list[str] = []
    start = ""
    for where, line in _lines(path):
        if line.startswith("-DOCSTART-"):
            continue
        if line.strip():
            cells = line.split("\t") if "\t" in line else line.split()
            if len(cells) < 2 or not cells[0] or not cells[-1]:
                raise CorpusError(
                    f"evaluation.data: expected a token, a tab and a tag, got {line[:_SHOWN]!r} in "
                    f"{where}. Correct the line; an empty one ends a sentence."
                )
            start = start or where
            words.append(cells[0])
            tags.append(cells[-1].strip())
        elif words:
            yield start, {"tokens": words, "tags": tags}
            words, tags, start = [], [], ""
    if words:
        yield start, {"tokens": words, "tags": tags}


def _tsv_rows(task: Task, path: str) -> Iterator[Row]:
    """Read GLUE's tables: no quoting, a header but for CoLA's training and dev files."""
    columns: list[str] | None = list(task.headless) or None
    for number, (where, line) in enumerate(_lines(path)):
        cells = line.split("\t")
        if number == 0 and (columns is None or set(cells) & {"index", "sentence"}):
            columns = cells
            continue
        assert columns is not None
        if not line.strip():
            continue
        if len(cells) < len(columns):
            raise CorpusError(
                f"evaluation.data: expected the {len(columns)} columns of the header, got "
                f"{len(cells)} in {where}. Correct the line."
            )
        yield where, dict(zip(columns, cells, strict=False))


def _dataset_rows(task: Task, dataset: Dataset, where: str) -> Iterator[Row]:
    column = next((name for name in task.label if name in dataset.column_names), None)
    feature = dataset.features[column] if column else None
    names = getattr(getattr(feature, "feature", feature), "names", None)
    for index, row in enumerate(dataset):
        if names and column:
            row = row | {column: _named(task, row[column], names)}
        yield f"row {index + 1} of {where}", row


def _named(task: Task, value: Any, names: list[str]) -> Any:
    """Give a class its name, unless the task numbers its classes."""
    if isinstance(value, list):
        return [names[number] for number in value]
    if value is None or value < 0:
        return None
    return names[value] if names[value] in task.labels else value


def _load_saved(path: str) -> Dataset:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # every backend raises classes of its own
        raise _unreadable(path, error) from error


def _load_hub(files: TaskFiles) -> Any:
    import datasets

    datasets.disable_progress_bars()
    name, _, config = files.splits["all"].rpartition(":")
    try:
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # every backend of the hub raises classes of its own
        raise _unreadable(files.folder, error) from error


def _unreadable(what: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"evaluation.data: expected a readable dataset, got {what!r}: "
        f"{' '.join(str(error).split())[:200]}. Where the network is closed, save it elsewhere "
        "with save_to_disk and name that folder."
    )


def _example(task: Task, row: Mapping[str, Any], where: str, split: str, *, typed: bool) -> Example:
    if split == "test" and not set(task.label) & set(row):
        raise _Unlabelled(where)  # as GLUE's test files are
    label = _cell(task, row, task.label, "label", where)
    if task.kind != "ner":
        texts = [_text(task, row, task.text, where)]
        if task.pair:
            texts.append(_text(task, row, task.pair, where))
        return Example(tuple(texts), _label(task, label, where))
    words = _cell(task, row, task.text, "words", where)
    if not (isinstance(words, list) and isinstance(label, list) and words):
        raise CorpusError(
            f"evaluation.data: expected a list of words and one of tags, got {str(words)[:_SHOWN]} "
            f"in {where}. Correct the row."
        )
    if len(words) != len(label):
        raise CorpusError(
            f"evaluation.data: expected a tag per word, got {len(words)} words and {len(label)} "
            f"tags in {where}. Correct the row."
        )
    tags = tag_names(task, typed=typed)
    numbers = tuple(_tag(task, tag, tags, where, typed=typed) for tag in label)
    return Example(tuple(map(str, words)), numbers)


def _cell(task: Task, row: Mapping[str, Any], names: tuple[str, ...], what: str, where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise CorpusError(
        f"evaluation.data: expected a column {' or '.join(map(repr, names))} with the {what} of "
        f"{task.name} in {where}, got {', '.join(map(str, row)) or 'no columns'}. Rename the "
        "column."
    )


def _text(task: Task, row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    value = _cell(task, row, names, "text", where)
    if isinstance(value, dict) and isinstance(value.get("contexts"), list):
        value = " ".join(value["contexts"])  # the hub's PubMedQA
    if not isinstance(value, str):
        raise CorpusError(
            f"evaluation.data: expected text in column {names[0]!r}, got {str(value)[:_SHOWN]} in "
            f"{where}. Correct the row."
        )
    return value


def _label(task: Task, value: Any, where: str) -> int | float:
    if value is None or value == -1 or value == "-1":
        raise _Unlabelled(where)
    if task.kind == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise _unknown(task, value, "a number", where)
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if text in task.labels:
        return task.labels.index(text)
    if text.isdigit() and int(text) < len(task.labels):
        return int(text)
    raise _unknown(task, value, f"one of {', '.join(task.labels)}", where)


def _tag(task: Task, tag: Any, tags: tuple[str, ...], where: str, *, typed: bool) -> int:
    if isinstance(tag, int) and len(task.labels) == 1 and 0 <= tag < len(tags):
        return tag
    text = str(tag)
    if text == "O":
        return 0
    part, _, entity = text.partition("-")
    several = len(task.labels) > 1
    if part in ("B", "I"):
        if not several or not typed:
            # BioBERT's files say B and I alone; a type is checked where it is given.
            known = {name.lower() for name in (*task.labels, "entity")}
            if not entity or entity.lower() in known:
                return tags.index(f"{part}-{tags[1][2:]}")
        elif text in tags:
            return tags.index(text)
    raise _unknown(task, tag, f"one of O, {_bio(task)}", where)


def _bio(task: Task) -> str:
    return ", ".join(f"B-{name}, I-{name}" for name in task.labels)


def _unknown(task: Task, value: Any, expectation: str, where: str) -> CorpusError:
    return CorpusError(
        f"evaluation.data: expected {expectation} as label of {task.name}, got {value!r} in "
        f"{where}. Correct the row."
    )
