"""Emulated devices: stages that sleep instead of computing.

More processes than cores slow each other down, so on a small machine wall time says nothing about a
schedule. Here every stage sleeps as long as its device would compute; messages, autograd, engines
and optimizers are real. Such measurements are labelled "emulated devices".
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fedpipe.families.family import gather
from fedpipe.models.stage import Stage

BACKWARD_PER_FORWARD = 2.0
"""Time of a backward pass over that of its forward pass, which has half as many multiplications."""


class _Sleep(torch.autograd.Function):
    """The identity with a delay, in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return grads[0], None, None


def emulate_(
    stage: Stage, *, layer_forward_s: float, masked_layer_forward_s: float, head_forward_s: float
) -> None:
    """Replace the computation of a stage by the time that a device would take, in place.

    Activations and gradients keep their shapes. One parameter vector of the stage stays in the
    graph, so that there is a gradient to compute and to apply.

    Args:
        stage: Its ``forward``, ``head_inputs`` and ``loss`` are replaced.
        layer_forward_s: Forward pass of one encoder layer for one micro-batch; the backward pass
            takes twice that.
        masked_layer_forward_s: The same for the model's last layer.
        head_forward_s: The same for a head.
    """
    hidden = stage.hidden_size
    anchor = next(p for p in stage.parameters() if p.shape == (hidden,))
    spec = stage.spec
    layers_s = (spec.num_layers - spec.ends_encoder) * layer_forward_s
    masked_s = spec.ends_encoder * masked_layer_forward_s

    def forward(inputs: Tensor, known_BM: Tensor | None = None) -> Tensor:
        if spec.is_first:
            inputs = torch.zeros(*inputs.shape, hidden, device=inputs.device)
        return _Sleep.apply(inputs + anchor, layers_s, BACKWARD_PER_FORWARD * layers_s)

    def head_inputs(hidden_BTD: Tensor, known_BM: Tensor) -> Tensor:
        slept = _Sleep.apply(hidden_BTD, masked_s, BACKWARD_PER_FORWARD * masked_s)
        return slept if spec.is_home_head else gather(slept, stage.scored(known_BM))

    def loss(hidden_BTD: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        mean = head_inputs(hidden_BTD, targets[0]).square().mean()
        return _Sleep.apply(mean, head_forward_s, BACKWARD_PER_FORWARD * head_forward_s)

    for name, method in (("forward", forward), ("head_inputs", head_inputs), ("loss", loss)):
        setattr(stage, name, method)
