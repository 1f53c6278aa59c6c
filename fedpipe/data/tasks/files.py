"""Which files of a folder are a task's, and in which format; nothing is read. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedpipe.config.evaluation import PACKAGED_TASKS
from fedpipe.config.half_files import check_fetched, read_json_object
from fedpipe.data.tasks.registry import Task, spelling
from fedpipe.data.tokenizer import SAMPLES
from fedpipe.errors import CorpusError

Format = Literal["jsonl", "conll", "csv", "tsv", "saved", "hub"]

HUB = "hf:"
_FORMATS = {
    "jsonl": "JSON lines",
    "conll": "CoNLL",
    "csv": "CSV",
    "tsv": "GLUE's TSV",
    "saved": "a saved Hugging Face dataset",
    "hub": "Hugging Face datasets",
}
_SPLITS = {
    "train": ("train", "msr_paraphrase_train"),
    "dev": ("dev", "devel", "valid", "validation", "val", "dev_matched", "validation_matched"),
    "test": ("test", "msr_paraphrase_test"),
    "mismatched": ("dev_mismatched", "validation_mismatched"),
}
"""How a split may be called; mismatched is the second dev set of MNLI."""
_JSONL = (".jsonl", ".jsonl.gz")
_TABLES = (".tsv", ".txt", ".conll", ".iob")
_CSV = (".csv", ".csv.gz")
_DEPTH = 3
"""Folders below the data folder that are searched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFiles:
    """Where a task lies."""

    task: Task
    format: Format
    folder: str
    """For people."""
    splits: Mapping[str, str]
    """Paths by ``train``, ``dev``, ``test`` and ``mismatched``; ``NAME:CONFIG`` of the hub."""

    @property
    def format_name(self) -> str:
        """The format, for people."""
        return _FORMATS[self.format]

    def paths(self) -> list[str]:
        """List the files whose bytes are the task's content; none for the hub."""
        if self.format == "hub":
            return []
        if self.format != "saved":
            return list(self.splits.values())
        found: list[str] = []
        for folder in self.splits.values():
            found += sorted(str(path) for path in Path(folder).iterdir() if path.is_file())
        return found


def find_files(task: Task, data: str, *, alone: bool) -> TaskFiles:
    """Find the files of a task.

    Args:
        task: Which one.
        data: ``evaluation.data``.
        alone: No other task is asked for, so a folder of any name may be the task's.

    Returns:
        Its files; there is a training split, and one to test on.

    Raises:
        CorpusError: There is no such folder, no or more than one place for the task, or no training
            or no test split.
    """
    if data.startswith(HUB):
        return _on_the_hub(task, data)
    if task.file and (data == PACKAGED_TASKS or _is_below(Path(task.file), Path(data))):
        data = str(Path(task.file).parent)  # its files lie beside the task file
    alone = alone or bool(task.file)
    if data == PACKAGED_TASKS:
        root = SAMPLES / "tasks"
    elif os.path.isdir(data):
        root = Path(data)
    else:
        raise CorpusError(
            f"evaluation.data: expected a folder, hf:NAME or packaged, got {data!r}. Check the path"
            " after --data."
        )
    places = [_listed(task, root)] if task.splits else _places(task, root)
    if not places and alone:
        places = [found for found in [_in_folder(task, root)] if found]
    if not places:
        raise _not_found(task, data, root)
    if len(places) > 1:
        folders = " and ".join(f"{place.folder} ({place.format_name})" for place in places[:2])
        raise CorpusError(
            f"evaluation.data: expected one place for {task.name}, got {folders}. Name a folder "
            "that holds one of them."
        )
    check_splits(task, places[0].splits, where=places[0].folder)
    for path in places[0].paths():
        check_fetched(path, key="evaluation.data", error=CorpusError)
    return replace(places[0], folder=data) if data == PACKAGED_TASKS else places[0]


def check_splits(task: Task, splits: Iterable[str], *, where: str) -> None:
    """Refuse a task that cannot be trained or tested.

    Raises:
        CorpusError: There is no training split, or neither dev nor test.
    """
    known = list(splits)
    listed = ", ".join(known) or "none"
    if "train" not in known:
        raise CorpusError(
            f"evaluation.data: expected a train split of {task.name} in {where}, got {listed}. Add "
            "the file, for example train.tsv."
        )
    if not {"dev", "test"} & set(known):
        raise CorpusError(
            f"evaluation.data: expected a test or dev split of {task.name} with labels in {where}, "
            f"got {listed}. Add the file, for example test.tsv."
        )


def formats_of(task: Task) -> dict[str, Format]:
    """Return the formats of a task's files, by the ends of their names."""
    tables: Format = "conll" if task.kind == "ner" else "tsv"
    csv: Format = "csv"
    found: dict[str, Format] = {suffix: "jsonl" for suffix in _JSONL}
    found |= dict.fromkeys(_TABLES, tables)
    return found if task.kind == "ner" else found | dict.fromkeys(_CSV, csv)


def split_of(name: str) -> str | None:
    """Tell which split a file or dataset key holds."""
    return next((split for split, names in _SPLITS.items() if name.lower() in names), None)


def _on_the_hub(task: Task, data: str) -> TaskFiles:
    name, _, config = data.removeprefix(HUB).partition(":")
    if not name or ":" in config:
        raise CorpusError(
            f"evaluation.data: expected hf:NAME or hf:NAME:CONFIG, got {data!r}. Write for example "
            "hf:nyu-mll/glue."
        )
    if not config and name.rpartition("/")[2] == "glue":
        config = task.name  # the hub's configurations of GLUE are called as its tasks
    return TaskFiles(task=task, format="hub", folder=data, splits={"all": f"{name}:{config}"})


