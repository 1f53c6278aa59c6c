"""The machine's ceiling: FLOP/s of a bare matrix product of the model's own shape."""

from __future__ import annotations

import time
from math import ceil

import torch
from torch import Tensor

from fedpipe.commands.throughput.utilisation import Product
from fedpipe.distributed.device import synchronize

MEASURE_S = 0.2
"""How long a product is repeated: long beside the clock and a scheduler's time slice."""


def operands(product: Product, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return matrices to multiply, (tokens, D) and (D, F), of the type that training computes in.

    Args:
        product: Their sizes and type.
        device: Where they lie.
    """
    dtype = getattr(torch, product.dtype)
    left = torch.randn(product.rows, product.inner, device=device)
    right = torch.randn(product.inner, product.columns, device=device)
    return left.to(dtype), right.to(dtype)


def matmul_flops_per_s(matrices: tuple[Tensor, Tensor]) -> float:
    """Multiply two matrices for about ``MEASURE_S``; ``2 m n k / s``.

    Args:
        matrices: As from ``operands``.

    Returns:
        FLOP/s of this process.
    """
    left, right = matrices
    result = torch.mm(left, right)  # allocates, and wakes the threads
    once_s = _seconds(left, right, result, times=1)
    times = max(1, ceil(MEASURE_S / max(once_s, 1e-6)))
    seconds = _seconds(left, right, result, times=times)
    return times * 2 * left.shape[0] * left.shape[1] * right.shape[1] / seconds


def _seconds(left: Tensor, right: Tensor, result: Tensor, *, times: int) -> float:
    synchronize(left.device)
    started = time.perf_counter()
    for _ in range(times):
        torch.mm(left, right, out=result)
    synchronize(left.device)
    return time.perf_counter() - started
