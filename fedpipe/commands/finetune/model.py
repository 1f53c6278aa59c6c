"""The model of a fine-tuning: built with its head, then given its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedpipe.commands.finetune.setup import UNTRAINED, load_model_config, load_tuning_tokenizer
from fedpipe.config.finetune import FinetuneConfig
from fedpipe.data.tasks.registry import TaskSpec
from fedpipe.models.families import stable_seed
from fedpipe.models.peft import attach, load_adapter
from fedpipe.models.tuned import build_model


def build_tuned(config: FinetuneConfig, task: TaskSpec) -> Any:
    """Build the model of a run with its head, before an adapter is attached."""
    tokenizer = load_tuning_tokenizer(config)
    torch.manual_seed(stable_seed(config.seed, "head"))
    path = config.model.path
    return build_model(
        load_model_config(config, tokenizer),
        task.kind,
        num_labels=task.num_outputs,
        labels=task.labels,
        path="" if path == UNTRAINED or config.model.random_weights else path,
    )


def attach_seeded(model: Any, config: FinetuneConfig, task: TaskSpec) -> Any:
    """Attach the run's adapter with its first values."""
    torch.manual_seed(stable_seed(config.seed, "adapter"))
    split, causal = config.is_cut, task.kind == "causal-lm"
    counts = attach(model, config.method, causal=causal, split=split)
    if config.method.path:
        load_adapter(
            model, Path(config.method.path), config.method,
            kind=task.kind, labels=task.labels, split=split,
        )  # fmt: skip
    return counts
