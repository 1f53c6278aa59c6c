"""A task, tokenised for a model and kept in the cache that corpora are kept in. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpipe.config.schema import RunConfig
from fedpipe.data.cache import building, cache_root
from fedpipe.data.digests import digest, file_digests
from fedpipe.data.tasks.encoding import Encoded, encode, load_tokenizer
from fedpipe.data.tasks.files import TaskFiles
from fedpipe.data.tasks.reading import hub_fingerprint, read_task
from fedpipe.data.tasks.registry import Task

FORMAT = 2
"""Raised with every change of what the files look like or how examples become tokens."""
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedTask:
    """A tokenised task in the cache."""

    directory: str
    """Holds a file per split."""
    examples: dict[str, int]
    """By split: ``train``, ``dev`` where it chooses the epoch, ``test``, ``mismatched``."""
    sequences: dict[str, int]
    """By split; NER sentences may be several."""
    truncated: dict[str, int]
    """By split, examples of which something did not fit."""
    test_split: str
    """What the publishers call the test: ``dev`` where no labelled test split is published."""
    largest_id: int
    """Of all tokens."""
    left_out: dict[str, str]
    """By split with bad rows: how many of how many, and what is wrong with the first."""

    def split(self, name: str) -> Encoded:
        """Read a split."""
        return Encoded.load(Path(self.directory) / f"{name}.npz")


def task_digest(config: RunConfig, files: TaskFiles) -> str:
    """Identify the content of a task, and what is made of its labels."""
    content: object
    if files.format == "hub":
        content = hub_fingerprint(files)
    else:
        root = cache_root(config)
        content = file_digests(files.paths(), key="evaluation.data", root=root)
    splits = sorted((split, Path(path).name) for split, path in files.splits.items())
    known = [files.task.name, files.format, splits, content, _typed(config, files)]
    return digest([*known, *_description(files.task)])


def prepare_task(
    config: RunConfig,
    files: TaskFiles,
    *,
    folder: str,
    tokenizer_digest: str,
    content: str,
    max_length: int,
) -> PreparedTask:
    """Tokenise a task, unless the cache holds it.

    Args:
        config: Where the cache is, and what to make of labels.
        files: The task.
        folder: Of the model, with its tokenizer.
        tokenizer_digest: Of the tokenizer's files.
        content: From ``task_digest``.
        max_length: Tokens per sequence.

    Returns:
        The tokenised task.

    Raises:
        CorpusError: The task or the tokenizer cannot be used.
    """
    root = cache_root(config)
    key = f"task-{digest([FORMAT, content, tokenizer_digest, max_length])[:24]}"
    directory = root / "prepared" / key
    found = _read(directory)
    if found is not None:
        return found
    splits, test_split, left_out = read_task(files, typed=_typed(config, files))
    tokenizer = load_tokenizer(folder)
    encoded = {
        name: encode(files.task, examples, tokenizer, max_length=max_length)
        for name, examples in splits.items()
    }
    prepared = PreparedTask(
        directory="",
        examples={name: len(examples) for name, examples in splits.items()},
        sequences={name: split.num_sequences for name, split in encoded.items()},
        truncated={name: split.num_truncated for name, split in encoded.items()},
        test_split=test_split,
        left_out=left_out,
        largest_id=max(int(split.ids.max()) for split in encoded.values()),
    )
    with building(root, key) as new:
        for name, split in encoded.items():
            split.save(new / f"{name}.npz")
        (new / _MANIFEST).write_text(json.dumps(asdict(prepared)), encoding="utf-8")
    result = _read(directory)
    assert result is not None, "it was published just now"
    return result


def _description(task: Task) -> list[object]:
    """Return what a task file says of how rows are read and scored; nothing of other tasks."""
    if not task.file:
        return []
    return [task.kind, task.metrics, task.labels, task.negative, task.text, task.pair, task.label]


def _typed(config: RunConfig, files: TaskFiles) -> bool:
    return config.evaluation.typed_entities and len(files.task.labels) > 1


def _read(directory: Path) -> PreparedTask | None:
    try:
        content = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        return PreparedTask(**(content | {"directory": str(directory)}))
    except (OSError, ValueError, TypeError):
        return None
