"""Prepare the text of a configuration: check, hash, partition, tokenise, pack and cache it.

The rest of fedpipe imports the names of this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedpipe.config.schema import RunConfig
from fedpipe.data.assembly import Preparation, Progress, Sources, assemble
from fedpipe.data.blocks import (
    MANIFEST,
    BlockReader,
    PreparedData,
    Shard,
    is_complete,
    load_prepared,
    token_counts,
)
from fedpipe.data.cache import (
    building,
    cache_key,
    cache_path,
    cache_root,
    cached_digests,
    content_digests,
    discard,
    hub_digest,
    save_hub_digest,
)
from fedpipe.data.digests import FileDigests, file_digests
from fedpipe.data.reading import check, open_dataset
from fedpipe.data.sources import Columns, Source, resolve
from fedpipe.data.tokenizer import TokenizerInfo, tokenizer_info
from fedpipe.errors import CorpusError

__all__ = [
    "BlockReader",
    "Identity",
    "PreparedData",
    "Progress",
    "Shard",
    "TokenizerInfo",
    "check_sources",
    "find_prepared",
    "identify",
    "load_prepared",
    "prepare",
    "prepared_under",
    "token_counts",
    "tokenizer_info",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The content of a run's text and tokenizer, independent of paths."""

    key: str
    """Cache key of the prepared text; equal keys mean equal blocks."""
    files: dict[str, FileDigests]
    """Digests for ``data.train``, ``data.valid`` and ``data.tokenizer``, in reading order."""


def check_sources(config: RunConfig) -> None:
    """Check ``data.train`` and ``data.valid`` without reading them whole.

    Every file must exist, have a known suffix and not be empty; its first megabyte must be UTF-8
    text, and its first row must have the columns. Hub datasets are not downloaded. ``prepare``
    checks every line.

    Args:
        config: The run.

    Raises:
        CorpusError: A source cannot be used.
    """
    sources = _resolve(config)
    for source in (*sources["data.train"], *sources["data.valid"]):
        check(source, columns=Columns.of(config))


def prepare(config: RunConfig, *, progress: Progress | None = None) -> PreparedData:
    """Pack the text of a run into blocks on disk, or find it in the cache.

    The result depends only on the content of the files and on the settings, and is complete or
    absent: a second call returns at once, and a killed call leaves nothing that a later one uses.

    Args:
        config: The run.
        progress: Called while files are hashed, checked and tokenised.

    Returns:
        The prepared text.

    Raises:
        CorpusError: Text, tokenizer, partition or cache cannot be used.
    """
    prep = _preparation(config, progress)
    key = _identify(prep).key
    if (found := prepared_under(key, root=prep.root)) is not None:
        return found
    _check(prep)
    # Opening a hub dataset may have found another revision than the stored fingerprint's.
    key = _identify(prep).key
    if (found := prepared_under(key, root=prep.root)) is not None:
        return found
    with building(prep.root, key) as directory:
        assemble(prep, directory)
    return load_prepared(str(prep.root / "prepared" / key))


def identify(config: RunConfig, *, progress: Progress | None = None) -> Identity:
    """Compute the digests of a run's text and tokenizer; nothing is prepared.

    Args:
        config: The run.
        progress: Called while files are hashed.

    Returns:
        The key of the prepared text, and the digests of all files.

    Raises:
        CorpusError: A file cannot be read.
    """
    prep = _preparation(config, progress)
    _open_hub(prep, [s for s in _all(prep) if s.kind == "hub" and not hub_digest(s, prep.root)])
    return _identify(prep)


def prepared_under(key: str, *, root: Path) -> PreparedData | None:
    """Find prepared text in the cache; a damaged directory is removed.

    Args:
        key: ``Identity.key``.
        root: The cache directory.

    Returns:
        The prepared text; None if there is none.
    """
    directory = root / "prepared" / key
    if not directory.exists():
        return None
    if (directory / MANIFEST).is_file():
        prepared = load_prepared(str(directory))
        if is_complete(prepared):
            return prepared
    discard(directory)
    return None


