"""Wire formats: encode the tensors of a message before sending, decode them after receiving.

Both ends of an edge hold the same ``TensorSpec``s, so a message has no header. A link between
threads encodes and decodes as a link between processes does, so both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_CASTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INT8_MAX = 127
_CACHED_ELEMENTS = 256 * 1024
"""Elements that a CPU converts at a time: 1 MiB of float32, so that the data stays in the cache."""
_SMALLEST_ROW = 1e-30
"""A row whose largest value is below this is sent as zeros, so that its scale and the inverse of
the scale are normal floats."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a message: the shape and dtype that the receiver gets, and the wire format.

    ``wire`` is "" (sent as ``dtype``), "fp32", "bf16" or "int8". int8 sends every row (the last
    dimension) as ``q = round(x / s)`` with its own float32 scale ``s = max|x| / 127``, all in one
    buffer, scales first. The receiver gets ``q s``, which differs from x by ``s / 2`` at most. A
    row of zeros arrives as zeros. A row with an inf or a nan arrives as nan. Source: symmetric
    per-vector quantisation, Dettmers et al. 2022, equation 1, https://arxiv.org/abs/2208.07339.
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
        """Return a buffer to receive an encoded tensor."""
        if self.wire == "int8":
            return torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        return torch.empty(self.shape, dtype=self._wire_dtype, device=device)

    @torch.no_grad()
    def encode(self, tensor: Tensor) -> Tensor:
        """Return the encoded tensor, contiguous; ``tensor`` itself if the format changes nothing.

        Args:
            tensor: A tensor of ``shape``; any float for "fp32", "bf16" and "int8".
        """
        if self.wire != "int8":
            return tensor.to(self._wire_dtype).contiguous()
        buffer = self.empty(tensor.device)
        for part in self._parts(tensor, buffer):
            _quantise(*part)
        return buffer

    @torch.no_grad()
    def decode(self, buffer: Tensor) -> Tensor:
        """Return the tensor of an encoded one, in ``dtype``."""
        if self.wire != "int8":
            return buffer.to(self.dtype)
        tensor = torch.empty(self.shape, dtype=self.dtype, device=buffer.device)
        for rows, scales, quantised in self._parts(tensor, buffer):
            rows.copy_(quantised).mul_(scales)  # -127..127 is exact in every float
        return tensor

    def _parts(self, tensor: Tensor, buffer: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Pair rows of the tensor with their scales (R, 1) and int8 values (R, D) in the buffer."""
        columns = self.shape[-1]
        rows = tensor.reshape(-1, columns)
        num_scale_bytes = len(rows) * torch.float32.itemsize
        scales = buffer[:num_scale_bytes].view(torch.float32).view(-1, 1)
        quantised = buffer[num_scale_bytes:].view(torch.int8).view(-1, columns)
        on_cpu = tensor.device.type == "cpu"
        step = max(1, _CACHED_ELEMENTS // columns) if on_cpu else len(rows)
        return zip(rows.split(step), scales.split(step), quantised.split(step), strict=True)


def _quantise(rows: Tensor, scales: Tensor, quantised: Tensor) -> None:
    """Fill ``scales`` and ``quantised`` with the encoding of some rows."""
    values = rows.float()
    scratch = values.abs()
    largest = scratch.amax(-1, keepdim=True)
    largest += largest * 0  # inf * 0 is nan
    largest.clamp_(min=_SMALLEST_ROW)
    torch.div(largest, _INT8_MAX, out=scales)
    torch.mul(values, _INT8_MAX / largest, out=scratch).round_()
    quantised.copy_(scratch)
