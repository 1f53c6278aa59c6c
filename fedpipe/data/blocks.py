"""Prepared text on disk: the manifest, one file of packed blocks per client, and their reader."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.errors import CorpusError

MANIFEST = "manifest.json"
TOKEN_COUNTS = "token_counts.npy"

# Makes the random streams of the block order differ from other streams of the same seed.
_STREAM = 0x626C6B73


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The packed blocks of one client, a raw little-endian file of shape (num_blocks, T)."""

    client_id: int
    """The client that owns the blocks."""
    path: str
    """The file; relative in the manifest, absolute once loaded."""
    num_blocks: int
    """Blocks in the file; 0 only for a client without held-out text."""
    num_left_out: int
    """Blocks that were left out because they have fewer ordinary tokens than are masked."""
    num_documents: int
    """Packed documents, empty ones not counted."""
    num_tokens: int
    """Tokens of text and separators, including the last partial block, which is dropped."""
    sequence_length: int
    """T, including the two special tokens."""
    dtype: str
    """``<u2`` or ``<u4``."""
    values: tuple[str, ...]
    """Values of the partition column that the client holds; empty without such a column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """Tokenised, partitioned and packed text, complete in one directory."""

    directory: str
    """Directory of all files; its name is the cache key."""
    train: tuple[Shard, ...]
    """Training text: one shard per client, in order of ``client_id``."""
    valid: tuple[Shard, ...]
    """Held-out text, likewise; empty without validation. Several shards may share one file."""
    vocab_size: int
    """Rows that the word embedding needs."""
    cls_id: int
    """Opens a block."""
    sep_id: int
    """Closes a block and separates documents."""
    mask_id: int
    """Replaces a masked token."""
    pad_id: int
    """Required by the models; never occurs in blocks."""
    special_ids: tuple[int, ...]
    """Ids of all special tokens, ascending."""
    tokenizer_dir: str
    """A copy of the tokenizer folder, inside ``directory``."""
    sequence_length: int
    """T."""
    num_ignored_documents: int
    """Held-out documents whose column value does not occur in the training text."""
    num_masked: int
    """Masked tokens of a block; every block has at least as many ordinary tokens."""
    num_held_out: int
    """Held-out documents, including the ignored ones."""
    num_overlapping: int
    """Held-out documents that also occur in the training text."""


def save_manifest(prepared: PreparedData, directory: Path) -> None:
    """Write the manifest into a directory of prepared text.

    Args:
        prepared: The prepared text; its paths are relative to the directory.
        directory: The directory.
    """
    content = dataclasses.asdict(prepared)
    del content["directory"]
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_prepared(directory: str) -> PreparedData:
    """Read the manifest of prepared text, but no other file.

    Args:
        directory: The directory that ``prepare`` has filled.

    Returns:
        The prepared text with absolute paths.

    Raises:
        CorpusError: The directory has no readable manifest.
    """
    folder = Path(directory).absolute()
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for split in ("train", "valid"):
            content[split] = tuple(_load_shard(entry, folder) for entry in content[split])
        content["special_ids"] = tuple(content["special_ids"])
        content["tokenizer_dir"] = str(folder / content["tokenizer_dir"])
        return PreparedData(directory=str(folder), **content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"data.cache_dir: expected prepared text in {directory!r}, got no readable {MANIFEST}. "
            "Delete that folder and start again."
        ) from error


def is_complete(prepared: PreparedData) -> bool:
    """Tell whether every file that the manifest names exists and has its full size."""
    for shard in (*prepared.train, *prepared.valid):
        size = shard.num_blocks * shard.sequence_length * np.dtype(shard.dtype).itemsize
        path = Path(shard.path)
        if not path.is_file() or path.stat().st_size != size:
            return False
    counts = Path(prepared.directory, TOKEN_COUNTS)
    return counts.is_file() and Path(prepared.tokenizer_dir, "tokenizer.json").is_file()


def token_counts(prepared: PreparedData) -> NDArray[np.int64]:
    """Return the number of occurrences of every token in all clients' training text.

    Args:
        prepared: The prepared text.

    Returns:
        (V,) counts, 0 for special tokens: the unigram model that a trained model has to beat.
    """
    counts: NDArray[np.int64] = np.load(Path(prepared.directory, TOKEN_COUNTS), allow_pickle=False)
    return counts


class BlockReader:
    """An endless stream of one client's blocks, in a new seeded order each epoch.

    The block at a position depends on the seed, the client and the position alone, so a resumed run
    continues by position, and data-parallel ranks read disjoint positions. The file is
    memory-mapped at the first read. The order of one epoch is kept in memory, 4 bytes per block.
    """

    def __init__(self, shard: Shard, *, seed: int) -> None:
        """Create the reader without opening the file.

        Args:
            shard: The client's blocks.
            seed: The run's seed.
        """
        self._shard = shard
        self._seed = seed % 2**64
        self._blocks: NDArray[Any] | None = None
        self._epoch = -1
        self._order: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)

    def batch(self, start: int, count: int) -> NDArray[np.int64]:
        """Read blocks number ``start`` to ``start + count - 1`` of the stream.

        Args:
            start: Position of the first block, 0 or more.
            count: Number of blocks; they may belong to several epochs.

        Returns:
            (count, T) token ids.
        """
        blocks = self._open()
        result = np.empty((count, self._shard.sequence_length), dtype=np.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(start + done, self._shard.num_blocks)
            chosen = self._epoch_order(epoch)[offset : offset + count - done]
            result[done : done + len(chosen)] = blocks[chosen]
            done += len(chosen)
        return result

    def close(self) -> None:
        """Close the file; a later ``batch`` opens it again."""
        self._blocks = None

    def _open(self) -> NDArray[Any]:
        if self._blocks is None:
            shape = (self._shard.num_blocks, self._shard.sequence_length)
            try:
                self._blocks = np.memmap(self._shard.path, self._shard.dtype, mode="r", shape=shape)
            except (OSError, ValueError) as error:
                raise CorpusError(
                    f"data.cache_dir: expected {shape[0]} blocks in {self._shard.path!r}, got an "
                    f"unreadable file ({error}). Delete its folder and start again."
                ) from error
        return self._blocks

    def _epoch_order(self, epoch: int) -> NDArray[np.uint32]:
        if epoch != self._epoch:
            entropy = [_STREAM, self._seed, self._shard.client_id, epoch]
            order = np.arange(self._shard.num_blocks, dtype=np.uint32)
            np.random.default_rng(np.random.SeedSequence(entropy)).shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order


def _load_shard(entry: dict[str, Any], folder: Path) -> Shard:
    return Shard(**{**entry, "path": str(folder / entry["path"]), "values": tuple(entry["values"])})
