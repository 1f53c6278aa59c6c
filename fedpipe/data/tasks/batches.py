"""Labelled sequences as batches, the loss of their task, and what a model predicts of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedpipe.config.evaluation import Kind
from fedpipe.data.tasks.encoding import IGNORED, Encoded, collate
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.distributed.device import to_device

# B = sequences of a batch, T = tokens of its longest one, C = outputs of the head

Forward = Callable[[Encoded, NDArray[np.int64]], tuple[Tensor, Tensor]]
"""Runs a model on sequences of a split: outputs (B, C) or (B, T, C), float32, and their labels."""


def labelled_batch(
    split: Encoded, sequences: NDArray[np.int64], *, spec: TaskSpec, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return sequences as a model takes them, padded to the longest one, and their labels.

    Args:
        split: Holds them.
        sequences: Which of it (B,).
        spec: What is predicted.
        device: Where the tensors are to be.

    Returns:
        Ids, types and mask, each (B, T) int64; labels (B, T) or (B,).
    """
    inputs, labels = collate(split, sequences, pad_id=spec.pad_id, kind=spec.kind)
    tensors = {name: to_device(torch.from_numpy(array), device) for name, array in inputs.items()}
    return tensors, to_device(torch.from_numpy(labels), device)


def task_loss(logits: Tensor, labels: Tensor, *, kind: Kind) -> Tensor:
    """Mean loss: squared error of numbers, else cross-entropy in nats, of texts of next tokens."""
    if kind == "regression":
        return functional.mse_loss(logits[:, 0], labels.float())
    if kind == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1])
    return functional.cross_entropy(flat, labels.reshape(-1).long(), ignore_index=IGNORED)


@torch.inference_mode()
def predict(
    split: Encoded,
    sequences: NDArray[np.int64],
    *,
    kind: Kind,
    batch_size: int,
    forward: Forward,
) -> dict[int, Any]:
    """Predict sequences, those of like length together.

    Args:
        split: Holds them.
        sequences: Which of it.
        kind: What is predicted.
        batch_size: Sequences at a time.
        forward: Of the model, in evaluation mode.

    Returns:
        By sequence a number, a class, the tags of its words, or its summed loss and tokens.
    """
    order = sequences[np.argsort(split.lengths()[sequences], kind="stable")]
    found: dict[int, Any] = {}
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        predicted = _predictions(*forward(split, rows), kind=kind)
        found |= zip(rows.tolist(), predicted, strict=True)
    return found


def _predictions(logits: Tensor, labels: Tensor, *, kind: Kind) -> list[Any]:
    if kind == "regression":
        return list(logits[:, 0].tolist())
    if kind == "classification":
        return list(logits.argmax(-1).tolist())
    if kind == "ner":
        tags, labels = logits.argmax(-1).cpu(), labels.cpu()
        return [row[known != IGNORED].tolist() for row, known in zip(tags, labels, strict=True)]
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return list(zip(losses.sum(1).tolist(), (targets != IGNORED).sum(1).tolist(), strict=True))
