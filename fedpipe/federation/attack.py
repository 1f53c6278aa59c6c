"""False updates, to study the rules that withstand them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpipe.config.federation import AttackConfig


def falsify(change_N: Tensor, attack: AttackConfig, *, seed: int) -> Tensor:
    """Return what an attacker sends instead of its change of the global weights.

    sign_flip: ``-scale change``. noise: ``change + scale std(change) z``, z standard normal.

    Args:
        change_N: float32.
        attack: Kind, not "none", and scale.
        seed: Of z, which is drawn on the CPU and so is the same on every device.
    """
    if attack.kind == "sign_flip":
        return change_N * -attack.scale
    noise_N = torch.randn(change_N.shape, generator=torch.Generator().manual_seed(seed))
    return change_N + noise_N.to(change_N.device) * (attack.scale * change_N.std())
