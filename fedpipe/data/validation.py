"""Held-out blocks of a client, masked the same way in every round."""

from __future__ import annotations

import numpy as np

from fedpipe.config.schema import RunConfig
from fedpipe.data.blocks import PreparedData
from fedpipe.data.masking import MaskedBatch, MaskedReader


def validation_batch(
    data: PreparedData, config: RunConfig, client_id: int, *, first: int, count: int
) -> MaskedBatch:
    """Held-out blocks of a client with their fixed masks.

    Each block is masked from its own seed, so the masks depend neither on the batch size nor on the
    round. Blocks beyond the last one repeat earlier ones; they fill the batch and are not scored.

    Args:
        data: Prepared text.
        config: Seed and mask settings.
        client_id: Whose.
        first: Index of the first block.
        count: Blocks.

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
