"""Examples as token ids: sub-words, labels where words start, windows of long sentences. No torch.

A word's tag stands at its first sub-word, all other positions hold ``IGNORED``; so the labelled
positions of a sentence, read in order over its windows, are its words, and no tag is ever lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpipe.data.tasks.reading import Example
from fedpipe.data.tasks.registry import Task
from fedpipe.errors import CorpusError

IGNORED = -100
"""Label of a position that is no word's first; what torch's cross-entropy leaves out."""
_BATCH = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """The sequences of a split, one after the other in flat arrays."""

    ids: NDArray[np.int32]
    """Tokens of all sequences, special ones included."""
    types: NDArray[np.int8]
    """Segment of every token: 1 in the second text of a pair where the tokenizer says so."""
    starts: NDArray[np.int64]
    """Where each sequence begins, and the end of the last one."""
    labels: NDArray[np.float64]
    """NER: one per token. Else: one per sequence."""
    examples: NDArray[np.int32]
    """By sequence, the example that it is (a part of)."""
    num_truncated: int
    """Examples of which something was left out."""

    @property
    def num_sequences(self) -> int:
        """Sequences: examples, or windows of sentences."""
        return len(self.starts) - 1

    @property
    def num_examples(self) -> int:
        """Examples."""
        return int(self.examples[-1]) + 1

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every sequence."""
        return np.diff(self.starts)

    def save(self, path: Path) -> None:
        """Write the arrays as one file."""
        np.savez(
            path,
            ids=self.ids,
            types=self.types,
            starts=self.starts,
            labels=self.labels,
            examples=self.examples,
            num_truncated=self.num_truncated,
        )

    @classmethod
    def load(cls, path: Path) -> Encoded:
        """Read what ``save`` wrote."""
        with np.load(path) as arrays:
            return cls(
                **{name: arrays[name] for name in ("ids", "types", "starts", "labels", "examples")},
                num_truncated=int(arrays["num_truncated"]),
            )


