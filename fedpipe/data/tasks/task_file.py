"""A task of the user's own: a file that says its kind, columns, labels and metric. No torch.

``fedpipe evaluate --task-file FILE`` and ``fedpipe finetune --task-file FILE`` take such a file; so
does a data folder that holds one under the name ``task.yaml``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NoReturn, cast

from fedpipe.config.evaluation import DEFAULT_TASK, Kind
from fedpipe.config.finetune import CAUSAL_LM
from fedpipe.config.load import build
from fedpipe.config.paths import UserPath
from fedpipe.config.tree import Node, parse, read_text
from fedpipe.data.tasks.registry import (
    SENTIMENT_TASKS,
    TASKS,
    Defaults,
    Task,
    find_task,
    spelling,
)
from fedpipe.errors import ConfigError

TASK_FILE = "task.yaml"
"""Name under which a data folder holds its task file."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "micro_f1", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "ner": ("entity_f1", "entity_precision", "entity_recall"),
}
"""By kind, the metrics that fit; the first one is used where the file names none."""
_OF_TWO_CLASSES = ("f1", "matthews")
_COLUMNS = {
    "classification": {"text": "text", "label": "label"},
    "pair": {"text": "text", "text_pair": "text_pair", "label": "label"},
    "regression": {"text": "text", "text_pair": "", "label": "label"},
    "ner": {"words": "tokens", "tags": "tags"},
}
"""By kind, the keys of ``columns`` and their defaults."""
_SETTINGS: dict[Kind, Defaults] = {
    "classification": TASKS["gad"].defaults,
    "regression": TASKS["stsb"].defaults,
    "ner": TASKS["ncbi-disease"].defaults,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnNames:
    """The columns of the files. An empty name stands for the default, which the kind decides."""

    text: str = ""
    """Column of the text; default: text."""
    text_pair: str = ""
    """Column of the second text, of kind pair (default: text_pair) and, if set, of regression."""
    label: str = ""
    """Column of the class or the number; default: label."""
    words: str = ""
    """NER in JSON lines: column of the list of words; default: tokens."""
    tags: str = ""
    """NER in JSON lines: column of the list of tags; default: tags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitFiles:
    """The files of the splits. Without them they are found by their names, as those of any task."""

    train: UserPath = ""
    """Training examples. A path starts from the folder of the task file, or from --data."""
    dev: UserPath = ""
    """Examples that choose the best epoch."""
    test: UserPath = ""
    """Examples that are scored; without it those of dev are, after the last epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskDescription:
    """The content of a task file."""

    name: str = ""
    """Name of the task in tables and folders; default: that of the file, or of its folder where it
    is called task.yaml."""
    kind: Literal["classification", "pair", "regression", "ner"] | None = None
    """What is predicted: a class of a text, a class of two texts, a number, or a tag per word."""
    columns: ColumnNames = field(default_factory=ColumnNames)
    labels: tuple[str, ...] = ()
    """All classes; of NER the entity types, without B- and I-. A regression has none."""
    negative: tuple[str, ...] = ()
    """Classes that micro_f1 does not count as found."""
    metric: tuple[str, ...] = ()
    """One or several of accuracy, micro_f1, f1 and matthews (of two classes, the second is the
    positive one), pearson, spearman, entity_f1, entity_precision, entity_recall. The first one
    chooses the best epoch."""
    files: SplitFiles = field(default_factory=SplitFiles)


def read_task_file(path: str, *, key: str) -> Task:
    """Read a task file.

    Args:
        path: The file, or a folder with a ``task.yaml``.
        key: The option or key that named it, for errors.

    Returns:
        The task.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or values do not fit.
    """
    file = os.path.join(path, TASK_FILE) if os.path.isdir(path) else path
    tree = _with_lists(parse(read_text(file, option=key), source=file))
    return _Checks(file, tree, cast(TaskDescription, build(TaskDescription, tree))).task()


def own_tasks(data: str) -> list[Task]:
    """Read the task file of a data folder, or those of the folders in it.

    Args:
        data: ``evaluation.data`` or ``task.data``; what is no folder holds none.

    Raises:
        ConfigError: A task file cannot be used.
    """
    folder = Path(data)
    found = [folder / TASK_FILE] if (folder / TASK_FILE).is_file() else []
    found = found or sorted(folder.glob(f"*/{TASK_FILE}"))
    return [read_task_file(str(file), key=TASK_FILE) for file in found]


def choose_tasks(names: Sequence[str], task_files: Sequence[str], data: str) -> list[Task]:
    """Find the tasks of an evaluation.

    Args:
        names: Of tasks that fedpipe knows, or of those whose task files are named or lie in the
            data folder; empty for the task files alone, or for the default task.
        task_files: Paths of task files; their tasks are all evaluated.
        data: Folder, which may hold task files.

    Raises:
        ConfigError: There is no such task, a task file cannot be used, or a task comes twice.
    """
    own = [read_task_file(path, key="--task-file") for path in task_files]
    if not names and not own:
        return _distinct(own_tasks(data) or [find_task(DEFAULT_TASK)])
    known = own.copy()
    if any(not is_known(name, own) for name in names):
        known += own_tasks(data)
    named = [find_task(name, own=known) for name in names]
    return _distinct([*named, *(task for task in own if task not in named)])


def is_known(name: str, own: Sequence[Task] = ()) -> bool:
    """Whether a name is that of a task of fedpipe, or of one of the user's that was read."""
    tasks = (*own, *TASKS.values(), *SENTIMENT_TASKS.values())
    return any(spelling(name) in task.names for task in tasks)


def _distinct(tasks: list[Task]) -> list[Task]:
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"evaluation.tasks: expected every task once, got {', '.join(names)}. Remove one."
        )
    return tasks


