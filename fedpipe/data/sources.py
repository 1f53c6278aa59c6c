"""Find the files, folders and hub datasets that hold the documents, and check them before any work.

Text files are read line by line by fedpipe itself, so that an error can name the line. Parquet
files, ``save_to_disk`` folders and hub datasets are read through Hugging Face ``datasets``,
memory-mapped or streamed. At most a batch of documents is in memory at any time.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedpipe.config.half_files import check_fetched
from fedpipe.config.schema import PACKAGED, RunConfig
from fedpipe.data.tokenizer import SAMPLES
from fedpipe.errors import CorpusError

Kind = Literal["jsonl", "txt", "parquet", "folder", "hub"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".txt": "txt",
    ".txt.gz": "txt",
    ".parquet": "parquet",
}
_HUB = "hf:"
_HUB_SPLITS = {"data.train": "train", "data.valid": "validation"}
_PACKAGED_FILES = {
    "data.train": "bio_pmc.train.jsonl.gz",
    "data.valid": "bio_pmc.valid.jsonl.gz",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file, folder or hub dataset of ``data.train`` or ``data.valid``."""

    key: str
    """``data.train`` or ``data.valid``."""
    entry: int
    """Index of the entry of ``key`` that names this source."""
    kind: Kind
    """File format, folder or hub dataset."""
    path: str
    """File, folder, or ``NAME:SPLIT`` of a hub dataset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns that a run reads."""

    text: str
    """Column of the documents."""
    partition: str
    """Column that names the owner; empty if the partition does not use one."""

    @classmethod
    def of(cls, config: RunConfig) -> Columns:
        """Return the columns that a configuration names."""
        needed = config.data.partition in ("column", "dirichlet")
        return cls(
            text=config.data.text_column,
            partition=config.data.partition_column if needed else "",
        )

    def require(self, existing: Iterable[str], *, where: str) -> None:
        """Check that the columns exist.

        Args:
            existing: The columns of the source.
            where: The file, and the line if it has lines, for errors.

        Raises:
            CorpusError: One of the columns is missing.
        """
        names = list(existing)
        for key, column in (("text_column", self.text), ("partition_column", self.partition)):
            if column and column not in names:
                listed = ", ".join(names) or "no columns"
                raise CorpusError(
                    f"data.{key}: expected a column {column!r} in {where}, got {listed}. "
                    f"Set data.{key} to one that exists."
                )


def resolve(key: str, entries: tuple[str, ...]) -> tuple[Source, ...]:
    """Find the sources that a list of entries names; files of a pattern come in order of name.

    Args:
        key: ``data.train`` or ``data.valid``.
        entries: The value of the key.

    Returns:
        The sources in order.

    Raises:
        CorpusError: An entry names something that does not exist, is empty or cannot be read.
    """
    _require_paths(key, entries)
    sources: list[Source] = []
    for index, entry in enumerate(entries):
        if entry.startswith(_HUB):
            found: list[tuple[Kind, str]] = [("hub", _hub_name(key, entry))]
        elif entry == PACKAGED:
            found = [("jsonl", str(SAMPLES / _PACKAGED_FILES[key]))]
        else:
            found = [(_kind(key, path), path) for path in _paths(key, entry)]
        sources += [Source(key=key, entry=index, kind=kind, path=path) for kind, path in found]
    return tuple(sources)


def data_files(source: Source) -> tuple[str, ...]:
    """List the files of a source, in reading order; empty for a hub dataset."""
    if source.kind == "hub":
        return ()
    if source.kind == "folder":
        return folder_files(source)
    return (source.path,)


def folder_files(source: Source) -> tuple[str, ...]:
    """List the Arrow files of a ``save_to_disk`` folder.

    Args:
        source: The folder.

    Returns:
        Their paths, in the order of the rows.

    Raises:
        CorpusError: The folder's state.json cannot be read or names missing files.
    """
    folder = Path(source.path)
    check_fetched(folder / "state.json", key=source.key, error=CorpusError)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{source.key}: expected a folder written by save_to_disk, got {source.path!r} with an "
            "unreadable state.json. Save the dataset again."
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CorpusError(
            f"{source.key}: expected the file {missing[0]} (see state.json) in {source.path!r}, "
            "got none. Save the dataset again."
        )
    for file in files:
        check_fetched(file, key=source.key, error=CorpusError)
    return tuple(str(file) for file in files)


def _hub_name(key: str, entry: str) -> str:
    name, _, split = entry.removeprefix(_HUB).partition(":")
    if not name or ":" in split:
        raise CorpusError(
            f"{key}: expected hf:NAME or hf:NAME:SPLIT, got {entry!r}. "
            "Name a dataset of the hub, for example hf:owner/dataset:train."
        )
    return f"{name}:{split or _HUB_SPLITS[key]}"


def _require_paths(key: str, entries: tuple[str, ...]) -> None:
    """Refuse entries that name nothing, and list all of them in one error."""
    missing = [
        repr(entry)
        for entry in entries
        if entry != PACKAGED and not entry.startswith(_HUB) and not _could_be_there(entry)
    ]
    if missing:
        does = (
            "does not exist. Correct the path"
            if len(missing) == 1
            else ("do not exist. Correct the paths")
        )
        raise CorpusError(
            f"{key}: expected a file or folder, got {', '.join(missing)}, which {does}."
        )


def _could_be_there(entry: str) -> bool:
    return Path(entry).exists() or glob.has_magic(entry)


def _paths(key: str, entry: str) -> list[str]:
    if Path(entry).exists():
        return [entry]
    found = sorted(glob.glob(entry, recursive=True))
    if not found:
        raise CorpusError(
            f"{key}: expected files that match {entry!r}, got none. Correct the pattern."
        )
    return found


def _kind(key: str, path: str) -> Kind:
    if Path(path).is_dir():
        _check_folder(key, path)
        return "folder"
    suffix = next((suffix for suffix in _KINDS if path.endswith(suffix)), None)
    if suffix is None:
        raise CorpusError(
            f"{key}: expected a file ending in {', '.join(_KINDS)}, or a save_to_disk folder, "
            f"got {path!r}. Convert it, for example with load_dataset(...).save_to_disk(DIR)."
        )
    if Path(path).stat().st_size == 0:
        raise CorpusError(
            f"{key}: expected text, got the empty file {path!r}. "
            "Remove it from the list or fill it."
        )
    check_fetched(path, key=key, error=CorpusError)
    return _KINDS[suffix]


def _check_folder(key: str, path: str) -> None:
    folder = Path(path)
    if (folder / "state.json").is_file():
        return
    splits = sorted(child.parent.name for child in folder.glob("*/state.json"))
    if splits:
        raise CorpusError(
            f"{key}: expected one split, got {path!r} with {', '.join(splits)}. "
            f"Name one of them, for example {folder / splits[0]}."
        )
    raise CorpusError(
        f"{key}: expected a folder written by save_to_disk, got {path!r} without a state.json. "
        f"Name its files, for example {folder / '*.jsonl'}."
    )
