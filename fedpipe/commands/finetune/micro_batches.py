"""Micro-batches of labelled examples for a pipeline, and the messages that carry them."""

# B = sequences, T = tokens per sequence, M = targets per sequence (T of tags, else 1)

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpipe.commands.finetune.prepared import TuningData
from fedpipe.config.deepspeed import autocast_dtype, engine_config
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.config.schema import PipelineConfig
from fedpipe.data.tasks.encoding import IGNORED, Encoded, collate
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.models.split import StageSpec
from fedpipe.models.tuned_stage import TaskTargets
from fedpipe.pipeline.messages import EdgeMessages, MicroBatchShape, messages_of

if TYPE_CHECKING:  # a run is set up without deepspeed
    from fedpipe.pipeline.stage_engine import MicroBatchSource


def micro_batches(
    split: Encoded,
    steps: Sequence[NDArray[np.int64]],
    *,
    pipeline: PipelineConfig,
    task: TaskSpec,
    length: int,
) -> MicroBatchSource:
    """Return the micro-batches of local steps; incomplete ones get sequences of weight 0.

    The weights of the targets make the mean over micro-batches equal to the mean over the labels of
    the step.

    Args:
        split: The split with the sequences.
        steps: By step, the indices of its sequences, at most a batch.
        pipeline: Number and size of the micro-batches.
        task: The task.
        length: T, the number of tokens that every sequence is padded to.

    Returns:
        The source of micro-batches by step and index: tokens and their types (2, B, T) int64, and
        the targets of a ``TunedStage``.
    """
    size, num = pipeline.micro_batch_size, pipeline.num_micro_batches

    def source(step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        rows = steps[step]
        mine = rows[micro_batch * size : (micro_batch + 1) * size]
        filled = np.concatenate([mine, np.repeat(rows[:1], size - len(mine))])
        inputs, labels = collate(split, filled, pad_id=task.pad_id, kind=task.kind, length=length)
        weight = num / _num_labels(split, rows, task)
        targets = _targets(labels, inputs["attention_mask"].sum(1), task, weight=weight)
        targets[2, len(mine) :] = 0
        types = inputs.get("token_type_ids", np.zeros_like(inputs["input_ids"]))
        tokens = np.stack([inputs["input_ids"], types])
        return torch.from_numpy(tokens), torch.from_numpy(targets)

    return source


def _num_labels(split: Encoded, rows: NDArray[np.int64], task: TaskSpec) -> int:
    """Return the number of labels of some sequences, at least 1."""
    if task.kind != "ner":
        return len(rows)
    tags = (split.labels[split.starts[row] : split.starts[row + 1]] for row in rows)
    return max(1, sum(int((known != IGNORED).sum()) for known in tags))


def _targets(
    labels: NDArray[np.float64] | NDArray[np.int64],
    lengths: NDArray[np.int64],
    task: TaskSpec,
    *,
    weight: float,
) -> NDArray[np.int32]:
    """Return the planes of ``TaskTargets``, (3, B, M)."""
    labels = labels if task.kind == "ner" else labels[:, None]
    known = labels != IGNORED if task.kind == "ner" else np.ones(labels.shape, dtype=bool)
    weights = np.where(known, weight, 0).astype(np.float32)
    if task.kind == "regression":
        values = labels.astype(np.float32).view(np.int32)
    else:
        values = np.where(known, labels, 0).astype(np.int32)
    planes = TaskTargets(
        lengths=np.broadcast_to(lengths[:, None], values.shape),
        labels=values,
        weights=weights.view(np.int32),
    )
    return np.stack(planes).astype(np.int32)


def task_messages(
    config: FinetuneConfig, specs: tuple[StageSpec, ...], data: TuningData, *, hidden_size: int
) -> tuple[EdgeMessages, ...]:
    """Describe the messages of every edge; see ``messages_of``."""
    is_ner = data.task.kind == "ner"
    shape = MicroBatchShape(
        length=data.longest,
        num_targets=data.longest if is_ner else 1,
        num_rows=data.longest if is_ner else 1,
        num_planes=len(TaskTargets._fields),
        known="lengths",
        labels="labels and weights",
        rows="" if is_ner else "first tokens' ",
    )
    dtype = autocast_dtype(engine_config(config.deepspeed.config, config.stages)) or "float32"
    return messages_of(config.stages, specs, shape, hidden_size=hidden_size, dtype=dtype)
