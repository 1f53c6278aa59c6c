"""Muon: momentum whose matrices are made orthogonal, with AdamW for all other parameters."""

# N = matrices of one shape, R = their shorter side, C = their longer side

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of ``a X + b (X X^T) X + c (X X^T)^2 X``. They raise small singular values fastest and leave all
of them near 1, between about 0.7 and 1.2 (Jordan et al. 2024)."""
MATCHED_RMS = 0.2
"""Root mean square of an update, as AdamW's usually is (Liu et al. 2025, section 2.2)."""
_EPS = 1e-7
"""Smallest norm that a matrix is divided by, so that a zero stays one."""


class Muon(torch.optim.Optimizer):
    """Muon for the given matrices, and AdamW for the parameters that it is given with them.

    A matrix W (R, C) with gradient G has a momentum ``B <- m B + (1 - m) G``, and is updated by
    ``W <- (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(R, C)) * orthogonal((1 - m) G + m B)``. The
    factor gives an update the root mean square of AdamW's, so ``lr`` and ``weight_decay`` hold for
    both kinds of parameters.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the factor: Liu et al.
    2025, https://arxiv.org/abs/2502.16982, section 2.2. The same as ``torch.optim.Muon`` with
    ``adjust_lr_fn="match_rms_adamw"``, for many matrices at a time.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: torch.optim.AdamW,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        num_iterations: int,
    ) -> None:
        """Begin without momentum.

        Args:
            matrices: (R, C) each, float32.
            others: The optimizer of all other parameters. Its groups become groups of this one.
            lr: Learning rate.
            weight_decay: Decoupled weight decay of the matrices.
            momentum: m.
            num_iterations: Newton-Schulz iterations of an update.
        """
        own = {"params": list(matrices), "momentum": momentum, "num_iterations": num_iterations}
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__([own, *others.param_groups], defaults)
        self._others = others

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update all parameters that have a gradient."""
        assert closure is None, "gradients are computed before the step"
        # Loading a state replaces groups and state by new ones.
        self._others.state = self.state
        self._others.param_groups = [g for g in self.param_groups if "momentum" not in g]
        self._others.step()
        for group in self.param_groups:
            if "momentum" in group:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        trained = [p for p in group["params"] if p.grad is not None]
        for parameter in trained:
            if parameter not in self.state:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = group["momentum"]
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in trained:
            rows, columns = sorted(parameter.shape)
            by_shape[rows, columns].append(parameter)
        for (_, longer), parameters in by_shape.items():
            gradients = [p.grad for p in parameters]
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            ahead = torch._foreach_lerp(gradients, buffers, momentum)
            updates = orthogonal(ahead, num_iterations=group["num_iterations"])
            step_size = group["lr"] * MATCHED_RMS * math.sqrt(longer)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-step_size)


def orthogonal(matrices: Sequence[Tensor], *, num_iterations: int) -> list[Tensor]:
    """Return, for every matrix ``U S V^T``, about ``U V^T``, by Newton-Schulz iterations.

    The matrices are multiplied together, ``torch.bmm``: on a GPU small ones would otherwise be
    bound by the launches of their kernels. On a CPU it makes no difference. The iterations are in
    bfloat16 on a GPU and in float32 on a CPU, whose bfloat16 products may take 20 times as long.
    Source of both: benchmarks/muon.md.

    Args:
        matrices: Of one shape, (R, C) or, transposed, (C, R); the shorter side is multiplied.
        num_iterations: Iterations; 5 are usual.

    Returns:
        Matrices of the shapes and dtype that came in.
    """
    a, b, c = COEFFICIENTS
    tall = [m.shape[0] > m.shape[1] for m in matrices]
    x_NRC = torch.stack([m.mT if t else m for m, t in zip(matrices, tall, strict=True)])
    if x_NRC.is_cuda:
        x_NRC = x_NRC.bfloat16()
    x_NRC.div_(x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS))
    for _ in range(num_iterations):
        gram_NRR = x_NRC @ x_NRC.mT
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    x_NRC = x_NRC.to(matrices[0].dtype)
    return [x.mT if t else x for x, t in zip(x_NRC, tall, strict=True)]
