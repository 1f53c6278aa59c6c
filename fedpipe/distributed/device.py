"""The device of a process, its streams and its random numbers. All calls of CUDA are here.

A GPU works through queues (streams) that the host fills. A host that waits for a number from the
GPU fills no queue meanwhile, so the GPU becomes idle. On a CPU every operation is done on return.
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


def select_device(local_rank: int = 0) -> torch.device:
    """Choose the device of a process, make it torch's current one, and configure it.

    Args:
        local_rank: Index of the process on its node, which is also that of its GPU.

    Returns:
        A GPU; the CPU if there is no GPU or ``DS_ACCELERATOR`` is "cpu".
    """
    # A receive occupies a hardware queue while it waits for another GPU. With the default of 8
    # queues other streams share that queue, possibly the one that it waits for; 32 is the maximum.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") != "cpu":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, unless a ``MALLOC_*`` variable is set.

    A step frees all its activations. By default glibc returns them to the kernel, which clears
    every page that the next step touches: a sixth of the quick start's time. With this setting a
    process keeps the memory of its peak, as it does on a GPU.
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


def gpu_uuid(device: torch.device) -> str:
    """Return the UUID of a GPU, which is the same in every process that uses it."""
    return str(torch.cuda.get_device_properties(device).uuid)


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done everything that this thread has queued."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to the device, without waiting for the device's queue."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(
        device, non_blocking=True
    )  # a copy from other memory blocks the host


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context of a forward pass.

    DeepSpeed's engine opens its own around its forward pass, but a stage's head is run outside of
    that.

    Args:
        device: Device of the computation.
        precision: auto means bf16 on a GPU and fp32 on a CPU. Weights are always float32.
    """
    half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


class Readout:
    """An asynchronous copy of scalars to the host, which waits for no later operation."""

    def __init__(self, *scalars: Tensor) -> None:
        """Start the copy.

        Args:
            *scalars: 0-dimensional tensors on one device.
        """
        numbers = torch.stack([scalar.detach().double() for scalar in scalars])
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._copied = _mark(numbers)

    def read(self) -> list[float]:
        """Wait for the copy, and return the numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


class StreamMessage:
    """Tensors that one thread writes on its CUDA stream and another thread reads on its own."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        """Wrap tensors of one device; called by the thread that wrote them."""
        self._tensors = tensors
        self._written = _mark(tensors[0])

    def receive(self) -> tuple[Tensor, ...]:
        """Return the tensors; what this thread queues from now on waits until they are written."""
        if self._written is not None:
            stream = torch.cuda.current_stream(self._tensors[0].device)
            stream.wait_event(self._written)
            for tensor in self._tensors:  # the allocator must not reuse their memory before
                tensor.record_stream(stream)
        return self._tensors


class ThreadStream:
    """The CUDA stream of a thread, so that several threads can use one GPU at the same time."""

    def __init__(self, device: torch.device) -> None:
        """Create a stream; on a CPU there is none."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Queue this thread's work on the stream, in order with work before and after it."""
        if self._stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)


class ThreadRandom:
    """The random numbers of a thread, which do not depend on what other threads draw.

    torch has one generator per process and device, and dropout uses no other. So a thread that
    shares its process with others sets its own state there while it draws.
    """

    def __init__(self, device: torch.device, *, shared: bool) -> None:
        """Start with the present state of the generators.

        Args:
            device: Device whose generator is used, beside the CPU's.
            shared: Other threads of the process draw, too.
        """
        self._device, self._shared = device, shared
        self._own = rng_state(device)

    def seed(self, seed: int) -> None:
        """Seed the thread's random numbers."""
        with self.drawing():
            torch.manual_seed(seed)

    @property
    def state(self) -> dict[str, Tensor]:
        """State of the generators, for this thread."""
        return self._own if self._shared else rng_state(self._device)

    @state.setter
    def state(self, state: dict[str, Tensor]) -> None:
        if self._shared:
            self._own = state
        else:
            set_rng_state(state, self._device)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw inside the context; other threads wait. Without gradients nothing is drawn."""
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
"""Held by the thread whose state is set in torch's generators."""


def same_draws(device: torch.device) -> tuple[AbstractContextManager[None], ...]:
    """Return contexts for a computation and for its repetition, which draws the same numbers.

    Args:
        device: Device whose generator is used, beside the CPU's.
    """
    return nullcontext(), _repeated(rng_state(device), device)


@contextmanager
def _repeated(state: dict[str, Tensor], device: torch.device) -> Iterator[None]:
    # The repetition is in a backward pass, where no thread draws numbers of its own.
    with _GENERATORS:
        before = rng_state(device)
        set_rng_state(state, device)
        try:
            yield
        finally:
            set_rng_state(before, device)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators, from which dropout draws."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to a state from ``rng_state``."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _mark(tensor: Tensor) -> torch.cuda.Event | None:
    """Record an event in this thread's stream after the operations that write a tensor."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
