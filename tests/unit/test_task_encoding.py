"""Words as sub-words: labels where words start, windows that lose nothing, pairs that are cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpipe.data.tasks.encoding import (
    IGNORED,
    Encoded,
    encode,
    load_tokenizer,
    special_tokens,
    sub_words,
    windows,
)
from fedpipe.data.tasks.reading import Example
from fedpipe.data.tasks.registry import TASKS
from fedpipe.data.tokenizer import SAMPLES
from fedpipe.errors import CorpusError
from tests.helpers.encoders import wordpiece

NER = TASKS["ncbi-disease"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(wordpiece(tmp_path_factory.mktemp("tokenizer"))))


def tags_of(encoded: Encoded) -> list[list[int]]:
    """Put the labelled positions of every sentence's windows together."""
    found: list[list[int]] = [[] for _ in range(encoded.num_examples)]
    for index, example in enumerate(encoded.examples):
        part = encoded.labels[encoded.starts[index] : encoded.starts[index + 1]]
        found[example] += [int(tag) for tag in part if tag != IGNORED]
    return found


def test_the_label_stands_on_the_first_sub_word_of_every_word(tokenizer: Any) -> None:
    encoded = encode(NER, [Example(("w1", "abc", "w2"), (0, 1, 2))], tokenizer, max_length=32)
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == [
        "[CLS]", "w1", "a", "##b", "##c", "w2", "[SEP]",
    ]  # fmt: skip
    assert encoded.labels.tolist() == [-100, 0, 1, -100, -100, 2, -100]
    assert (encoded.num_sequences, encoded.num_truncated) == (1, 0)


@pytest.mark.parametrize("seed", range(20))
def test_windows_lose_no_tag_and_no_word_at_any_length(seed: int, tokenizer: Any) -> None:
    rng = random.Random(seed)
    max_length = rng.randrange(8, 24)
    examples = []
    for _ in range(rng.randrange(1, 12)):
        # up to nine sub-words a word, some longer than a window, some that the tokenizer drops
        words = [
            rng.choice(["w1", "\u200d", "abcdefghi"[: rng.randrange(1, 10)], "x" * 30])
            for _ in range(rng.randrange(1, 40))
        ]
        examples.append(Example(tuple(words), tuple(rng.randrange(3) for _ in words)))
    encoded = encode(NER, examples, tokenizer, max_length=max_length)
    assert tags_of(encoded) == [list(example.label) for example in examples]  # type: ignore[arg-type]
    assert encoded.lengths().max() <= max_length
    starts = encoded.ids[encoded.starts[:-1]]
    assert set(starts) == {tokenizer.cls_token_id}
    long = sum(any(len(word) > max_length - 2 for word in e.words) for e in examples)
    assert encoded.num_truncated == long


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([], [(0, 0)]), ([1, 1, 1], [(0, 3)]), ([3, 2, 5, 9], [(0, 2), (2, 3), (3, 4)])],
)
def test_a_window_takes_the_words_that_fit(
    sizes: list[int], expected: list[tuple[int, int]]
) -> None:
    assert list(windows(sizes, room=5)) == expected


def test_words_have_the_space_before_them_that_a_byte_level_vocabulary_knows() -> None:
    packaged = load_tokenizer(str(SAMPLES / "tokenizer"))
    text = "Patients were treated with placebo for weeks"
    pieces = next(iter(sub_words([text.split()], packaged)))
    assert [i for word in pieces for i in word] == packaged(" " + text)["input_ids"][1:-1]
    assert special_tokens(packaged) == ([packaged.cls_token_id], [packaged.sep_token_id])


def test_of_a_pair_only_the_longer_text_is_cut(tokenizer: Any) -> None:
    pair = (" ".join(["w1"] * 20), "w2 w3")
    encoded = encode(TASKS["rte"], [Example(pair, 1), Example(("w4", "w5"), 0)], tokenizer,
                     max_length=12)  # fmt: skip
    first = encoded.ids[: encoded.starts[1]]
    assert tokenizer.convert_ids_to_tokens(first) == [
        "[CLS]", *["w1"] * 7, "[SEP]", "w2", "w3", "[SEP]",
    ]  # fmt: skip
    assert encoded.types[: encoded.starts[1]].tolist() == [0] * 9 + [1] * 3
    assert encoded.labels.tolist() == [1.0, 0.0]
    assert encoded.num_truncated == 1


def test_arrays_come_back_from_the_disk_as_they_were(tokenizer: Any, tmp_path: Path) -> None:
    encoded = encode(NER, [Example(("w1", "ab"), (0, 1))], tokenizer, max_length=32)
    encoded.save(tmp_path / "a.npz")
    again = Encoded.load(tmp_path / "a.npz")
    for name in ("ids", "types", "starts", "labels", "examples"):
        np.testing.assert_array_equal(getattr(again, name), getattr(encoded, name))


def test_a_folder_without_a_fast_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CorpusError, match=r"^--model: expected a tokenizer in .*, got none that"):
        load_tokenizer(str(tmp_path))

    class Slow:
        is_fast = False

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: Slow())
    with pytest.raises(CorpusError, match=r"expected a tokenizer.json in .* slow tokenizer only"):
        load_tokenizer(str(tmp_path))

    class Unpadded:
        is_fast, pad_token_id = True, None

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: Unpadded())
    with pytest.raises(CorpusError, match="expected a tokenizer with a pad token"):
        load_tokenizer(str(tmp_path))
