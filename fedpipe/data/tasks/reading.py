"""Labelled examples out of files: bad rows are counted, too many are refused. No torch.

Every fault is named with its file and row. Public data sets have some rows that hold no example (a
line that was cut, a label that nobody gave); one of them neither refuses a file nor replaces a
split.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpipe.data.lines import json_row, lines_or_faults
from fedpipe.data.tasks.files import TaskFiles, check_splits, split_of
from fedpipe.data.tasks.registry import Task, tag_names
from fedpipe.data.values import is_missing, name_of, text_of
from fedpipe.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset

MAX_BAD_SHARE = 0.05
"""Of the rows of a split that may be left out; more is no accident, and the file is refused."""
_KEY = "evaluation.data"
_SHOWN = 60
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""Python's ``float`` takes more: underscores, digits of other scripts, words for infinity."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a task."""

    words: tuple[str, ...]
    """A NER task's words; else the text, and the second one of a pair."""
    label: tuple[int, ...] | int | float
    """A tag per word, a class or a number."""
    where: str = field(default="", compare=False)
    """File and row."""


Splits = dict[str, list[Example]]
"""Examples of ``train``, of ``dev`` where there is one to choose the epoch on, and of ``test``."""


LeftOut = dict[str, str]
"""By split with rows that cannot be used: how many, and what is wrong with the first one."""
Row = tuple[str, Mapping[str, Any] | CorpusError]
"""Where a row stands, and its columns or what is wrong with it."""


class _Unlabelled(CorpusError):
    """A row has no label: such test splits are kept back by those who publish a task."""


class _Undeclared(CorpusError):
    """A row has a label that the task file does not declare: that refuses the whole file."""


def read_task(files: TaskFiles, *, typed: bool) -> tuple[Splits, str, LeftOut]:
    """Read the examples of all splits, without the rows that cannot be used.

    Where no labelled test split is published (GLUE: not one row of it has a label), the dev split
    becomes the test.

    Args:
        files: From ``find_files``.
        typed: Keep several entity types apart.

    Returns:
        The examples, which split is the test (``test`` or ``dev``), and what was left out.

    Raises:
        CorpusError: A split is empty or missing, or more than ``MAX_BAD_SHARE`` of its rows cannot
            be used: a column is missing, a label unknown, a sentence has another number of tags
            than of words.
    """
    task = files.task
    splits: Splits = {}
    left_out: LeftOut = {}

    def example(row: Mapping[str, Any], where: str) -> Example:
        return _example(task, row, where, split, typed=typed)

    for split, rows in _rows(files):
        examples, faults, first = usable(rows, example)
        if _is_kept_back(task, split) and not examples and isinstance(first, _Unlabelled):
            continue
        if not examples and first is None:
            raise CorpusError(
                f"evaluation.data: expected examples in the {split} split of {task.name}, got an "
                f"empty file in {files.folder}. Fill it or remove it."
            )
        splits[split] = examples
        if first is not None:
            left_out[split] = left_out_text(first, faults, len(examples), folder=files.folder)
    check_splits(task, splits, where=files.folder)
    if "test" in splits:
        return splits, "test", left_out
    splits["test"] = splits.pop("dev")
    if "dev" in left_out:
        left_out["test"] = left_out.pop("dev")
    return splits, "dev", left_out


def _is_kept_back(task: Task, split: str) -> bool:
    """Whether those who publish a task may have left the labels out of a split."""
    return split == "test" and not task.file


def usable(
    rows: Iterable[Row], read: Callable[[Mapping[str, Any], str], Example]
) -> tuple[list[Example], int, CorpusError | None]:
    """Read rows, and count those that cannot be read.

    Args:
        rows: Of a split.
        read: Makes an example of a row and of where it stands, or raises ``CorpusError``.

    Returns:
        The examples, the number of rows without one, and what is wrong with the first of these.
    """
    examples: list[Example] = []
    faults: list[CorpusError] = []
    for where, row in rows:
        try:
            if isinstance(row, CorpusError):
                raise row
            examples.append(read(row, where))
        except _Undeclared:
            raise
        except CorpusError as fault:
            faults.append(fault)
    return examples, len(faults), faults[0] if faults else None


def left_out_text(first: CorpusError, faults: int, usable: int, *, folder: str) -> str:
    """Say what is left out of a split.

    Args:
        first: What is wrong with the first row.
        faults: Rows that cannot be used.
        usable: Rows that can.
        folder: Of the files, which the text does not repeat.

    Raises:
        CorpusError: It is more than ``MAX_BAD_SHARE``.
    """
    whole = faults + usable
    if faults > MAX_BAD_SHARE * whole:
        share = f"{100 * MAX_BAD_SHARE:g} %"
        more = f" So it is with {faults:,} of {whole:,} rows; up to {share} are left out."
        raise CorpusError(f"{first}{more if whole > 1 else ''}")
    text = str(first).partition(": ")[2].replace(f"{folder}{os.sep}", "")
    return f"{faults:,} of {whole:,} rows; first: {text}"


