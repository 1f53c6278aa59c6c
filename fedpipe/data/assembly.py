"""Prepare text: read it once, assign documents to clients, pack them, write the manifest."""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpipe.config.schema import RunConfig
from fedpipe.data import partition
from fedpipe.data.blocks import TOKEN_COUNTS, PreparedData, Shard, save_manifest
from fedpipe.data.packing import Packed, pack
from fedpipe.data.partition import UNASSIGNED, Documents
from fedpipe.data.reading import Document, read
from fedpipe.data.sources import Columns, Source
from fedpipe.data.tokenizer import TokenizerInfo
from fedpipe.errors import CorpusError

Progress = Callable[[str, int, int], None]
"""Called with a phase, the work done and the total work, in units of the phase."""

Sources = dict[str, tuple[Source, ...]]
"""Sources by key, ``data.train`` and ``data.valid``."""

# Training documents that are compared at once.
_COMPARED = 1 << 14

_LISTED = 20
"""Clients that an error lists by name; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Inputs of one preparation, shared by its steps."""

    config: RunConfig
    sources: Sources
    tokenizer: TokenizerInfo
    root: Path
    """The cache directory."""
    progress: Progress

    @property
    def columns(self) -> Columns:
        """Columns of the text and of the owner."""
        return Columns.of(self.config)


def assemble(prep: Preparation, directory: Path) -> None:
    """Fill an empty directory with prepared text.

    Args:
        prep: Configuration and sources.
        directory: Gets shards, token counts, tokenizer and manifest.

    Raises:
        CorpusError: Text or partition cannot be used.
    """
    overlap = Overlap()
    # Held-out text comes first, because it is smaller and its digests stay in memory.
    valid = _survey(prep, "data.valid", overlap.hold_out) if prep.sources["data.valid"] else None
    train = _survey(prep, "data.train", overlap.train_on)
    train_clients, valid_clients = _assign(prep.config, train, valid)
    num_clients = prep.config.federation.num_clients
    packed = _pack(prep, "data.train", train_clients, directory, num_clients)
    np.save(directory / TOKEN_COUNTS, packed.token_counts)
    train_shards = _shards(prep, packed, _values(train, train_clients, num_clients))
    _require_text(prep, train_shards)
    valid_shards: tuple[Shard, ...] = ()
    if valid is not None:
        shared = prep.config.data.partition == "paths" and len(prep.config.data.valid) == 1
        files = 1 if shared else num_clients
        held_out = _pack(prep, "data.valid", valid_clients, directory, files)
        values = _values(valid, valid_clients, files)
        # With a single entry every client scores the same text.
        copies = num_clients if shared else 1
        valid_shards = _shards(prep, held_out, values, copies=copies)
        _require_held_out_text(prep, valid_shards)
    prepared = _describe(
        prep,
        directory,
        train=train_shards,
        valid=valid_shards,
        num_ignored=int((valid_clients == UNASSIGNED).sum()),
        num_held_out=len(valid_clients),
        num_overlapping=overlap.count(),
    )
    _finish(prep, directory, prepared)


def _survey(prep: Preparation, key: str, compare: Callable[[str], None]) -> Documents:
    """Read and check every line once, and collect what the partition depends on."""
    codes = array("i")
    index: dict[str, int] = {}
    sizes: list[int] = []
    columns = prep.columns
    by_entry = prep.config.data.partition == "paths"
    total = sum(os.path.getsize(s.path) for s in prep.sources[key] if os.path.isfile(s.path))
    before = 0
    for source in prep.sources[key]:

        def tick(done: int, base: int = before) -> None:
            prep.progress(f"check {key}, bytes", base + done, total)

        for text, value in read(source, columns=columns, tick=tick):
            compare(text)
            if columns.partition:
                code = index.setdefault(value, len(index))
                if code == len(sizes):
                    sizes.append(0)
                sizes[code] += len(text)
                codes.append(code)
            else:
                codes.append(source.entry if by_entry else 0)
        if os.path.isfile(source.path):
            before += os.path.getsize(source.path)
            prep.progress(f"check {key}, bytes", before, total)
    return Documents(
        codes=np.frombuffer(codes, dtype=np.int32) if codes else np.empty(0, dtype=np.int32),
        values=tuple(index),
        sizes=tuple(sizes),
    )