def _preparation(config: RunConfig, progress: Progress | None) -> Preparation:
    return Preparation(
        config=config,
        sources=_resolve(config),
        tokenizer=tokenizer_info(config),
        root=cache_root(config),
        progress=progress or _silent,
    )


def find_prepared(config: RunConfig) -> PreparedData | None:
    """Find text that an earlier ``prepare`` has left in the cache; reads no text, writes nothing.

    Args:
        config: The run.

    Returns:
        The prepared text; None if there is none, or if a file has changed since.

    Raises:
        CorpusError: An entry of ``data.train`` or ``data.valid`` names no text.
    """
    sources = _resolve(config)
    try:
        root = cache_path(config)
        every = (*sources["data.train"], *sources["data.valid"])
        digests = cached_digests(every, root)
        if digests is None:
            return None
        files = _tokenizer_digests(tokenizer_info(config))
        key = cache_key(config, tokenizer=files, sources=every, digests=digests)
        return load_prepared(str(root / "prepared" / key))
    except CorpusError:
        return None


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
    sources = {
        "data.train": resolve("data.train", data.train),
        "data.valid": resolve("data.valid", data.valid),
    }
    places: dict[str, Source] = {}
    for source in (*sources["data.train"], *sources["data.valid"]):
        first = places.setdefault(os.path.realpath(source.path), source)
        if first is source:
            continue
        if first.key != source.key:
            raise _same_text(source, first)
        raise CorpusError(
            f"{source.key}: expected every file once, got {source.path!r}, which is "
            f"{first.path!r} again. Remove one of them."
        )
    return sources


def _all(prep: Preparation) -> tuple[Source, ...]:
    return (*prep.sources["data.train"], *prep.sources["data.valid"])


def _identify(prep: Preparation) -> Identity:
    sources = _all(prep)
    digests = content_digests(
        sources,
        prep.root,
        progress=lambda done, total: prep.progress("hash files, bytes", done, total),
    )
    known: dict[tuple[str, ...], Source] = {}
    for source, own in zip(sources, digests, strict=True):
        content = tuple(digest for _, digest in own)
        # A hub dataset that was never opened has no content yet.
        if source.key == "data.valid" and source.kind != "hub" and content in known:
            raise _same_text(source, known[content])
        if source.key == "data.train":
            known[content] = source
    tokenizer = _tokenizer_digests(prep.tokenizer)
    files: dict[str, FileDigests] = {key: [] for key in prep.sources}
    for source, own in zip(sources, digests, strict=True):
        files[source.key] += own
    return Identity(
        key=cache_key(prep.config, tokenizer=tokenizer, sources=sources, digests=digests),
        files=files | {"data.tokenizer": tokenizer},
    )


def _tokenizer_digests(info: TokenizerInfo) -> FileDigests:
    return file_digests(info.files(), key="data.tokenizer", root=None)


def _same_text(valid: Source, train: Source) -> CorpusError:
    return CorpusError(
        f"data.valid: expected text that is not trained on, got {valid.path!r}, which has the "
        f"content of {train.path!r} in data.train. Hold other text out, or set data.valid=[]."
    )


def _check(prep: Preparation) -> None:
    """Do the quick checks, and open the hub datasets, which cannot be checked otherwise."""
    for source in _all(prep):
        check(source, columns=prep.columns)
    _open_hub(prep, [source for source in _all(prep) if source.kind == "hub"])


def _open_hub(prep: Preparation, sources: Iterable[Source]) -> None:
    for source in sources:
        prep.progress(f"fetch {source.path}", 0, 1)
        dataset = open_dataset(source)
        save_hub_digest(source, getattr(dataset, "_fingerprint", ""), prep.root)
        prep.progress(f"fetch {source.path}", 1, 1)


def _silent(phase: str, done: int, total: int) -> None:
    """Show nothing."""
