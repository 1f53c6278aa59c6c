"""A cache on disk of the hidden states that the frozen lower layers compute for every example."""

# B = sequences of a batch, T = tokens of its longest one, D = hidden size

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe.data.tasks.encoding import Encoded
from fedpipe.models.lower import LowerLayers


class HiddenStateCache:
    """Hidden states of the sequences of a split; each is computed when it is first needed.

    Every sequence is computed alone, so that its values do not depend on the other sequences of a
    batch. The cache is a file of float32 without a name, which the system removes when the process
    ends. It takes disk space for computed sequences only. Every process has its own cache, because
    every process trains other clients.
    """

    def __init__(self, lower: LowerLayers, split: Encoded, folder: Path) -> None:
        """Create the file of the cache.

        Args:
            lower: The frozen lower layers.
            split: The split with the sequences.
            folder: Folder for the file, on a disk with enough space.
        """
        self._lower, self._starts = lower, split.starts
        self._known = np.zeros(split.num_sequences, dtype=bool)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - kept open
        weakref.finalize(self, self._file.close)

    def hidden(self, sequences: NDArray[np.int64], inputs: dict[str, Tensor]) -> Tensor:
        """Return the hidden states of sequences, (B, T, D) float32, with zeros at padding.

        Args:
            sequences: (B,) indices of the sequences in the split.
            inputs: Inputs of the model for these sequences, (B, T) each, padded at the end.
        """
        for row in np.flatnonzero(~self._known[sequences]):
            num_tokens = self._seek(sequences[row])
            alone = {name: t[row : row + 1, :num_tokens] for name, t in inputs.items()}
            found_TD = self._lower.run(alone)[0].float().cpu().numpy()
            self._file.write(memoryview(found_TD).cast("B"))
            self._known[sequences[row]] = True
        ids = inputs["input_ids"]
        hidden_BTD = np.zeros((*ids.shape, self._lower.hidden_size), dtype=np.float32)
        for states_TD, row in zip(hidden_BTD, sequences, strict=True):
            self._file.readinto(memoryview(states_TD[: self._seek(row)]).cast("B"))
        return torch.from_numpy(hidden_BTD).to(ids.device)

    def _seek(self, sequence: int) -> int:
        """Move to the position of a sequence in the file, and return its number of tokens."""
        first, end = map(int, self._starts[sequence : sequence + 2])
        self._file.seek(first * self._lower.hidden_size * np.dtype(np.float32).itemsize)
        return end - first
