"""Choose the tokens of a block that the model must predict, and mask them."""

# B = blocks, T = tokens per block, M = masked tokens per block, V = vocabulary

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import BlockReader, PreparedData
from fedpipe.errors import CorpusError

MASKED_SHARE = 0.8
"""Share of the chosen tokens that become the mask token (Devlin et al. 2019, section 3.1)."""
RANDOM_SHARE = 0.1
"""Share of the chosen tokens that become a random token; the rest stays (Devlin et al. 2019)."""

IGNORED = -100
"""Label of a position without a prediction, the default ``ignore_index`` of torch."""

# Makes the random streams of masks differ from other streams of the same seed.
_STREAM = 0x6D61736B
_SPLITS = {"train": 0, "valid": 1}

Split = Literal["train", "valid"]
"""Training text or held-out text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedBatch:
    """Blocks with masked tokens, and the original tokens."""

    input_ids: NDArray[np.int64]
    """(B, T), the input of the model."""
    positions: NDArray[np.int64]
    """(B, M), positions to predict, ascending."""
    labels: NDArray[np.int64]
    """(B, M), original tokens at these positions."""


class MaskedReader:
    """The endless stream of one client's blocks, masked when they are read."""

    def __init__(
        self,
        data: PreparedData,
        client_id: int,
        *,
        split: Split,
        seed: int,
        num_masked: int,
    ) -> None:
        """Open a shard.

        Args:
            data: Prepared text.
            client_id: The client whose blocks are read.
            split: Training or held-out text.
            seed: The run's seed, which gives the order of the blocks and the masks.
            num_masked: M.
        """
        shard = {"train": data.train, "valid": data.valid}[split][client_id]
        self._reader = BlockReader(shard, seed=seed)
        self._data, self._num_masked = data, num_masked
        self._rng = partial(mask_rng, seed, client_id=client_id, split=split)

    def batch(self, position: int, count: int) -> MaskedBatch:
        """Return ``count`` blocks from a position of the stream on; every call gives the same.

        Raises:
            CorpusError: See ``mask_blocks``.
        """
        data = self._data
        return mask_blocks(
            self._reader.batch(position, count),
            rng=self._rng(position=position),
            num_masked=self._num_masked,
            mask_id=data.mask_id,
            special_ids=data.special_ids,
            vocab_size=data.vocab_size,
        )


