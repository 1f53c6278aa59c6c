"""From the configuration to prepared text: check, hash, partition, tokenise, pack, cache.

The names that the rest of fedpipe uses are all here.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpipe.config.schema import RunConfig
from fedpipe.data import partition
from fedpipe.data.blocks import (
    MANIFEST,
    TOKEN_COUNTS,
    BlockReader,
    PreparedData,
    Shard,
    is_complete,
    load_prepared,
    save_manifest,
    token_counts,
)
from fedpipe.data.cache import (
    building,
    cache_key,
    cache_root,
    content_digests,
    discard,
    remember_hub,
)
from fedpipe.data.packing import Packed, pack
from fedpipe.data.partition import IGNORED, Documents
from fedpipe.data.reading import Document, check, open_dataset, read
from fedpipe.data.sources import Columns, Source, resolve
from fedpipe.data.tokenizer import FILES, TokenizerInfo, tokenizer_info
from fedpipe.errors import CorpusError

__all__ = [
    "BlockReader",
    "PreparedData",
    "Progress",
    "Shard",
    "TokenizerInfo",
    "check_sources",
    "load_prepared",
    "prepare",
    "token_counts",
    "tokenizer_info",
]

Progress = Callable[[str, int, int], None]
"""Called with a phase, the work done and the work in all; only their ratio means something."""

Sources = dict[str, tuple[Source, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What the steps of one preparation share."""

    config: RunConfig
    sources: Sources
    tokenizer: TokenizerInfo
    root: Path
    progress: Progress

    @property
    def columns(self) -> Columns:
        return Columns.of(self.config)


def check_sources(config: RunConfig) -> None:
    """Check ``data.train`` and ``data.valid`` as far as that is quick.

    Files exist, have a known suffix and are not empty; their first megabyte is UTF-8 text; their
    first row has the columns. Hub datasets are not looked up. ``prepare`` checks every line.

    Args:
        config: The run.

    Raises:
        CorpusError: A source cannot be used.
    """
    sources = _resolve(config)
    for source in (*sources["data.train"], *sources["data.valid"]):
        check(source, columns=Columns.of(config))


def prepare(config: RunConfig, *, progress: Progress | None = None) -> PreparedData:
    """Bring the text of a run into blocks on disk, or find it there.

    The result depends on the content of the files and on the settings only, and is complete or
    absent: a second call returns at once, a killed one leaves nothing that a later one would take.

    Args:
        config: The run.
        progress: Called while files are hashed, checked and tokenised.

    Returns:
        The prepared text.

    Raises:
        CorpusError: Text, tokenizer, partition or cache cannot be used.
    """
    job = _Job(
        config=config,
        sources=_resolve(config),
        tokenizer=tokenizer_info(config),
        root=cache_root(config),
        progress=progress or _silent,
    )
    key = _key(job)
    if (found := _find(job, key)) is not None:
        return found
    _check(job)
    # Opening a hub dataset may have shown another revision than the one remembered.
    key = _key(job)
    if (found := _find(job, key)) is not None:
        return found
    with building(job.root, key) as directory:
        _build(job, directory)
    return load_prepared(str(job.root / "prepared" / key))


def _resolve(config: RunConfig) -> Sources:
    data, clients = config.data, config.federation.num_clients
    if data.partition == "paths":
        if len(data.train) != clients:
            raise CorpusError(
                f"data.train: expected {clients} entries, one per client (data.partition=paths), "
                f"got {len(data.train)}. Set federation.num_clients={len(data.train)} or correct "
                "the list."
            )
        if len(data.valid) not in (0, 1, clients):
            raise CorpusError(
                f"data.valid: expected {clients} entries, one per client, or one for all "
                f"(data.partition=paths), got {len(data.valid)}. Correct the list."
            )
    return {
        "data.train": resolve("data.train", data.train),
        "data.valid": resolve("data.valid", data.valid),
    }


def _all(job: _Job) -> tuple[Source, ...]:
    return (*job.sources["data.train"], *job.sources["data.valid"])


def _key(job: _Job) -> str:
    digests = content_digests(
        _all(job), job.root, progress=lambda done, total: job.progress("hash", done, total)
    )
    return cache_key(job.config, tokenizer=job.tokenizer, sources=_all(job), digests=digests)


def _find(job: _Job, key: str) -> PreparedData | None:
    directory = job.root / "prepared" / key
    if not directory.exists():
        return None
    if (directory / MANIFEST).is_file():
        prepared = load_prepared(str(directory))
        if is_complete(prepared):
            return prepared
    discard(directory)
    return None


def _check(job: _Job) -> None:
    """Do the quick checks, and open what only opening can check."""
    for source in _all(job):
        check(source, columns=job.columns)
        if source.kind == "hub":
            job.progress(f"fetch {source.path}", 0, 1)
            dataset = open_dataset(source)
            remember_hub(source, getattr(dataset, "_fingerprint", ""), job.root)
            job.progress(f"fetch {source.path}", 1, 1)