def hub_fingerprint(files: TaskFiles) -> str:
    """Identify the content of a dataset of the hub."""
    return " ".join(f"{name}={data._fingerprint}" for name, data in _load_hub(files).items())


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
            yield split, json_lines(path, key=_KEY)
        elif files.format == "conll":
            yield split, _conll_rows(files.task, path)
        elif files.format == "csv":
            yield split, csv_rows(path, key=_KEY)
        else:
            yield split, _tsv_rows(files.task, path)


def _lines(path: str) -> Iterator[tuple[str, str | CorpusError]]:
    for number, line in lines_or_faults(path, key=_KEY):
        yield f"{path}:{number}", line


def json_lines(path: str, *, key: str) -> Iterator[Row]:
    """Read the rows of a file of JSON lines; one that is none is a bad row."""
    for number, line in lines_or_faults(path, key=key):
        where = f"{path}:{number}"
        if isinstance(line, CorpusError):
            yield where, line
            continue
        if not line.strip():
            continue
        try:
            yield where, json_row(line, where, key=key)
        except CorpusError as fault:
            yield where, fault


def _conll_rows(task: Task, path: str) -> Iterator[Row]:
    names = task.text[0], task.label[0]
    words: list[str] = []
    tags: list[str] = []
    start = ""
    fault: CorpusError | None = None
    for where, line in _lines(path):
        if isinstance(line, CorpusError):  # a word of a sentence that cannot be used
            start, fault = start or where, fault or line
            words.append("")
            continue
        if line.startswith("-DOCSTART-"):
            continue
        if line.strip():
            cells = line.split("\t") if "\t" in line else line.split()
            if len(cells) < 2 or not cells[0] or not cells[-1]:
                fault = fault or CorpusError(
                    f"evaluation.data: expected a token, a tab and a tag, got {line[:_SHOWN]!r} in "
                    f"{where}. Correct the line; an empty one ends a sentence."
                )
            start = start or where
            words.append(cells[0])
            tags.append(cells[-1].strip())
        elif words:
            yield start, fault or dict(zip(names, (words, tags), strict=True))
            words, tags, start, fault = [], [], "", None
    if words:
        yield start, fault or dict(zip(names, (words, tags), strict=True))


def _tsv_rows(task: Task, path: str) -> Iterator[Row]:
    """Read GLUE's tables: no quoting, a header but for CoLA's training and dev files."""
    columns: list[str] | None = list(task.headless) or None
    for number, (where, line) in enumerate(_lines(path)):
        if isinstance(line, CorpusError):
            if number == 0:
                raise line  # the header, most often
            yield where, line
            continue
        cells = line.split("\t")
        if number == 0 and (columns is None or set(cells) & {"index", "sentence"}):
            columns = cells
            continue
        assert columns is not None
        if not line.strip():
            continue
        if len(cells) < len(columns):
            yield (
                where,
                CorpusError(
                    f"evaluation.data: expected the {len(columns)} columns of the header, got "
                    f"{len(cells)} in {where}. Correct the line."
                ),
            )
        else:
            yield where, dict(zip(columns, cells, strict=False))


def csv_rows(path: str, *, key: str) -> Iterator[Row]:
    """Read the rows of a CSV file: a header, then cells between commas (or semicolons).

    A cell that holds a separator, a quote or the end of a line stands in quotes.
    """
    faults: list[CorpusError] = []

    def lines() -> Iterator[str]:
        for _, line in lines_or_faults(path, key=key):
            if isinstance(line, CorpusError):
                faults.append(line)
                line = ""
            yield f"{line}\n"

    found = lines()
    header = next(found, "")
    if faults:
        raise faults[0]
    separator = ";" if header.count(";") > header.count(",") else ","
    columns = next(csv.reader([header], delimiter=separator))
    reader = csv.reader(found, delimiter=separator, strict=True)
    while True:
        where = f"{path}:{reader.line_num + 2}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield (
                where,
                CorpusError(
                    f"{key}: expected cells between {separator!r}, got {where} ({error}). Correct "
                    "the quotes of the line."
                ),
            )
            continue
        if faults:  # an empty line stands for it, maybe inside of quotes
            yield where, faults[0]
            faults.clear()
        elif cells is None:
            return
        elif cells and len(cells) != len(columns):
            yield (
                where,
                CorpusError(
                    f"{key}: expected the {len(columns)} columns of the header, got {len(cells)} "
                    f"in {where}. Put cells that hold {separator!r} in quotes."
                ),
            )
        elif cells:
            yield where, dict(zip(columns, cells, strict=True))


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
        return [names[n] if n is not None and n >= 0 else None for n in value]
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
    if _is_kept_back(task, split) and not set(task.label) & set(row):
        raise _unlabelled(where)  # as GLUE's test files are
    label = _cell(task, row, task.label, "label", where)
    if task.kind != "ner":
        texts = [_text(task, row, task.text, where)]
        if task.pair:
            texts.append(_text(task, row, task.pair, where))
        return Example(tuple(texts), _label(task, label, where), where)
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
    numbers = tuple(_tag(task, tag, tags, where) for tag in label)
    return Example(tuple(_word(word, where) for word in words), numbers, where)