def _places(task: Task, root: Path) -> list[TaskFiles]:
    """Search a folder and those below it, the nearest first."""
    found: list[TaskFiles] = []
    for folder, names, files in os.walk(root, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        names[:] = sorted(name for name in names if not name.startswith(".")) * (depth < _DEPTH)
        # NAME.SPLIT.jsonl.gz may lie anywhere; other forms name the task by their folder.
        prefixed = _named_jsonl(task, Path(folder), files)
        here = _in_folder(task, Path(folder)) if _is_named(task, Path(folder)) else None
        found += [place for place in (here or prefixed,) if place]
        if here is not None:
            names.clear()
    # Links lead to one place by several paths; depth ends their loops.
    return list({os.path.realpath(place.folder): place for place in reversed(found)}.values())[::-1]


def _is_named(task: Task, folder: Path) -> bool:
    names = (Path(os.path.abspath(folder)).name, folder.resolve().name)  # of a link and its end
    return any(spelling(name) in task.names for name in names)


def _named_jsonl(task: Task, folder: Path, files: Iterable[str]) -> TaskFiles | None:
    splits = {}
    for file in sorted(files):
        stem = _stem(file, _JSONL)
        name, _, split = (stem or "").rpartition(".")
        known = split_of(split)
        if name and known and spelling(name) in task.names:
            splits[known] = str(folder / file)
    if not splits:
        return None
    return TaskFiles(task=task, format="jsonl", folder=str(folder), splits=_ordered(splits))


def _in_folder(task: Task, folder: Path) -> TaskFiles | None:
    """Look at a folder that is the task's own."""
    files = sorted(path.name for path in folder.iterdir())
    saved = _saved_splits(folder)
    if saved:
        return TaskFiles(task=task, format="saved", folder=str(folder), splits=saved)
    jsonl = _named_jsonl(task, folder, files)
    if jsonl:
        return jsonl
    formats = formats_of(task)
    for form in dict.fromkeys(formats.values()):
        suffixes = [suffix for suffix, other in formats.items() if other == form]
        splits = {}
        for file in files:
            known = split_of(_stem(file, suffixes) or "")
            if known:
                splits[known] = str(folder / file)
        if splits:
            return TaskFiles(task=task, format=form, folder=str(folder), splits=_ordered(splits))
    return None


def _listed(task: Task, root: Path) -> TaskFiles:
    """Take the files that a task file names, which are all of one format."""
    formats = formats_of(task)
    found: set[Format] = set()
    for split, name in task.splits:
        form = next((form for suffix, form in formats.items() if name.endswith(suffix)), None)
        if form is None:
            raise CorpusError(
                f"files.{split}: expected a name that ends with {', '.join(formats)} for kind "
                f"{task.kind}, got {name!r} in {task.file}. Rename or convert the file."
            )
        if not os.path.isfile(root / name):
            raise CorpusError(
                f"files.{split}: expected a file, got {str(root / name)!r} in {task.file}, which "
                "is none. Paths start from the folder of the task file, or from evaluation.data."
            )
        found.add(form)
    if len(found) > 1:
        raise CorpusError(
            f"files: expected one format, got {', '.join(name for _, name in task.splits)} in "
            f"{task.file}. Convert the files to one."
        )
    splits = {split: str(root / name) for split, name in task.splits}
    return TaskFiles(task=task, format=found.pop(), folder=str(root), splits=splits)


def _is_below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _saved_splits(folder: Path) -> dict[str, str]:
    names = [path.parent.name for path in sorted(folder.glob("*/state.json"))]
    listing = folder / "dataset_dict.json"
    if listing.is_file():
        found = read_json_object(listing, key="evaluation.data", error=CorpusError)
        listed = found.get("splits")
        if not isinstance(listed, list):
            raise CorpusError(
                f"evaluation.data: expected a list of splits in {listing}, got none. Save the"
                " dataset again with save_to_disk."
            )
        names = [str(name) for name in listed]
        for name in names:
            if not (folder / name / "state.json").is_file():
                raise CorpusError(
                    f"evaluation.data: expected the split {name!r} (see dataset_dict.json) in"
                    f" {str(folder)!r}, got none. Save the dataset again with save_to_disk."
                )
    return _ordered({split: str(folder / n) for n in names if (split := split_of(n))})


def _ordered(splits: dict[str, str]) -> dict[str, str]:
    return {split: splits[split] for split in _SPLITS if split in splits}


def _stem(file: str, suffixes: Iterable[str]) -> str | None:
    return next((file.removesuffix(s) for s in suffixes if file.endswith(s)), None)


def _not_found(task: Task, data: str, root: Path) -> CorpusError:
    if data == PACKAGED_TASKS:
        return CorpusError(
            f"evaluation.data: expected a folder with {task.name}, got packaged, which holds a "
            "slice of ncbi-disease only. Give one with --data DIR."
        )
    there = sorted(path.name for path in root.iterdir())[:8]
    return CorpusError(
        f"evaluation.data: expected files of {task.name} in {data!r}, got {', '.join(there)}. Name "
        f"them {task.name}.train.jsonl.gz, {task.name}.test.jsonl.gz, or put train.tsv and "
        f"test.tsv into a folder {task.name}."
    )