def _with_lists(tree: Node) -> Node:
    """Take one label or metric for a list of one, and a label that is a number for its name."""
    values = dict(tree.value)
    for key in ("labels", "negative", "metric"):
        node = values.get(key)
        if node is None or node.value is None:
            continue
        items = node.value if isinstance(node.value, list) else [Node(node.value, node.where)]
        named = [Node(str(i.value), i.where) if type(i.value) is int else i for i in items]
        values[key] = Node(named, node.where)
    return Node(values, tree.where)


class _Checks:
    """Makes a task of what a file says, or says what is wrong with it."""

    def __init__(self, path: str, tree: Node, description: TaskDescription) -> None:
        """Take what was read."""
        self._path, self._tree, self._is = path, tree, description

    def task(self) -> Task:
        """Return the task; raise ConfigError where the values do not fit together."""
        own = self._is
        if own.kind is None:
            self._refuse("kind", f"one of {', '.join(_COLUMNS)}", "nothing", "Name it.")
        kind: Kind = "classification" if own.kind == "pair" else own.kind
        columns = self._columns(_COLUMNS[own.kind])
        self._check_labels(kind)
        is_ner = kind == "ner"
        pair = columns.get("text_pair")
        return Task(
            name=self._name(),
            kind=kind,
            metrics=self._metrics(kind),
            defaults=_SETTINGS[kind],
            labels=own.labels,
            negative=own.negative,
            text=(columns["words" if is_ner else "text"],),
            pair=(pair,) if pair else (),
            label=(columns["tags" if is_ner else "label"],),
            cites=f"{os.path.basename(self._path)} (own task)",
            file=self._path,
            splits=self._splits(),
        )

    def _refuse(self, key: str, expectation: str, value: object, way_out: str) -> NoReturn:
        node = self._tree
        for part in key.split("."):
            node = node.value.get(part, node) if isinstance(node.value, dict) else node
        got = value if value == "nothing" else repr(value)
        raise ConfigError(f"{key}: expected {expectation}, got {got} in {node.where}. {way_out}")

    def _name(self) -> str:
        path = Path(os.path.abspath(self._path))
        name = self._is.name or (path.parent.name if path.name == TASK_FILE else path.stem)
        if not _NAME.fullmatch(name):
            self._refuse(
                "name", "letters, digits and . _ + - (it names folders)", name, "Set another name."
            )
        if is_known(name) or name == CAUSAL_LM:
            self._refuse("name", "a name that no task of fedpipe has", name, "Set another name.")
        return name

    def _columns(self, defaults: dict[str, str]) -> dict[str, str]:
        for column in fields(ColumnNames):
            value = getattr(self._is.columns, column.name)
            if value and column.name not in defaults:
                self._refuse(
                    f"columns.{column.name}",
                    f"only {', '.join(defaults)} with kind {self._is.kind}",
                    value,
                    "Rename the key, or change the kind.",
                )
        return {name: getattr(self._is.columns, name) or usual for name, usual in defaults.items()}

    def _check_labels(self, kind: Kind) -> None:
        labels, negative = self._is.labels, self._is.negative
        least = {"classification": 2, "ner": 1, "regression": 0}[kind]
        if kind == "regression" and labels:
            self._refuse("labels", "none with kind regression", list(labels), "Remove them.")
        if len(labels) < least:
            what = "entity type" if kind == "ner" else "classes"
            self._refuse(
                "labels",
                f"{least} {what} or more with kind {self._is.kind}",
                list(labels),
                "List all that the files hold.",
            )
        twice = [label for label in labels if labels.count(label) > 1]
        if twice or not all(label.strip() for label in labels):
            self._refuse("labels", "different names", list(labels), "Correct the list.")
        tags = [label for label in labels if label == "O" or label[:2] in ("B-", "I-")]
        if kind == "ner" and tags:
            self._refuse(
                "labels",
                "entity types without O, B- and I-",
                tags[0],
                f"Write {tags[0][2:] or 'the types only'}.",
            )
        unknown = [name for name in negative if name not in labels]
        if unknown:
            self._refuse(
                "negative",
                f"some of {', '.join(labels) or 'no labels'}",
                unknown[0],
                "Correct it, or declare it under labels.",
            )

    def _metrics(self, kind: Kind) -> tuple[str, ...]:
        fitting = _METRICS[kind]
        for metric in self._is.metric:
            if metric not in fitting:
                self._refuse(
                    "metric",
                    f"one of {', '.join(fitting)} with kind {self._is.kind}",
                    metric,
                    f"The default is {fitting[0]}.",
                )
            if metric in _OF_TWO_CLASSES and len(self._is.labels) != 2:
                self._refuse(
                    "metric",
                    "accuracy or micro_f1 with more than two labels",
                    metric,
                    f"{metric} is of two classes.",
                )
        return self._is.metric or fitting[:1]

    def _splits(self) -> tuple[tuple[str, str], ...]:
        splits = tuple((f.name, getattr(self._is.files, f.name)) for f in fields(SplitFiles))
        splits = tuple((split, path) for split, path in splits if path)
        named: Collection[str] = dict(splits)
        if splits and ("train" not in named or len(named) < 2):
            self._refuse(
                "files", "train, and dev or test", ", ".join(named), "Name the missing file."
            )
        return splits
