"""Measure a process: the FLOP/s of a matrix product, and the peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from fedpipe.distributed.device import synchronize

MEASURE_S = 0.2
"""Seconds for which a product is repeated, long compared to the clock and a time slice."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def operands(
    rows: int, inner: int, columns: int, *, dtype: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return random matrices to multiply, (rows, inner) and (inner, columns).

    Args:
        rows: Rows of the first matrix.
        inner: Columns of the first matrix, and rows of the second.
        columns: Columns of the second matrix.
        dtype: Name of the torch dtype.
        device: Device of the matrices.
    """
    left = torch.randn(rows, inner, device=device)
    right = torch.randn(inner, columns, device=device)
    return left.to(getattr(torch, dtype)), right.to(getattr(torch, dtype))


def matmul_flops_per_s(matrices: tuple[Tensor, Tensor]) -> float:
    """Multiply two matrices for about ``MEASURE_S``, to measure the ceiling of this process.

    Args:
        matrices: Matrices from ``operands``.

    Returns:
        FLOP/s, ``2 m n k / s``.
    """
    left, right = matrices
    result = torch.mm(left, right)  # allocates the result, and wakes the threads
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


class PeakMemory:
    """The memory of a model at its peak: its weights, its moments, and all that work adds.

    Other models of the process are not counted: ``peak - start + own weights and moments``. On a
    GPU torch counts the bytes; on a CPU the kernel does (resident set, whose peak is reset at the
    start). If the kernel does not allow the reset, the peak of the whole process is returned.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        device: torch.device,
    ) -> None:
        """Start to measure.

        Args:
            stages: Stages of the model.
            optimizers: Optimizers of the stages, after at least one step.
            device: Device of the stages.
        """
        self._device = device
        weights = [t for stage in stages for t in (*stage.parameters(), *stage.buffers())]
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        moments = [v for state in states for v in state.values() if isinstance(v, Tensor)]
        self._own = sum(t.nbytes for t in [*weights, *moments])
        self._start = self._reset()

    def _reset(self) -> int | None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return int(torch.cuda.memory_allocated(self._device))
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # freed pages that are used again would not count
        try:
            _CLEAR.write_text("5", encoding="ascii")  # proc(5): resets VmHWM
            return _resident_bytes("VmRSS")
        except OSError:
            return None

    def read(self) -> int:
        """Return the peak in bytes since the start."""
        if self._device.type == "cuda":
            peak = int(torch.cuda.max_memory_allocated(self._device))
        elif self._start is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        else:
            peak = _resident_bytes("VmHWM")
        assert self._start is not None
        return max(peak - self._start, 0) + self._own


def _resident_bytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:")) * 1024
