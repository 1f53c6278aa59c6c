"""The optimizer of one stage: parameter groups, learning rate over all rounds, clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fedpipe.config.schema import OptimizerConfig
from fedpipe.models.split import AUX_HEADS, part_of
from fedpipe.models.stage import StageModule, trainable
from fedpipe.pipeline.muon import Muon

_AUX_LAYER = re.compile(rf"{AUX_HEADS}\.\d+\.layer\.")


def build_optimizer(stage: StageModule, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a stage; see ``make_optimizer``.

    With ``muon`` it is Muon for the matrices of encoder layers, an auxiliary one among them, and
    AdamW for everything else. A stage without layers has AdamW alone.
    """
    parameters = trainable(stage)
    if config.name != "muon":
        return make_optimizer(parameters.values(), config)
    matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and _in_layer(n, stage)}
    others = make_optimizer(
        [p for name, p in parameters.items() if name not in matrices],
        replace(config, name="adamw"),
    )
    if not matrices:
        return others
    return Muon(
        matrices.values(),
        cast(torch.optim.AdamW, others),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.muon.momentum,
        num_iterations=config.muon.num_iterations,
    )


def _in_layer(name: str, stage: StageModule) -> bool:
    """Whether a parameter is one of an encoder layer."""
    of_layers = part_of(name, stage.spec) in ("client_layers", "server_layers")
    return of_layers or bool(_AUX_LAYER.match(name))


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Build a fused Adam, AdamW or SGD without weight decay on biases and norms.

    These are torch's own optimizers: DeepSpeed's Adam is compiled at first use, which takes minutes
    and needs a compiler. Source of the parameter groups: Devlin et al. 2019.

    Args:
        parameters: Trained parameters. Vectors are biases or weights of norms, in every family.
        config: Kind and settings of the optimizer; not muon.
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
    """Return the learning rate of a step, counted over all rounds, in [0, total_steps).

    Linear warm-up over ``warmup_ratio`` of the steps, then
    ``end_lr + (lr - end_lr) * (1 - progress) ** power`` with power 1 for ``linear`` and ``wsd``.
    The progress of ``wsd`` begins with the last ``decay_ratio`` of the steps; see Hu et al. 2024,
    section 4, https://arxiv.org/abs/2404.06395.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.decay == "constant":
        return config.lr
    power = config.power if config.decay == "polynomial" else 1.0
    start = warmup
    if config.decay == "wsd":
        start = max(warmup, total_steps - math.ceil(config.decay_ratio * total_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    return config.end_lr + (config.lr - config.end_lr) * (1.0 - progress) ** power


def clip_(stage: nn.Module, *, max_norm: float) -> Tensor:
    """Clip the gradients of a stage by its own norm, in place.

    Args:
        stage: A stage whose gradients are already averaged over the client's data-parallel ranks.
        max_norm: The largest norm; 0 means no clipping.

    Returns:
        The L2 norm before clipping, a scalar on the stage's device.
    """
    limit = max_norm if max_norm > 0 else math.inf
    return nn.utils.clip_grad_norm_(trainable(stage).values(), limit, foreach=True)
