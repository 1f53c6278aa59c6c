"""Documents to token blocks on disk: tokenised in parallel, packed per client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.data.partition import IGNORED
from fedpipe.data.reading import Document
from fedpipe.data.tokenizer import TokenizerInfo
from fedpipe.errors import CorpusError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A batch of documents costs the tokenizer about 40 bytes of memory per byte of text; this much text
# per thread keeps all threads busy at about 20 MB each.
_BATCH_CHARACTERS_PER_THREAD = 512 << 10


class ClientStream:
    """One client's tokens on their way into blocks (RoBERTa's FULL-SENTENCES).

    Documents follow each other with one separator between them and are cut every T - 2 tokens:
    ``[cls] + (T - 2 tokens) + [sep]``. Source: RoBERTa, Liu et al. 2019, section 4.2,
    https://arxiv.org/abs/1907.11692. A block in which too little can be masked, for example one of
    words that the vocabulary does not know, is left out.
    """

    def __init__(
        self, path: Path, *, tokenizer: TokenizerInfo, sequence_length: int, num_masked: int
    ) -> None:
        """Start an empty stream.

        Args:
            path: File that blocks are appended to; made here.
            tokenizer: Special tokens and size of the vocabulary.
            sequence_length: T.
            num_masked: Tokens that are not special which a block must have.
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
        self._pending: list[NDArray[Any]] = []

    def add(self, ids: NDArray[Any]) -> None:
        """Append a document's tokens, without special ones; an empty document leaves no trace."""
        if len(ids) == 0:
            return
        if self.num_documents:
            self._pending.append(np.array([self._sep_id], dtype=self.dtype))
            self.num_tokens += 1
        self._pending.append(ids.astype(self.dtype))
        self.num_tokens += len(ids)
        self.num_documents += 1

    def flush(self) -> None:
        """Append all whole blocks to the file; keep what is left over in memory."""
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
        # Opened per flush: there may be more clients than a process may have open files.
        with open(self.path, "ab") as file:
            file.write(kept.tobytes())
        self.num_blocks += len(kept)
        self.num_left_out += count - len(kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """What packing a split gave."""

    streams: tuple[ClientStream, ...]
    """One per client, flushed."""
    token_counts: NDArray[np.int64]
    """(V,) occurrences of every token; special tokens count as 0."""


def block_dtype(vocab_size: int) -> str:
    """Choose the narrowest type that holds every id."""
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
    """Tokenise documents and append each to its client's file.

    Args:
        documents: In corpus order, which is also the order inside a client.
        clients: (documents,) owner of each, or ``IGNORED``.
        paths: One file per client; created here.
        tokenizer: The vocabulary.
        sequence_length: T.
        num_masked: Blocks with fewer ordinary tokens are left out.
        num_threads: Tokeniser threads.
        progress: Called with the number of documents done.

    Returns:
        The streams and the token counts.

    Raises:
        CorpusError: There are more or fewer documents than owners: the text changed meanwhile.
    """
    streams = tuple(
        ClientStream(
            path, tokenizer=tokenizer, sequence_length=sequence_length, num_masked=num_masked
        )
        for path in paths
    )
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    done = 0
    with _tokenizer_threads(num_threads):
        encoder = _load_encoder(tokenizer)
        for texts in _batches(documents, _BATCH_CHARACTERS_PER_THREAD * num_threads):
            owners = clients[done : done + len(texts)]
            done += len(texts)
            if len(owners) < len(texts):
                break
            kept = [index for index in range(len(texts)) if owners[index] != IGNORED]
            encodings = encoder.encode_batch_fast(
                [texts[index] for index in kept], add_special_tokens=False
            )
            for index, encoding in zip(kept, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.uint32)
                streams[owners[index]].add(ids)
                counts += np.bincount(ids, minlength=len(counts))
            for owner in set(owners[kept].tolist()):
                streams[owner].flush()
            progress(done)
    if done != len(clients):
        raise CorpusError(
            f"data: expected {len(clients)} documents as in the first reading, got {done}. "
            "Start again, and leave the files alone meanwhile."
        )
    counts[list(tokenizer.special_ids)] = 0
    return Packed(streams=streams, token_counts=counts)


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
    # Folders of fine-tuned models carry these settings; blocks need every token and no padding.
    encoder.no_truncation()
    encoder.no_padding()
    # Text that spells "</s>" is text.
    encoder.encode_special_tokens = True
    return encoder


def _batches(documents: Iterable[Document], characters: int) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text, _ in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _tokenizer_threads(num_threads: int) -> Iterator[None]:
    """Tell the Rust tokenizers how many threads to use, and put the environment back."""
    wanted = {
        "TOKENIZERS_PARALLELISM": "true" if num_threads > 1 else "false",
        "RAYON_NUM_THREADS": str(num_threads),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
