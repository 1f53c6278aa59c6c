"""Safetensors files that are read and written tensor by tensor, however large they are. No torch.

Source of the format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header,
then the tensors one after another).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedpipe.errors import FederationError

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
"""As which numpy reads an element, by its dtype's name in a header. Numpy has no bfloat16, so the
bits of one are taken for a whole number."""
_MOST_HEADER_BYTES = 100 * 2**20

Array = NDArray[Any]
"""A tensor in memory."""


class Layout(NamedTuple):
    """What a header says of a tensor, but for its place."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize

    def __str__(self) -> str:
        """Return it as in a message."""
        return f"{self.dtype}{list(self.shape)}"


Layouts = dict[str, Layout]
"""By the tensors' names, in the order of the file."""


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file; its header is read once, its tensors one at a time."""

    path: Path

    @cached_property
    def _header(self) -> tuple[Layouts, dict[str, int]]:
        """What it holds, and where each tensor begins.

        Raises:
            FederationError: It is no safetensors file, or not all of one.
        """
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= min(size, _MOST_HEADER_BYTES) else b""
        try:
            entries = {n: e for n, e in json.loads(text).items() if n != "__metadata__"}
            layouts = {n: Layout(e["dtype"], tuple(e["shape"])) for n, e in entries.items()}
            offsets = {n: tuple(e["data_offsets"]) for n, e in entries.items()}
            end = _end(layouts, offsets)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise FederationError(
                f"{self.path}: expected a safetensors file, got one without a readable header. Copy"
                " it again."
            ) from None
        if 8 + length + end != size:
            raise FederationError(
                f"{self.path}: expected {8 + length + end:,} bytes, as its header says, got"
                f" {size:,}. Copy it again."
            )
        return layouts, {n: 8 + length + begin for n, (begin, _) in offsets.items()}

    @property
    def layouts(self) -> Layouts:
        """Dtype and shape of every tensor.

        Raises:
            FederationError: It is no safetensors file, or not all of one.
        """
        return self._header[0]

    def read(self, name: str) -> Array:
        """Read one tensor; bfloat16 as the bits of whole numbers of two bytes."""
        layout, begin = self.layouts[name], self._header[1][name]
        flat = np.fromfile(
            self.path, dtype=_DTYPES[layout.dtype], count=prod(layout.shape), offset=begin
        )
        return flat.reshape(layout.shape)


def _end(layouts: Layouts, offsets: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes of all tensors, which follow one another without a gap.

    Raises:
        ValueError: They do not.
    """
    end = 0
    for name, (begin, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        numbers = (*layouts[name].shape, begin, stop)
        if not all(type(n) is int and n >= 0 for n in numbers) or begin != end:
            raise ValueError(name)
        end = begin + layouts[name].nbytes
        if stop != end:
            raise ValueError(name)
    return end


def write_tensors(path: Path, layouts: Layouts, tensors: Iterable[Array]) -> None:
    """Write a safetensors file, tensor by tensor.

    Args:
        path: The file.
        layouts: What it holds.
        tensors: In the order of ``layouts``; each is let go before the next one is asked for.
    """
    header, end = {}, 0
    for name, layout in layouts.items():
        header[name] = {
            "dtype": layout.dtype,
            "shape": list(layout.shape),
            "data_offsets": [end, end + layout.nbytes],
        }
        end += layout.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        _write_all(file, layouts, tensors)


def _write_all(file: BinaryIO, layouts: Layouts, tensors: Iterable[Array]) -> None:
    for layout, tensor in zip(layouts.values(), tensors, strict=True):
        assert tensor.shape == layout.shape and tensor.nbytes == layout.nbytes, layout
        file.write(np.ascontiguousarray(tensor).data)
    file.flush()
    os.fsync(file.fileno())


def first_difference(expected: Mapping[str, Layout], found: Mapping[str, Layout]) -> str:
    """Say in what tensors differ from what is expected: the first one by name; "" for nothing."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"no {name}"
        if name not in expected:
            return f"a tensor {name} that it does not have"
        if found[name] != expected[name]:
            return f"{name} as {found[name]} instead of {expected[name]}"
    return ""