def _build(job: _Job, directory: Path) -> None:
    train = _survey(job, "data.train")
    valid = _survey(job, "data.valid") if job.sources["data.valid"] else None
    train_clients, valid_clients = _assign(job.config, train, valid)
    num_clients = job.config.federation.num_clients
    packed = _pack(job, "data.train", train_clients, directory, num_clients)
    np.save(directory / TOKEN_COUNTS, packed.token_counts)
    train_shards = _shards(job, "data.train", packed, _values(train, train_clients, num_clients))
    valid_shards: tuple[Shard, ...] = ()
    if valid is not None:
        shared = job.config.data.partition == "paths" and len(job.config.data.valid) == 1
        files = 1 if shared else num_clients
        held_out = _pack(job, "data.valid", valid_clients, directory, files)
        values = _values(valid, valid_clients, files)
        # Every client scores the same text where there is only one.
        copies = num_clients if shared else 1
        valid_shards = _shards(job, "data.valid", held_out, values, copies=copies)
    tokenizer_dir = directory / "tokenizer"
    tokenizer_dir.mkdir()
    for name in FILES:
        if Path(job.tokenizer.directory, name).is_file():
            shutil.copyfile(Path(job.tokenizer.directory, name), tokenizer_dir / name)
    info = job.tokenizer
    prepared = PreparedData(
        directory=str(directory), train=train_shards, valid=valid_shards,
        vocab_size=info.vocab_size, cls_id=info.cls_id, sep_id=info.sep_id, mask_id=info.mask_id,
        pad_id=info.pad_id, special_ids=info.special_ids, tokenizer_dir=tokenizer_dir.name,
        sequence_length=job.config.data.sequence_length,
        num_ignored_documents=int((valid_clients == IGNORED).sum()),
    )
    save_manifest(prepared, directory)


def _survey(job: _Job, key: str) -> Documents:
    """Read everything once: checks every line and learns what the partition must know."""
    codes = array("i")
    index: dict[str, int] = {}
    sizes: list[int] = []
    columns = job.columns
    by_entry = job.config.data.partition == "paths"
    total = sum(os.path.getsize(s.path) for s in job.sources[key] if os.path.isfile(s.path))
    before = 0
    for source in job.sources[key]:
        def tick(done: int, base: int = before) -> None:
            job.progress(f"check {key}", base + done, total)

        for text, value in read(source, columns=columns, tick=tick):
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
            job.progress(f"check {key}", before, total)
    return Documents(
        codes=np.frombuffer(codes, dtype=np.int32) if codes else np.empty(0, dtype=np.int32),
        values=tuple(index), sizes=tuple(sizes),
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
    job: _Job, key: str, clients: NDArray[np.int32], directory: Path, num_files: int
) -> Packed:
    split = key.removeprefix("data.")
    return pack(
        _documents(job, key), clients,
        paths=[directory / f"{split}_{client:05d}.bin" for client in range(num_files)],
        tokenizer=job.tokenizer,
        sequence_length=job.config.data.sequence_length,
        num_threads=job.config.data.num_workers or len(os.sched_getaffinity(0)),
        progress=lambda done: job.progress(f"tokenise {key}", done, len(clients)),
    )


def _documents(job: _Job, key: str) -> Iterator[Document]:
    for source in job.sources[key]:
        yield from read(source, columns=job.columns)


def _values(
    documents: Documents, clients: NDArray[np.int32], num_clients: int
) -> list[tuple[str, ...]]:
    """List the column values that each client holds, in order of the corpus."""
    if not documents.values:
        return [()] * num_clients
    width = len(documents.values)
    known = clients != IGNORED
    pairs = np.unique(clients[known].astype(np.int64) * width + documents.codes[known])
    held: list[list[str]] = [[] for _ in range(num_clients)]
    for pair in pairs.tolist():
        held[pair // width].append(documents.values[pair % width])
    return [tuple(values) for values in held]


def _shards(
    job: _Job, key: str, packed: Packed, values: list[tuple[str, ...]], *, copies: int = 1
) -> tuple[Shard, ...]:
    shards = []
    length = job.config.data.sequence_length
    for client, stream in enumerate(packed.streams * copies):
        held = values[client % len(packed.streams)]
        if stream.num_blocks == 0:
            name = f" ({', '.join(held[:3])})" if held else ""
            raise CorpusError(
                f"{key}: expected at least one block of {length - 2} tokens for client "
                f"{client}{name}, got {stream.num_tokens} tokens. Add text, lower "
                "federation.num_clients or data.sequence_length"
                + (", or set data.valid=[]." if key == "data.valid" else ".")
            )
        shards.append(Shard(
            client_id=client, path=stream.path.name, num_blocks=stream.num_blocks,
            num_documents=stream.num_documents, num_tokens=stream.num_tokens,
            sequence_length=length, dtype=stream.dtype, values=held,
        ))
    return tuple(shards)


def _silent(phase: str, done: int, total: int) -> None:
    """Show nothing."""