def _assign(
    config: RunConfig, train: Documents, valid: Documents | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    data, num_clients = config.data, config.federation.num_clients
    if data.partition == "column":
        return partition.by_column(
            train, valid, num_clients=num_clients, column=data.partition_column
        )
    if data.partition == "iid":
        return partition.iid(train, valid, num_clients=num_clients, seed=config.seed)
    if data.partition == "dirichlet":
        return partition.dirichlet(
            train, valid, num_clients=num_clients, alpha=data.dirichlet_alpha, seed=config.seed
        )
    return train.codes, valid.codes if valid is not None else np.empty(0, dtype=np.int32)


def _pack(
    prep: Preparation, key: str, clients: NDArray[np.int32], directory: Path, num_files: int
) -> Packed:
    split = key.removeprefix("data.")
    return pack(
        _documents(prep, key),
        clients,
        paths=[directory / f"{split}_{client:05d}.bin" for client in range(num_files)],
        tokenizer=prep.tokenizer,
        sequence_length=prep.config.data.sequence_length,
        num_masked=prep.config.data.num_masked,
        num_threads=prep.config.data.num_workers or _num_cores(),
        progress=lambda done: prep.progress(f"tokenise {key}, documents", done, len(clients)),
    )


def _num_cores() -> int:
    """Count the cores that this process may use; only Linux can restrict them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _documents(prep: Preparation, key: str) -> Iterator[Document]:
    for source in prep.sources[key]:
        yield from read(source, columns=prep.columns)


def _values(
    documents: Documents, clients: NDArray[np.int32], num_clients: int
) -> list[tuple[str, ...]]:
    """List the column values that each client holds, in corpus order."""
    if not documents.values:
        return [()] * num_clients
    width = len(documents.values)
    known = clients != UNASSIGNED
    pairs = np.unique(clients[known].astype(np.int64) * width + documents.codes[known])
    held: list[list[str]] = [[] for _ in range(num_clients)]
    for pair in pairs.tolist():
        held[pair // width].append(documents.values[pair % width])
    return [tuple(values) for values in held]


def _shards(
    prep: Preparation, packed: Packed, values: list[tuple[str, ...]], *, copies: int = 1
) -> tuple[Shard, ...]:
    return tuple(
        Shard(
            client_id=client,
            path=stream.path.name,
            num_blocks=stream.num_blocks,
            num_left_out=stream.num_left_out,
            num_documents=stream.num_documents,
            num_tokens=stream.num_tokens,
            sequence_length=prep.config.data.sequence_length,
            dtype=stream.dtype,
            values=values[client % len(packed.streams)],
        )
        for client, stream in enumerate(packed.streams * copies)
    )


def _require_text(prep: Preparation, shards: tuple[Shard, ...]) -> None:
    """Refuse training text that leaves clients without a block, and name these clients."""
    empty = [shard for shard in shards if shard.num_blocks == 0]
    if not empty:
        return
    raise CorpusError(
        f"data.train: expected at least one block of {prep.config.data.sequence_length - 2} tokens "
        f"for each of {len(shards)} clients, got less for {len(empty)}: {_sizes(prep, empty)}. "
        f"Add text, lower federation.num_clients or data.sequence_length{_or_tokenizer(empty)}."
    )


def _require_held_out_text(prep: Preparation, shards: tuple[Shard, ...]) -> None:
    """Refuse held-out text that gives no client a block; some clients may have none."""
    if any(shard.num_blocks for shard in shards):
        return
    empty = shards if len({shard.path for shard in shards}) > 1 else shards[:1]
    raise CorpusError(
        f"data.valid: expected at least one block of {prep.config.data.sequence_length - 2} tokens "
        f"for at least one client, got less for all {len(shards)}: {_sizes(prep, empty)}. "
        f"Add text, lower data.sequence_length{_or_tokenizer(empty)}, or set data.valid=[]."
    )


def _sizes(prep: Preparation, shards: Sequence[Shard]) -> str:
    """List clients and the amount of text that each of them has."""
    found = []
    for shard in shards[:_LISTED]:
        name = f" ({', '.join(shard.values[:3])})" if shard.values else ""
        text = f"client {shard.client_id}{name} {shard.num_tokens:,} tokens"
        if shard.num_left_out:
            text += (
                f" with {shard.num_left_out:,} blocks of fewer than {prep.config.data.num_masked} "
                "ordinary ones"
            )
        found.append(text)
    if len(shards) > _LISTED:
        found.append(f"and {len(shards) - _LISTED} more")
    return ", ".join(found)


def _or_tokenizer(shards: Sequence[Shard]) -> str:
    left_out = any(shard.num_left_out for shard in shards)
    return ", or set a data.tokenizer that knows the words" if left_out else ""


def _describe(
    prep: Preparation,
    directory: Path,
    *,
    train: tuple[Shard, ...],
    valid: tuple[Shard, ...],
    num_ignored: int,
    num_held_out: int,
    num_overlapping: int,
) -> PreparedData:
    info = prep.tokenizer
    return PreparedData(
        directory=str(directory),
        train=train,
        valid=valid,
        tokenizer_dir="tokenizer",
        vocab_size=info.vocab_size,
        cls_id=info.cls_id,
        sep_id=info.sep_id,
        mask_id=info.mask_id,
        pad_id=info.pad_id,
        special_ids=info.special_ids,
        sequence_length=prep.config.data.sequence_length,
        num_masked=prep.config.data.num_masked,
        num_ignored_documents=num_ignored,
        num_held_out=num_held_out,
        num_overlapping=num_overlapping,
    )


def _finish(prep: Preparation, directory: Path, prepared: PreparedData) -> None:
    """Copy the tokenizer, which makes the directory self-contained, and write the manifest."""
    tokenizer_dir = directory / prepared.tokenizer_dir
    tokenizer_dir.mkdir()
    for path in prep.tokenizer.files():
        shutil.copyfile(path, tokenizer_dir / path.name)
    save_manifest(prepared, directory)


class Overlap:
    """Counts the held-out documents that occur among the training documents.

    Documents count as equal if they differ only in white space. The memory is eight bytes per
    held-out document. Digests are Python's own 64-bit hash of a text, valid within one process:
    among a million held-out and half a billion training documents two different texts have the
    same hash with a probability below 1e-4.
    """

    def __init__(self) -> None:
        """Start without any document."""
        self._held_out = array("q")
        self._waiting = array("q")
        self._sorted: NDArray[np.int64] | None = None
        self._found: NDArray[np.bool_] = np.empty(0, dtype=bool)

    def hold_out(self, text: str) -> None:
        """Add a held-out document; all of them are added before the first training document."""
        self._held_out.append(_digest(text))

    def train_on(self, text: str) -> None:
        """Add a training document."""
        if not self._held_out:
            return
        self._waiting.append(_digest(text))
        if len(self._waiting) == _COMPARED:
            self._look_up()

    def count(self) -> int:
        """Count the held-out documents that were found in training text, duplicates included."""
        self._look_up()
        return int(self._found.sum())

    def _look_up(self) -> None:
        if not self._waiting:
            return
        if self._sorted is None:
            self._sorted = np.sort(np.frombuffer(self._held_out, dtype=np.int64))
            self._found = np.zeros(len(self._sorted), dtype=bool)
        seen = np.unique(np.frombuffer(self._waiting, dtype=np.int64))
        first = np.searchsorted(self._sorted, seen, side="left")
        last = np.searchsorted(self._sorted, seen, side="right")
        for low, high in zip(first[first < last], last[first < last], strict=True):
            self._found[low:high] = True
        self._waiting = array("q")


def _digest(text: str) -> int:
    return hash(" ".join(text.split()))