def document_starts(input_ids_BT: NDArray[np.int64], *, sep_id: int) -> NDArray[np.int32]:
    """Say where documents begin in blocks, one bit per token, the lowest bit first.

    A separator ends its document; masks never touch it. The first document of a block begins with
    the block and has no bit.

    Args:
        input_ids_BT: Blocks, masked or not.
        sep_id: The separator.

    Returns:
        (B, ceil(T / 32)).
    """
    starts = np.zeros((len(input_ids_BT), -(-input_ids_BT.shape[1] // 32) * 32), dtype=bool)
    starts[:, 1 : input_ids_BT.shape[1]] = input_ids_BT[:, :-1] == sep_id
    return np.packbits(starts, axis=1, bitorder="little").view("<i4").astype(np.int32)


def mask_rng(seed: int, *, client_id: int, position: int, split: Split) -> np.random.Generator:
    """Make the generator for the batch that starts at a position of a client's stream.

    The generator has no state from earlier batches, so a resumed run draws the same masks.

    Args:
        seed: The run's seed.
        client_id: Owner of the blocks.
        position: Number of the batch's first block in the client's endless stream.
        split: Training or held-out text; the two have separate streams.

    Returns:
        A generator that depends on the arguments only.
    """
    entropy = [_STREAM, seed % 2**64, client_id, position, _SPLITS[split]]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def mask_blocks(
    blocks_BT: NDArray[np.int64],
    *,
    rng: np.random.Generator,
    num_masked: int,
    mask_id: int,
    special_ids: tuple[int, ...],
    vocab_size: int,
) -> MaskedBatch:
    """Choose exactly M tokens of every block, uniformly among those that are not special.

    Of the chosen tokens 80 % become the mask token, 10 % a random token that is not special, and
    10 % stay. Source: BERT, Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805.
    Unlike there, M is the same for every block. Prepared text holds only blocks with at least M
    tokens that are not special.

    Args:
        blocks_BT: (B, T) token ids below ``vocab_size``; not changed.
        rng: A generator from ``mask_rng``.
        num_masked: M.
        mask_id: Id of the mask token.
        special_ids: Ids that are neither chosen nor used as a replacement.
        vocab_size: V.

    Returns:
        The inputs, the chosen positions and the original tokens.

    Raises:
        CorpusError: A block has fewer than M tokens that are not special.
    """
    special_V = np.zeros(vocab_size, dtype=bool)
    special_V[list(special_ids)] = True
    blocked_BT = special_V[blocks_BT]
    fewest = int(blocks_BT.shape[1] - blocked_BT.sum(axis=1).max(initial=0))
    if fewest < num_masked:
        raise CorpusError(
            f"data.mask_probability: expected at most {fewest} masked tokens in a block of "
            f"{blocks_BT.shape[1]} with {fewest} ordinary tokens, got {num_masked}. "
            "Lower data.mask_probability."
        )
    # The M smallest of T independent uniform keys are a uniform choice without replacement.
    keys_BT = rng.random(blocks_BT.shape, dtype=np.float32)
    keys_BT[blocked_BT] = 2.0
    positions_BM = np.argpartition(keys_BT, num_masked - 1, axis=1)[:, :num_masked]
    positions_BM = np.sort(positions_BM, axis=1)
    labels_BM = np.take_along_axis(blocks_BT, positions_BM, axis=1)

    action_BM = rng.random(labels_BM.shape)
    ordinary = np.flatnonzero(~special_V)
    random_BM = ordinary[rng.integers(len(ordinary), size=labels_BM.shape)]
    shown_BM = np.where(action_BM < MASKED_SHARE + RANDOM_SHARE, random_BM, labels_BM)
    shown_BM[action_BM < MASKED_SHARE] = mask_id
    input_ids_BT = blocks_BT.copy()
    np.put_along_axis(input_ids_BT, positions_BM, shown_BM, axis=1)
    return MaskedBatch(input_ids=input_ids_BT, positions=positions_BM, labels=labels_BM)


def pad(batch: MaskedBatch, *, length: int, pad_id: int) -> MaskedBatch:
    """Pad sequences, and make every position a target; most labels are then ``IGNORED``.

    Args:
        batch: (B, T) tokens and (B, M) labels.
        length: T' >= T.
        pad_id: Id of the padding token.

    Returns:
        (B, T') tokens, positions 0..T'-1, and labels, ``IGNORED`` at positions without one.
    """
    num_blocks, num_tokens = batch.input_ids.shape
    input_ids = np.full((num_blocks, length), pad_id)
    input_ids[:, :num_tokens] = batch.input_ids
    labels = np.full((num_blocks, length), IGNORED)
    np.put_along_axis(labels, batch.positions, batch.labels, axis=1)
    positions = np.broadcast_to(np.arange(length), labels.shape)
    return MaskedBatch(input_ids=input_ids, positions=positions, labels=labels)


def validation_batch(
    data: PreparedData, config: RunConfig, client_id: int, *, first: int, count: int
) -> MaskedBatch:
    """Return held-out blocks of a client with masks that are the same in every round.

    The share of masked tokens is that of the last round, also in rounds that train with another.

    Each block is masked from its own seed, so the masks depend neither on the batch size nor on the
    round. Blocks beyond the last one repeat earlier ones; they fill the batch and are not scored.

    Args:
        data: Prepared text.
        config: The run, in its last round, for its seed and the number of masked tokens.
        client_id: The client whose blocks are read.
        first: Index of the first block.
        count: Number of blocks.

    Returns:
        The masked blocks.
    """
    reader = MaskedReader(
        data, client_id, split="valid", seed=config.seed, num_masked=config.data.num_masked
    )
    rows = [reader.batch(first + i, 1) for i in range(count)]
    return MaskedBatch(
        input_ids=np.concatenate([row.input_ids for row in rows]),
        positions=np.concatenate([row.positions for row in rows]),
        labels=np.concatenate([row.labels for row in rows]),
    )
