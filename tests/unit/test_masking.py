import time

import numpy as np
import pytest

from fedpipe.config.schema import DataConfig
from fedpipe.data.masking import (
    IGNORED,
    MaskedBatch,
    document_starts,
    mask_blocks,
    mask_rng,
    pad,
)
from fedpipe.errors import CorpusError
from tests.helpers.tiny import tiny_config

CLS, PAD, SEP, UNK, MASK = range(5)
SPECIAL = (CLS, PAD, SEP, UNK, MASK)
VOCAB = 200


def make_blocks(count: int, length: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(1).integers(len(SPECIAL), VOCAB, size=(count, length))
    blocks[:, 0], blocks[:, -1] = CLS, SEP
    blocks[::3, length // 2] = SEP
    return blocks


def mask(blocks: np.ndarray, count: int = 10, **keys: int) -> MaskedBatch:
    place = {"seed": 0, "client_id": 0, "position": 0} | keys
    seed = place.pop("seed")
    return mask_blocks(
        blocks, rng=mask_rng(seed, **place, split="train"), num_masked=count,
        mask_id=MASK, special_ids=SPECIAL, vocab_size=VOCAB,
    )  # fmt: skip


def test_every_block_hides_exactly_m_ascending_positions_that_are_not_special():
    blocks = make_blocks(500)
    batch = mask(blocks)
    assert batch.positions.shape == batch.labels.shape == (500, 10)
    assert (np.diff(batch.positions, axis=1) > 0).all()
    assert not np.isin(batch.labels, SPECIAL).any()
    assert {a.dtype for a in (batch.input_ids, batch.positions, batch.labels)} == {np.dtype("i8")}


def test_labels_are_the_hidden_tokens_and_all_other_tokens_stay():
    blocks = make_blocks(100)
    original = blocks.copy()
    batch = mask(blocks)
    assert (blocks == original).all()
    restored = batch.input_ids.copy()
    np.put_along_axis(restored, batch.positions, batch.labels, axis=1)
    assert (restored == original).all()


def test_eighty_percent_become_the_mask_ten_a_random_token_ten_stay():
    batch = mask(make_blocks(5000))
    shown = np.take_along_axis(batch.input_ids, batch.positions, axis=1)
    # 50,000 draws: a standard deviation is below 0.2 %.
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.01)
    # A random token is the old one once in 195 draws.
    assert (shown == batch.labels).mean() == pytest.approx(0.1 + 0.1 / 195, abs=0.008)
    random = shown[(shown != MASK) & (shown != batch.labels)]
    assert not np.isin(random, SPECIAL).any()
    assert len(np.unique(random)) == VOCAB - len(SPECIAL)


def test_positions_are_uniform_over_the_maskable_ones():
    blocks = np.full((20000, 12), 50)
    blocks[:, 0], blocks[:, -1] = CLS, SEP
    batch = mask(blocks, count=2)
    counts = np.bincount(batch.positions.ravel(), minlength=12)
    assert counts[0] == counts[-1] == 0
    # 40,000 choices over 10 positions: 4000 each, standard deviation 57.
    assert abs(counts[1:-1] - 4000).max() < 300


@pytest.mark.parametrize("length", [12, 32, 45, 64])
def test_a_document_begins_behind_every_separator(length):
    blocks = np.where(np.random.default_rng(0).random((5, length)) < 0.2, SEP, 50)
    blocks[:, -1] = SEP
    words = document_starts(blocks, sep_id=SEP)
    assert words.shape == (5, -(-length // 32)) and words.dtype == np.int32
    for row, block in zip(words, blocks, strict=True):
        bits = [int(word) >> bit & 1 for word in row for bit in range(32)]
        assert bits[:length] == [0, *(int(token == SEP) for token in block[:-1])]
        assert not any(bits[length:])


def test_masks_depend_on_seed_client_and_position_and_on_nothing_else():
    blocks = make_blocks(4)
    first = mask(blocks, seed=3, client_id=1, position=8)
    again = mask(blocks, seed=3, client_id=1, position=8)
    assert (first.input_ids == again.input_ids).all()
    for other in ({"seed": 4}, {"client_id": 2}, {"position": 9}):
        place = {"seed": 3, "client_id": 1, "position": 8} | other
        assert (mask(blocks, **place).positions != first.positions).any(), other
    draws = [mask_rng(-1, client_id=0, position=0, split=s).random() for s in ("train", "valid")]
    assert draws[0] != draws[1]


def test_a_block_with_m_ordinary_tokens_has_them_all_hidden():
    blocks = np.full((1, 12), SEP)
    blocks[0, 3:7] = 50
    assert mask(blocks, count=4).positions.tolist() == [[3, 4, 5, 6]]


def test_a_block_with_fewer_ordinary_tokens_is_refused():
    blocks = make_blocks(3, length=12)
    message = r"data.mask_probability: expected at most 9 masked tokens in a block of .* got 10\."
    with pytest.raises(CorpusError, match=message):
        mask(blocks, count=10)


@pytest.mark.parametrize(
    ("length", "share", "count"), [(128, 0.15, 19), (8, 0.01, 1), (512, 0.4, 205)]
)
def test_the_count_is_the_rounded_share_and_at_least_one(length, share, count):
    data = DataConfig(sequence_length=length, mask_probability=share)
    assert (data.num_positions, data.num_masked, data.num_scored) == (length, count, count)


@pytest.mark.parametrize(
    ("rounds", "switch", "first"),
    [(10, 0.9, 9), (10, 0.3, 3), (10, 0.7, 7), (10, 0.31, 4), (12, 0.9, 11), (2, 0.01, 1)],
)
def test_the_second_share_holds_from_the_first_round_that_begins_after_the_switch(
    rounds, switch, first
):
    data = {"sequence_length": 128, "mask_probability": [0.3, 0.15], "mask_switch": switch}
    config = tiny_config(data=data, federation={"num_rounds": rounds})
    counts = [config.in_round(round_id).data.num_masked for round_id in range(rounds)]
    assert counts == [38] * first + [19] * (rounds - first)
    assert config.in_last_round.data.num_masked == 19, "and in validation"
    assert config.data.num_masked == 38, "blocks with fewer ordinary tokens are left out"


def test_padding_comes_after_the_tokens_and_every_position_but_the_masked_ones_predicts_nothing():
    plain = mask(make_blocks(3, length=12), count=4)
    padded = pad(plain, length=16, pad_id=1)
    assert padded.input_ids[:, :12].tolist() == plain.input_ids.tolist()
    assert set(padded.input_ids[:, 12:].flat) == {1}
    assert padded.positions.tolist() == [list(range(16))] * 3
    chosen = np.take_along_axis(padded.labels, plain.positions, axis=1)
    assert chosen.tolist() == plain.labels.tolist()
    assert (padded.labels == IGNORED).sum() == 3 * (16 - 4)


def test_masking_is_cheap_beside_a_training_step():
    blocks = make_blocks(64, length=512)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        mask(blocks, count=77)
        seconds.append(time.perf_counter() - start)
    # The best of ten, because other processes share the machine.
    assert min(seconds) < 0.02
