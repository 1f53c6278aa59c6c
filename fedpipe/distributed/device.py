"""The device of a process, and what it does apart from the host. Everything of CUDA is here.

A GPU works through queues (streams) that the host fills; whoever waits for a number on it leaves it
idle meanwhile. On a CPU all of this is done when the call returns.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Tensor

from fedpipe.config.evaluation import Precision

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""The most that glibc takes: DEFAULT_MMAP_THRESHOLD_MAX."""


def own_device(local_rank: int = 0) -> torch.device:
    """Return the device of a process, made torch's current one; on a CPU it keeps freed memory.

    Args:
        local_rank: Of the process on its node; each takes its own GPU.

    Returns:
        The CPU where there is no GPU, or where ``DS_ACCELERATOR`` says so.
    """
    # A receive waits in a queue of the GPU for another GPU. With the driver's 8 queues other
    # streams come to stand behind it, the one that it waits for among them; 32 is the most.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Let a step reuse the memory of the last one, unless ``MALLOC_*`` says how malloc is to work.

    A step frees all its activations. glibc returns them to the kernel, which clears every page
    again that the next step touches: a sixth of the quick start's time. A process keeps what it
    needed at its peak, as on a GPU.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


def device_name(device: torch.device) -> str:
    """Return the GPU's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def identity(device: torch.device) -> str:
    """Name a GPU, the same for every process that uses it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def finish(device: torch.device) -> None:
    """Wait until all that this thread has queued is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device, without waiting for what is queued there."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # from other memory the host waits


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context of a model's forward pass.

    DeepSpeed opens one around its own forward pass alone; a stage's head comes after that.

    Args:
        device: Where it computes.
        precision: auto is bf16 on a GPU, fp32 on a CPU. Weights are float32 with each.
    """
    half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


class Readout:
    """Scalars on their way from the device; what is queued after them is not waited for."""

    def __init__(self, *scalars: Tensor) -> None:
        """Start to copy them.

        Args:
            *scalars: 0-dimensional, on one device.
        """
        numbers = torch.stack([scalar.detach().double() for scalar in scalars])
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._copied = _mark(numbers)

    def read(self) -> list[float]:
        """Return them once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


class Handover:
    """Tensors that one thread has written on its stream, for another thread to read on its own."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        """Take them from the thread that wrote them, on one device."""
        self._tensors = tensors
        self._written = _mark(tensors[0])

    def take(self) -> tuple[Tensor, ...]:
        """Return them; what this thread queues from now on sees them written."""
        if self._written is not None:
            stream = torch.cuda.current_stream(self._tensors[0].device)
            stream.wait_event(self._written)
            for tensor in self._tensors:  # their memory is not to be used anew before
                tensor.record_stream(stream)
        return self._tensors


class OwnStream:
    """A stream for a thread, so that the threads of a process fill one GPU together."""

    def __init__(self, device: torch.device) -> None:
        """Make one; it keeps the memory that its tensors have had."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Queue this thread's work on it: after what was queued before, before what comes after."""
        if self._stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)


class Draws:
    """What a thread draws from torch's generators: the same whatever other threads draw.

    torch has one generator per process and device, and dropout takes no other. So a thread that
    shares its process with others puts its own state there while it draws.
    """

    def __init__(self, device: torch.device, *, shared: bool) -> None:
        """Start where the generators are.

        Args:
            device: Where it draws, beside the CPU.
            shared: Other threads draw, too.
        """
        self._device, self._shared = device, shared
        self._own = rng_state(device)

    def seed(self, seed: int) -> None:
        """Start anew."""
        with self.under_way():
            torch.manual_seed(seed)

    @property
    def state(self) -> dict[str, Tensor]:
        """Where it goes on."""
        return self._own if self._shared else rng_state(self._device)

    @state.setter
    def state(self, state: dict[str, Tensor]) -> None:
        if self._shared:
            self._own = state
        else:
            set_rng_state(state, self._device)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Draw; the other threads wait until this one has done so. Scoring draws nothing."""
        if not self._shared or not torch.is_grad_enabled():
            yield
            return
        with _GENERATORS:
            set_rng_state(self._own, self._device)
            try:
                yield
            finally:
                self._own = rng_state(self._device)


_GENERATORS = threading.Lock()
"""Held by the thread whose state torch's generators have."""


def same_draws(device: torch.device) -> tuple[AbstractContextManager[None], ...]:
    """Return contexts of a computation and of its repetition, which draws the same once more.

    Args:
        device: Where it draws, beside the CPU.
    """
    return nullcontext(), _repeated(rng_state(device), device)


@contextmanager
def _repeated(state: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    # In a backward pass, where no thread draws of its own.
    with _GENERATORS:
        before = rng_state(device)
        set_rng_state(state, device)
        try:
            yield
        finally:
            set_rng_state(before, device)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on drawing where ``rng_state`` was taken."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _mark(tensor: Tensor) -> torch.cuda.Event | None:
    """Mark the point in this thread's stream up to which a tensor is written."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