def _word(value: Any, where: str) -> str:
    """Read a word; one that spells a missing value is a word as any other."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not is_missing(value):
        return str(value)
    raise CorpusError(
        f"evaluation.data: expected words, got {str(value)[:_SHOWN]!r} among them in {where}. "
        "Correct the row."
    )


def _cell(task: Task, row: Mapping[str, Any], names: tuple[str, ...], what: str, where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    way_out = f", or name it under columns in {task.file}" if task.file else ""
    raise CorpusError(
        f"evaluation.data: expected a column {' or '.join(map(repr, names))} with the {what} of "
        f"{task.name} in {where}, got {', '.join(map(str, row)) or 'no columns'}. Rename the "
        f"column{way_out}."
    )


def _text(task: Task, row: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    value = _cell(task, row, names, "text", where)
    found = None
    try:
        if isinstance(value, dict) and isinstance(value.get("contexts"), list):
            parts = [text_of(part) for part in value["contexts"]]  # the hub's PubMedQA
            found = text_of(" ".join(part for part in parts if part))
        else:
            found = text_of(value)
    except TypeError:  # neither text nor missing
        pass
    if found is None:
        raise CorpusError(
            f"evaluation.data: expected text in column {names[0]!r}, got {str(value)[:_SHOWN]} in "
            f"{where}. Correct the row."
        )
    return found


def _label(task: Task, value: Any, where: str) -> int | float:
    if isinstance(value, str) and value in task.labels:
        return task.labels.index(value)
    try:
        text = name_of(value)
    except TypeError:  # a list, an object, an infinite number
        text = str(value)
    if text is None or text == "-1":
        raise _unlabelled(where)
    if task.kind == "regression":
        if not isinstance(value, bool) and _NUMBER.fullmatch(text):
            number = float(text)
            if math.isfinite(number):
                return number
        raise _unknown(task, value, "a number", where)
    if text in task.labels:
        return task.labels.index(text)
    numbers = [str(number) for number in range(len(task.labels))]
    if text in numbers and not task.file:
        return numbers.index(text)
    raise _unknown(task, value, f"one of {', '.join(task.labels)}", where)


def _tag(task: Task, tag: Any, tags: tuple[str, ...], where: str) -> int:
    if type(tag) is int and len(task.labels) == 1 and 0 <= tag < len(tags):
        return tag
    text = str(tag)
    if text == "O":
        return 0
    part, _, entity = text.partition("-")
    if part in ("B", "I"):
        if tags[1:] == (f"B-{tags[1][2:]}", f"I-{tags[1][2:]}"):
            # BioBERT's files say B and I alone; a type is checked where it is given.
            known = {name.lower() for name in (*task.labels, "entity")}
            if not entity or entity.lower() in known:
                return tags.index(f"{part}-{tags[1][2:]}")
        elif text in tags:
            return tags.index(text)
    raise _unknown(task, tag, f"one of O, {_bio(task)}", where)


def _unlabelled(where: str) -> CorpusError:
    return _Unlabelled(
        f"evaluation.data: expected a label in every row, got none in {where}. Use a file with "
        "labels."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _bio(task: Task) -> str:
    return ", ".join(f"B-{name}, I-{name}" for name in task.labels)


def _unknown(task: Task, value: Any, expectation: str, where: str) -> CorpusError:
    if task.file and task.kind != "regression":
        return _Undeclared(
            f"evaluation.data: expected {expectation} in column {task.label[0]!r} of {where}, got "
            f"{_short(value)}. Declare it under labels in {task.file}, or correct the row."
        )
    return CorpusError(
        f"evaluation.data: expected {expectation} as label of {task.name}, got {_short(value)} in "
        f"{where}. Correct the row."
    )
