"""One preparation: survey the text, assign documents to clients, pack them, write the manifest."""

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
from fedpipe.data.blocks import TOKEN_COUNTS, PreparedData, Shard, save_manifest
from fedpipe.data.packing import Packed, pack
from fedpipe.data.partition import IGNORED, Documents
from fedpipe.data.reading import Document, read
from fedpipe.data.sources import Columns, Source
from fedpipe.data.tokenizer import TokenizerInfo, tokenizer_files
from fedpipe.errors import CorpusError

Progress = Callable[[str, int, int], None]
"""Called with a phase, the work done and the work in all; only their ratio means something."""

Sources = dict[str, tuple[Source, ...]]
"""Sources by key, ``data.train`` and ``data.valid``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the steps of one preparation share."""

    config: RunConfig
    """The run."""
    sources: Sources
    """Its text."""
    tokenizer: TokenizerInfo
    """Its vocabulary."""
    root: Path
    """The cache directory."""
    progress: Progress
    """Told about the work done."""

    @property
    def columns(self) -> Columns:
        """The columns that the run reads."""
        return Columns.of(self.config)


def assemble(job: Job, directory: Path) -> None:
    """Fill an empty directory with the prepared text of a job.

    Args:
        job: What to prepare.
        directory: Where shards, token counts, tokenizer and manifest go.

    Raises:
        CorpusError: Text or partition cannot be used.
    """
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
    _finish(job, directory, train_shards, valid_shards, int((valid_clients == IGNORED).sum()))


def _survey(job: Job, key: str) -> Documents:
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
    job: Job, key: str, clients: NDArray[np.int32], directory: Path, num_files: int
) -> Packed:
    split = key.removeprefix("data.")
    return pack(
        _documents(job, key),
        clients,
        paths=[directory / f"{split}_{client:05d}.bin" for client in range(num_files)],
        tokenizer=job.tokenizer,
        sequence_length=job.config.data.sequence_length,
        num_threads=job.config.data.num_workers or _num_cores(),
        progress=lambda done: job.progress(f"tokenise {key}", done, len(clients)),
    )


def _num_cores() -> int:
    """Count the cores that this process may use; only Linux knows of a restriction."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _documents(job: Job, key: str) -> Iterator[Document]:
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
    job: Job, key: str, packed: Packed, values: list[tuple[str, ...]], *, copies: int = 1
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
        shards.append(
            Shard(
                client_id=client,
                path=stream.path.name,
                num_blocks=stream.num_blocks,
                num_documents=stream.num_documents,
                num_tokens=stream.num_tokens,
                sequence_length=length,
                dtype=stream.dtype,
                values=held,
            )
        )
    return tuple(shards)


def _finish(
    job: Job, directory: Path, train: tuple[Shard, ...], valid: tuple[Shard, ...], num_ignored: int
) -> None:
    """Copy the tokenizer, so that nothing outside is needed any more, and write the manifest."""
    info = job.tokenizer
    tokenizer_dir = directory / "tokenizer"
    tokenizer_dir.mkdir()
    for path in tokenizer_files(info):
        shutil.copyfile(path, tokenizer_dir / path.name)
    prepared = PreparedData(
        directory=str(directory),
        train=train,
        valid=valid,
        tokenizer_dir=tokenizer_dir.name,
        vocab_size=info.vocab_size,
        cls_id=info.cls_id,
        sep_id=info.sep_id,
        mask_id=info.mask_id,
        pad_id=info.pad_id,
        special_ids=info.special_ids,
        sequence_length=job.config.data.sequence_length,
        num_ignored_documents=num_ignored,
    )
    save_manifest(prepared, directory)