def load_tokenizer(folder: str) -> Any:
    """Read the tokenizer of a model folder.

    Args:
        folder: Hugging Face folder.

    Returns:
        A fast tokenizer of transformers.

    Raises:
        CorpusError: There is none, or only a slow one, which does not know where words begin.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers and transformers raise many classes
        raise CorpusError(
            f"--model: expected a tokenizer in {folder}, got none that can be read "
            f"({' '.join(str(error).split())[:120]}). Save it there with save_pretrained."
        ) from error
    if not tokenizer.is_fast:
        raise CorpusError(
            f"--model: expected a tokenizer.json in {folder}, got a slow tokenizer only "
            f"({type(tokenizer).__name__}). Convert it with transformers' convert_slow_tokenizer "
            "and save it there."
        )
    if tokenizer.pad_token_id is None:
        raise CorpusError(
            f"--model: expected a tokenizer with a pad token in {folder}, got none. Name it in "
            "tokenizer_config.json."
        )
    return tokenizer


def encode(task: Task, examples: Sequence[Example], tokenizer: Any, *, max_length: int) -> Encoded:
    """Turn the examples of a split into token ids.

    A sentence whose words do not fit is split between words into windows; of texts the end is left
    out, of a pair always the longer one's.

    Args:
        task: What the labels mean.
        examples: One or more.
        tokenizer: From ``load_tokenizer``.
        max_length: Tokens per sequence at most, special ones included.

    Returns:
        The sequences in the order of the examples.
    """
    if task.kind == "ner":
        return _encode_sentences(examples, tokenizer, max_length=max_length)
    return _encode_texts(examples, tokenizer, max_length=max_length)


def collate(
    data: Encoded, sequences: NDArray[np.int64], *, pad_id: int, kind: str, length: int = 0
) -> tuple[dict[str, NDArray[np.int64]], NDArray[Any]]:
    """Pad sequences to the longest one, or to a length.

    Args:
        data: A split.
        sequences: Which of it.
        pad_id: Fills short sequences up.
        kind: Of the task; ``ner`` has labels per token, and so has ``causal-lm``: its tokens.
        length: T, at least that of the longest sequence; 0 means just that.

    Returns:
        Inputs of a transformers model (B, T), and labels: (B, T) of tags or of next tokens, else
        (B,).
    """
    starts = data.starts[sequences]
    lengths = data.starts[sequences + 1] - starts
    steps = np.arange(length or int(lengths.max()))
    inside = steps[None, :] < lengths[:, None]
    where = np.where(inside, starts[:, None] + steps[None, :], 0)
    ids = np.where(inside, data.ids[where], pad_id).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": inside.astype(np.int64)}
    types = np.where(inside, data.types[where], 0).astype(np.int64)
    if types.any():  # models without segments have no such argument
        inputs["token_type_ids"] = types
    if kind == "ner":
        return inputs, np.where(inside, data.labels[where], IGNORED).astype(np.int64)
    if kind == "causal-lm":
        return inputs, np.where(inside, ids, IGNORED)
    return inputs, data.labels[sequences]


def _encode_texts(examples: Sequence[Example], tokenizer: Any, *, max_length: int) -> Encoded:
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.int8]] = []
    num_truncated = 0
    with_types = "token_type_ids" in tokenizer.model_input_names
    for batch in _batches(examples):
        texts = [example.words[0] for example in batch]
        pairs = [example.words[1] for example in batch] if len(batch[0].words) > 1 else None
        encoded = tokenizer(texts, pairs, truncation="longest_first", max_length=max_length)
        for item in encoded.encodings:
            ids.append(np.array(item.ids, dtype=np.int32))
            types.append(np.array(item.type_ids, dtype=np.int8) * with_types)
            num_truncated += bool(item.overflowing)
    return Encoded(
        ids=np.concatenate(ids),
        types=np.concatenate(types),
        starts=np.cumsum([0, *map(len, ids)]),
        labels=np.array([example.label for example in examples], dtype=np.float64),
        examples=np.arange(len(examples), dtype=np.int32),
        num_truncated=num_truncated,
    )


def _encode_sentences(examples: Sequence[Example], tokenizer: Any, *, max_length: int) -> Encoded:
    before, after = special_tokens(tokenizer)
    room = max_length - len(before) - len(after)
    ids: list[int] = []
    labels: list[int] = []
    starts, owners, num_truncated = [0], [], 0
    for index, (example, words) in enumerate(
        zip(examples, sub_words([e.words for e in examples], tokenizer), strict=True)
    ):
        num_truncated += any(len(pieces) > room for pieces in words)
        assert isinstance(example.label, tuple)
        for first, last in windows([len(pieces) for pieces in words], room=room):
            ids += before
            labels += [IGNORED] * len(before)
            for pieces, tag in zip(words[first:last], example.label[first:last], strict=True):
                kept = pieces[:room]
                ids += kept
                labels += [tag] + [IGNORED] * (len(kept) - 1)
            ids += after
            labels += [IGNORED] * len(after)
            starts.append(len(ids))
            owners.append(index)
    return Encoded(
        ids=np.array(ids, dtype=np.int32),
        types=np.zeros(len(ids), dtype=np.int8),
        starts=np.array(starts, dtype=np.int64),
        labels=np.array(labels, dtype=np.float64),
        examples=np.array(owners, dtype=np.int32),
        num_truncated=num_truncated,
    )


def windows(sizes: Sequence[int], *, room: int) -> Iterator[tuple[int, int]]:
    """Spread the words of a sentence over as few windows as they fit into, in their order.

    Args:
        sizes: Sub-words of every word; of a word with more than ``room`` the rest is left out.
        room: Sub-words per window.

    Yields:
        First word of a window, and the first one after it.
    """
    first, used = 0, 0
    for index, size in enumerate(sizes):
        size = min(size, room)
        if used + size > room:
            yield first, index
            first, used = index, 0
        used += size
    yield first, len(sizes)


def sub_words(sentences: Sequence[Sequence[str]], tokenizer: Any) -> Iterator[list[list[int]]]:
    """Cut words into sub-words: by sentence and word, one or more ids.

    A byte-level vocabulary knows words with the space before them, as they stand in a text; a word
    of nothing but characters that a tokenizer drops becomes its unknown token.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    space = " " if _needs_space(json.loads(backend.to_str()).get("pre_tokenizer")) else ""
    unknown = tokenizer.unk_token_id
    unknown = tokenizer.pad_token_id if unknown is None else unknown
    for batch in _batches(sentences):
        spaced = [[space + word for word in words] for words in batch]
        encodings = backend.encode_batch(spaced, is_pretokenized=True, add_special_tokens=False)
        for words, encoding in zip(batch, encodings, strict=True):
            pieces: list[list[int]] = [[] for _ in words]
            for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
                if word is not None:
                    pieces[word].append(token)
            yield [found or [unknown] for found in pieces]


def _needs_space(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a byte-level tokenizer does not put a space before a word by itself."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    return any(
        part.get("type") == "ByteLevel" and not part.get("add_prefix_space") for part in parts
    )


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after a text."""
    item = tokenizer("a a").encodings[0]
    inner = [index for index, special in enumerate(item.special_tokens_mask) if not special]
    return list(item.ids[: inner[0]]), list(item.ids[inner[-1] + 1 :])


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
