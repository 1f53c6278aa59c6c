"""Batches of labelled sequences and the loss of their task, for fine-tuning and evaluation."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedpipe.data.tasks.encoding import IGNORED, Encoded, collate
from fedpipe.distributed.device import to_device


def labelled_batch(
    split: Encoded, sequences: NDArray[np.int64], *, kind: str, pad_id: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return sequences as a model takes them, padded to the longest one, and their labels.

    Args:
        split: Holds them.
        sequences: Which of it (B,).
        kind: Of the task.
        pad_id: Fills short sequences up.
        device: Where the tensors are to be.

    Returns:
        Ids, types and mask, each (B, T) int64; labels (B, T) or (B,).
    """
    inputs, labels = collate(split, sequences, pad_id=pad_id, kind=kind)
    tensors = {name: to_device(torch.from_numpy(array), device) for name, array in inputs.items()}
    return tensors, to_device(torch.from_numpy(labels), device)


def task_loss(logits: Tensor, labels: Tensor, *, kind: str) -> Tensor:
    """Mean loss: squared error of numbers, else cross-entropy in nats, of texts of next tokens."""
    if kind == "regression":
        return functional.mse_loss(logits[:, 0], labels.float())
    if kind == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    return functional.cross_entropy(flat, labels.reshape(-1).long(), ignore_index=IGNORED)
