"""Peak memory of one piece of work in a process that also holds other models."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """What a model needs at its peak: its weights and moments, and what comes on top at work.

    The process' other models are subtracted: ``peak - at start + own weights and moments``. On a
    GPU torch counts; on a CPU the kernel does (resident set, its peak reset at the start). Where
    the kernel does not allow the reset, the process' peak since its start is returned.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        device: torch.device,
    ) -> None:
        """Start to watch.

        Args:
            stages: What will work.
            optimizers: Theirs; they have stepped before.
            device: Where.
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
            ctypes.CDLL(None).malloc_trim(0)  # freed pages would hide what the work takes anew
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
