"""Tokenise documents on several threads, and pack them into blocks on disk, per client."""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.data.partition import UNASSIGNED
from fedpipe.data.reading import Document
from fedpipe.data.tokenizer import TokenizerInfo
from fedpipe.errors import CorpusError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A batch of documents costs the tokenizer about 40 bytes of memory per byte of text and 1 KB per
# document: these limits keep a batch below 10 MB and the work per batch far above its overhead.
_BATCH_CHARACTERS = 256 << 10
_BATCH_DOCUMENTS = 4096


class ClientStream:
    """Packs the tokens of one client into blocks (RoBERTa's FULL-SENTENCES).

    Documents follow each other with one separator between them and are cut every T - 2 tokens:
    ``[cls] + (T - 2 tokens) + [sep]``. Source: RoBERTa, Liu et al. 2019, section 4.2,
    https://arxiv.org/abs/1907.11692. A block with fewer ordinary tokens than are masked, for
    example one of unknown words, is left out.
    """

    def __init__(
        self, path: Path, *, tokenizer: TokenizerInfo, sequence_length: int, num_masked: int
    ) -> None:
        """Start an empty stream.

        Args:
            path: File that blocks are appended to; created here.
            tokenizer: Special tokens and size of the vocabulary.
            sequence_length: T.
            num_masked: Ordinary tokens (not special) that a block must have at least.
        """
        self.path = path
        path.touch()
        self.num_blocks = 0
        self.num_left_out = 0
        self.num_documents = 0
        self.num_tokens = 0
        self._length = sequence_length
        self._num_masked = num_masked
        self._special_ids = np.array(tokenizer.special_ids)
        self._cls_id = tokenizer.cls_id
        self._sep_id = tokenizer.sep_id
        self.dtype = block_dtype(tokenizer.vocab_size)
        self._separator = np.array([tokenizer.sep_id], dtype=self.dtype)
        self._pending: list[NDArray[Any]] = []

    def add(self, ids: NDArray[Any]) -> None:
        """Append the tokens of a document, without special ones; an empty document is skipped.

        Args:
            ids: Token ids of this stream's ``dtype``; referenced until the next flush.
        """
        if len(ids) == 0:
            return
        if self.num_documents:
            self._pending.append(self._separator)
            self.num_tokens += 1
        self._pending.append(ids)
        self.num_tokens += len(ids)
        self.num_documents += 1

    def flush(self) -> None:
        """Append all whole blocks to the file; the remaining tokens stay in memory."""
        if not self._pending:
            return
        tokens = np.concatenate(self._pending)
        body = self._length - 2
        count = len(tokens) // body
        self._pending = [tokens[count * body :]]
        if count == 0:
            return
        blocks = np.empty((count, self._length), dtype=self.dtype)
        blocks[:, 0] = self._cls_id
        blocks[:, 1:-1] = tokens[: count * body].reshape(count, body)
        blocks[:, -1] = self._sep_id
        special = np.isin(blocks, self._special_ids, kind="table").sum(axis=1)
        kept = blocks[self._length - special >= self._num_masked]
        # Opened for each flush, because a process may open fewer files than there are clients.
        with open(self.path, "ab") as file:
            file.write(kept.tobytes())
        self.num_blocks += len(kept)
        self.num_left_out += count - len(kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """The packed blocks of a split."""

    streams: tuple[ClientStream, ...]
    """One stream per client, flushed."""
    token_counts: NDArray[np.int64]
    """(V,) occurrences of every token; 0 for special tokens."""


def block_dtype(vocab_size: int) -> str:
    """Choose the narrowest dtype that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def pack(
    documents: Iterable[Document],
    clients: NDArray[np.int32],
    *,
    paths: list[Path],
    tokenizer: TokenizerInfo,
    sequence_length: int,
    num_masked: int,
    num_threads: int,
    progress: Callable[[int], None],
) -> Packed:
    """Tokenise documents and append each to the file of its client.

    Args:
        documents: Documents in corpus order, which is also the order inside a client.
        clients: (documents,) client id of each document, or ``UNASSIGNED``.
        paths: One file per client; created here.
        tokenizer: The vocabulary.
        sequence_length: T.
        num_masked: Blocks with fewer ordinary tokens are left out.
        num_threads: Tokeniser threads.
        progress: Called with the number of documents done.

    Returns:
        The streams and the token counts.

    Raises:
        CorpusError: There are more or fewer documents than ``clients``: the text has changed.
    """
    streams = tuple(
        ClientStream(
            path, tokenizer=tokenizer, sequence_length=sequence_length, num_masked=num_masked
        )
        for path in paths
    )
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    dtype = block_dtype(tokenizer.vocab_size)
    done = 0
    for batch in _encoded(documents, clients, tokenizer=tokenizer, num_threads=num_threads):
        # Once per batch, because bincount works on an array of the vocabulary's size.
        counts += np.bincount(batch.ids, minlength=len(counts))
        ids, ends = batch.ids.astype(dtype), batch.lengths.cumsum().tolist()
        for owner, start, end in zip(batch.owners, [0, *ends], ends, strict=False):
            streams[owner].add(ids[start:end])
        for owner in set(batch.owners):
            streams[owner].flush()
        done = batch.done
        progress(done)
    if done != len(clients):
        raise CorpusError(
            f"data: expected {len(clients)} documents as in the first reading, got {done}. "
            "Start again, and leave the files alone meanwhile."
        )
    counts[list(tokenizer.special_ids)] = 0
    return Packed(streams=streams, token_counts=counts)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Encoded documents."""

    ids: NDArray[np.uint32]
    """Tokens of all documents."""
    lengths: NDArray[np.int64]
    """Number of tokens of each document."""
    owners: list[int]
    """Client id of each document."""
    done: int
    """Documents read so far, unassigned ones included."""


def _encoded(
    documents: Iterable[Document],
    clients: NDArray[np.int32],
    *,
    tokenizer: TokenizerInfo,
    num_threads: int,
) -> Iterator[_Batch]:
    """Encode batches of documents on several threads, and yield them in order.

    The tokenizer releases Python's global lock while it works, so reading and packing go on at the
    same time. Ends early if there are more documents than ``clients``.
    """
    encoders = [
        _load_encoder(tokenizer) for _ in range(num_threads)
    ]  # each has its own cache of words
    under_way: deque[Future[_Batch]] = deque()
    done = 0
    with _serial_tokenizers(), ThreadPoolExecutor(num_threads) as pool:
        for number, texts in enumerate(_batches(documents)):
            owners = clients[done : done + len(texts)].tolist()
            done += len(texts)
            if len(owners) < len(texts):
                break
            kept = [pair for pair in zip(texts, owners, strict=True) if pair[1] != UNASSIGNED]
            under_way.append(pool.submit(_encode, encoders[number % num_threads], kept, done))
            if len(under_way) > num_threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    if done > len(clients):
        yield _Batch(np.empty(0, np.uint32), np.empty(0, np.int64), [], done)


def _encode(encoder: Tokenizer, pairs: list[tuple[str, int]], done: int) -> _Batch:
    ids, lengths = array("I"), array("q")
    texts = [text for text, _ in pairs]
    for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
        found = encoding.ids
        ids.extend(found)
        lengths.append(len(found))
    return _Batch(
        ids=np.array(ids, dtype=np.uint32),
        lengths=np.array(lengths, dtype=np.int64),
        owners=[owner for _, owner in pairs],
        done=done,
    )


def _load_encoder(info: TokenizerInfo) -> Tokenizer:
    from tokenizers import Tokenizer

    path = Path(info.directory, "tokenizer.json")
    try:
        encoder = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the base class itself
        first = str(error).splitlines()[0] if str(error) else "unknown format"
        raise CorpusError(
            f"data.tokenizer: expected a tokenizer in {path}, got {first!r}. "
            "Save it again with the installed version of tokenizers."
        ) from error
    # Folders of fine-tuned models set both; blocks need every token and no padding.
    encoder.no_truncation()
    encoder.no_padding()
    # Text that spells a special token, such as "</s>", is ordinary text.
    encoder.encode_special_tokens = True
    return encoder


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text, _ in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Keep the tokenizers from starting threads of their own; restore the environment."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
