"""Wire formats: how a tensor of a message looks on its way, and how it comes back.

Both ends of an edge hold the same ``TensorSpec``s, so a message carries no header. A link between
threads makes the same round trip as one between processes, so both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_CASTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INT8_MAX = 127
_CACHED_ELEMENTS = 256 * 1024
"""What a CPU converts at a time, 1 MiB of float32, so that its passes stay in the cache."""
_SMALLEST_ROW = 1e-30
"""A row below this is sent as zeros: its scale, and the scale's inverse, stay normal floats."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a message: what its receiver gets, and how it travels.

    ``wire`` is "" (as ``dtype``), "fp32", "bf16" or "int8". int8 sends every row (the last
    dimension) as ``q = round(x / s)`` with its own float32 scale ``s = max|x| / 127``, all in one
    buffer, scales first; the receiver gets ``q s``, at most ``s / 2`` away from x. A row of zeros
    arrives as zeros; a row with an inf or a nan arrives as nan, never as a number.
    Source: symmetric per-vector quantisation, Dettmers et al. 2022, equation 1,
    https://arxiv.org/abs/2208.07339.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    wire: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        size = torch.Size(self.shape).numel()
        if self.wire == "int8":
            return size + size // self.shape[-1] * torch.float32.itemsize
        return size * self._wire_dtype.itemsize

    @property
    def _wire_dtype(self) -> torch.dtype:
        return _CASTS.get(self.wire, self.dtype)

    def empty(self, device: torch.device) -> Tensor:
        """Return a buffer that what ``encode`` returns can be received into."""
        if self.wire == "int8":
            return torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        return torch.empty(self.shape, dtype=self._wire_dtype, device=device)

    @torch.no_grad()
    def encode(self, tensor: Tensor) -> Tensor:
        """Return what travels, contiguous; ``tensor`` itself where nothing has to change.

        Args:
            tensor: Of ``shape``, any float for "fp32", "bf16" and "int8".
        """
        if self.wire != "int8":
            return tensor.to(self._wire_dtype).contiguous()
        buffer = self.empty(tensor.device)
        for part in self._parts(tensor, buffer):
            _quantise(*part)
        return buffer

    @torch.no_grad()
    def decode(self, buffer: Tensor) -> Tensor:
        """Return the tensor, in ``dtype``, that ``encode`` made ``buffer`` from."""
        if self.wire != "int8":
            return buffer.to(self.dtype)
        tensor = torch.empty(self.shape, dtype=self.dtype, device=buffer.device)
        for rows, scales, quantised in self._parts(tensor, buffer):
            rows.copy_(quantised).mul_(scales)  # -127..127 is exact in every float
        return tensor

    def _parts(self, tensor: Tensor, buffer: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Rows of the tensor with their scales (R, 1) and int8 values (R, D) in the buffer."""
        columns = self.shape[-1]
        rows = tensor.reshape(-1, columns)
        num_scale_bytes = len(rows) * torch.float32.itemsize
        scales = buffer[:num_scale_bytes].view(torch.float32).view(-1, 1)
        quantised = buffer[num_scale_bytes:].view(torch.int8).view(-1, columns)
        on_cpu = tensor.device.type == "cpu"
        step = max(1, _CACHED_ELEMENTS // columns) if on_cpu else len(rows)
        return zip(rows.split(step), scales.split(step), quantised.split(step), strict=True)


def _quantise(rows: Tensor, scales: Tensor, quantised: Tensor) -> None:
    """Fill ``scales`` and ``quantised`` from some rows."""
    values = rows.float()
    scratch = values.abs()
    largest = scratch.amax(-1, keepdim=True)
    largest += largest * 0  # inf * 0 is nan
    largest.clamp_(min=_SMALLEST_ROW)
    torch.div(largest, _INT8_MAX, out=scales)
    torch.mul(values, _INT8_MAX / largest, out=scratch).round_()
    quantised.copy_(scratch)
