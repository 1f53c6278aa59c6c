"""The optimizer of one stage: parameter groups, learning rate across rounds, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedpipe.config.schema import OptimizerConfig
from fedpipe.models.stage import trainable


def build_optimizer(stage: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a stage; see ``make_optimizer``."""
    return make_optimizer(trainable(stage).values(), config)


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD, fused; no decay on biases and norms (Devlin et al. 2019).

    torch's own: DeepSpeed's Adam is compiled at first use, which takes minutes and a compiler.

    Args:
        parameters: What is trained. Vectors are biases or of a norm, in every family.
        config: Which one.
    """
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    fused = all(p.dtype == torch.float32 for p in trained)
    groups = [g for g in groups if g["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, fused=fused)
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
    return cls(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimizerConfig, step: int, *, total_steps: int) -> float:
    """Learning rate of a step counted across rounds, in [0, total_steps).

    Linear warm-up over ``warmup_ratio`` of the steps, then
    ``end_lr + (lr - end_lr) * (1 - progress) ** power`` with power 1 for ``linear``.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.decay == "constant":
        return config.lr
    power = config.power if config.decay == "polynomial" else 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return config.end_lr + (config.lr - config.end_lr) * (1.0 - progress) ** power


def clip_(stage: nn.Module, *, max_norm: float) -> Tensor:
    """Scale a stage's gradients down to a norm, in place; other stages are not looked at.

    Args:
        stage: Its gradients are already averaged over the client's own ranks.
        max_norm: 0 leaves the gradients as they are.

    Returns:
        The L2 norm before clipping, a scalar on the stage's device.
    """
    limit = max_norm if max_norm > 0 else math.inf
    return nn.utils.clip_grad_norm_(trainable(stage).values(), limit, foreach=True)
