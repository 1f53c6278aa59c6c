"""Everything that a process hands to torch.distributed, and a search for secrets in it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

RUN = 4
"""Consecutive values that make a finding: four ids in a row do not come about by chance."""
_INPUTS = {
    "send": 0, "allreduce": 0, "allreduce_coalesced": 0, "reduce": 0, "broadcast": 0,
    "allgather": 1, "allgather_coalesced": 1, "_allgather_base": 1, "all_gather_single": 1,
    "allgather_into_tensor_coalesced": 1, "all_gather_single_coalesced": 1, "gather": 1,
    "scatter": 1, "reduce_scatter": 1, "_reduce_scatter_base": 1, "reduce_scatter_single": 1,
    "reduce_scatter_tensor_coalesced": 1, "reduce_scatter_single_coalesced": 1,
    "alltoall": 1, "alltoall_base": 1, "all_to_all_single": 1,
}  # fmt: skip
"""Methods of a process group that send, and the position of the tensors that they send. Every
function of torch.distributed, DeepSpeed's calls included, ends in one of them."""
_SILENT = {
    "BackendType", "CUSTOM", "GLOO", "MPI", "NCCL", "UCC", "UNDEFINED", "XCCL", "abort", "barrier",
    "bound_device_id", "boxed", "get_group_store", "group_desc", "group_name",
    "merge_remote_group", "monitored_barrier", "name", "rank", "recv", "recv_anysource",
    "set_timeout", "shutdown", "size", "split_group", "unbox", "use_pg_for_symm_mem_rendezvous",
}  # fmt: skip
"""Methods that carry no content of this process."""


@dataclass(frozen=True)
class Sent:
    """One tensor (or value of the store) that has left this process."""

    operation: str
    dtype: str
    shape: tuple[int, ...]
    payload: bytes

    def numbers(self) -> np.ndarray:
        """Its content, for an integer tensor."""
        return np.frombuffer(self.payload, self.dtype.removeprefix("torch.")).reshape(self.shape)


@dataclass
class Sniffer:
    """Records what this process sends; works until the process ends."""

    sent: list[Sent] = field(default_factory=list)

    def install(self) -> None:
        """Wrap the methods of every process group and store."""
        group = dist.ProcessGroup
        unknown = {m for m in dir(group) if not m.startswith("_")} - set(_INPUTS) - _SILENT
        assert not unknown, f"may send, and is not watched: {sorted(unknown)}"
        for name, position in _INPUTS.items():
            if hasattr(group, name):
                setattr(group, name, self._watch(name, getattr(group, name), position))
        for store in (dist.Store, dist.PrefixStore, dist.FileStore, dist.TCPStore, dist.HashStore):
            for name in ("set", "compare_set", "append", "multi_set"):
                setattr(store, name, self._watch_store(getattr(store, name)))

    def _watch(self, name: str, method: Callable[..., Any], position: int) -> Callable[..., Any]:
        def watched(group: Any, *arguments: Any, **keywords: Any) -> Any:
            receives = name == "broadcast" and arguments[1].rootRank != group.rank()
            for tensor in () if receives else _tensors(arguments[position]):
                self.sent.append(_record(name, tensor))
            return method(group, *arguments, **keywords)

        return watched

    def _watch_store(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(store: Any, *arguments: Any) -> Any:
            for argument in arguments:
                for value in argument if isinstance(argument, list) else [argument]:
                    payload = value.encode() if isinstance(value, str) else bytes(value)
                    self.sent.append(Sent("store", "bytes", (len(payload),), payload))
            return method(store, *arguments)

        return watched


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for item in value:
            yield from _tensors(item)


def _record(operation: str, tensor: torch.Tensor) -> Sent:
    plain = tensor.detach().contiguous().cpu()
    payload = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Sent(operation, str(plain.dtype), tuple(plain.shape), payload)


class Secrets:
    """Arrays of token ids that must not be found in what is sent."""

    def __init__(self, *, smallest: int) -> None:
        """Ids below ``smallest``, the special tokens, are no secret."""
        self._smallest = smallest
        self._runs: dict[tuple[int, ...], str] = {}
        self._ids = np.empty(0, np.int64)

    def add(self, name: str, values: np.ndarray) -> None:
        """Keep every run of an array, in memory order."""
        flat = values.astype(np.int64).ravel()
        for run in np.lib.stride_tricks.sliding_window_view(flat, RUN):
            if run.min() >= self._smallest:
                self._runs[tuple(run.tolist())] = name
        self._ids = np.unique(list(self._runs))

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, sent: Sent) -> set[str]:
        """Names of the arrays of which a run occurs, as int16, int32, int64 or in a pickle."""
        found = set()
        for dtype in ("<i2", "<i4", "<i8"):
            for offset in range(min(np.dtype(dtype).itemsize, len(sent.payload))):
                size = (len(sent.payload) - offset) // np.dtype(dtype).itemsize
                values = np.frombuffer(sent.payload, dtype, count=size, offset=offset)
                found |= self._find(values)
        for values in _pickled(sent.payload):
            found |= self._find(values)
        return found

    def _find(self, values: np.ndarray) -> set[str]:
        if len(values) < RUN:
            return set()
        known = np.isin(values, self._ids)
        runs = np.lib.stride_tricks.sliding_window_view(known, RUN).all(axis=1)
        starts = np.flatnonzero(runs)
        windows = (tuple(int(v) for v in values[i : i + RUN]) for i in starts)
        return {self._runs[window] for window in windows if window in self._runs}


def _pickled(payload: bytes) -> Iterator[np.ndarray]:
    """Sequences of whole numbers in a pickled object."""
    try:
        value = pickle.loads(payload)
    except Exception:  # noqa: BLE001 - most payloads are no pickle, and fail in every way
        return
    yield from _sequences(value)


def _sequences(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "iu":
            yield value.ravel().astype(np.int64)
    elif isinstance(value, (str, bytes, int, float, type(None))):
        return
    elif isinstance(value, Iterable):
        items = list(value)
        numbers = [i for i in items if isinstance(i, int) and not isinstance(i, bool)]
        yield np.array(numbers, dtype=np.int64)
        for item in items:
            yield from _sequences(item)
    elif not isinstance(value, type):
        names = [*getattr(value, "__dict__", ()), *getattr(value, "__slots__", ())]
        yield from _sequences([getattr(value, name) for name in names])
