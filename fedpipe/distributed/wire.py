"""Wire formats: encode the tensors of a message before sending, decode them after receiving.

Both ends of an edge hold the same ``TensorSpec``s, so a message has no header. A link between
threads encodes and decodes as a link between processes does, so both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpipe.distributed.sparse_row import LEVEL_BYTES, SparseRow

_CASTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PACKED = ("int8", "sparse")
"""Formats of bytes instead of elements."""
_INT8_MAX = 127
_CACHED_ELEMENTS = 256 * 1024
"""Elements that a CPU converts at a time: 1 MiB of float32, so that the data stays in the cache."""
_SMALLEST_ROW = 1e-30
"""A row whose largest value is below this is sent as zeros, so that its scale and the inverse of
the scale are normal floats."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a message: the shape and dtype that the receiver gets, and the wire format.

    ``wire`` is "" (sent as ``dtype``), "fp32", "bf16", "int8" or "sparse". int8 sends every row
    (the last dimension) as ``q = round(x / s)`` with its own float32 scale ``s = max|x| / 127``,
    all in one buffer, scales first. The receiver gets ``q s``, which differs from x by ``s / 2`` at
    most. A row of zeros arrives as zeros. A row with an inf or a nan arrives as nan. Source:
    symmetric per-vector quantisation, Dettmers et al. 2022, equation 1,
    https://arxiv.org/abs/2208.07339.

    sparse sends the largest values of every row and their positions, 2 bits a value (see
    ``SparseRow``). The receiver gets zeros at all other positions. If a row holds an inf or a nan,
    none of the values that arrive is finite.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    wire: str = ""
    density: float = 1.0
    """Share of a row that "sparse" sends."""

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        size = torch.Size(self.shape).numel()
        if self.wire == "int8":
            return size + size // self.shape[-1] * torch.float32.itemsize
        if self.wire == "sparse":
            return size // self.shape[-1] * self._row.nbytes
        return size * self._wire_dtype.itemsize

    @property
    def _wire_dtype(self) -> torch.dtype:
        return _CASTS.get(self.wire, self.dtype)

    @property
    def _row(self) -> SparseRow:
        return SparseRow(self.shape[-1], self.density)

    def empty(self, device: torch.device) -> Tensor:
        """Return a buffer to receive an encoded tensor."""
        if self.wire in _PACKED:
            return torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        return torch.empty(self.shape, dtype=self._wire_dtype, device=device)

    @torch.no_grad()
    def encode(self, tensor: Tensor) -> Tensor:
        """Return the encoded tensor, contiguous; ``tensor`` itself if the format changes nothing.

        Args:
            tensor: A tensor of ``shape``; any float unless ``wire`` is "".
        """
        if self.wire not in _PACKED:
            return tensor.to(self._wire_dtype).contiguous()
        buffer = self.empty(tensor.device)
        if self.wire == "sparse":
            for rows, encoded in self._rows(tensor, buffer):
                _sparsify(rows.float(), encoded, self._row)
            return buffer
        for part in self._parts(tensor, buffer):
            _quantise(*part)
        return buffer

    @torch.no_grad()
    def decode(self, buffer: Tensor) -> Tensor:
        """Return the tensor of an encoded one, in ``dtype``."""
        if self.wire not in _PACKED:
            return buffer.to(self.dtype)
        tensor = torch.empty(self.shape, dtype=self.dtype, device=buffer.device)
        if self.wire == "sparse":
            for rows, encoded in self._rows(tensor, buffer):
                _fill(rows, encoded, self._row)
            return tensor
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
        return self._in_steps(rows, scales, quantised)

    def _rows(self, tensor: Tensor, buffer: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Pair rows of the tensor (R, D) with their bytes in the buffer (R, B)."""
        rows = tensor.reshape(-1, self.shape[-1])
        return self._in_steps(rows, buffer.view(len(rows), self._row.nbytes))

    def _in_steps(self, rows: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Split rows, and what belongs to them, so that a CPU has them in its cache."""
        on_cpu = rows.device.type == "cpu"
        step = max(1, _CACHED_ELEMENTS // self.shape[-1]) if on_cpu else max(1, len(rows))
        return zip(*(part.split(step) for part in (rows, *others)), strict=True)


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


def _sparsify(rows: Tensor, encoded: Tensor, row: SparseRow) -> None:
    """Fill ``encoded`` (R, B) with the encoding of some rows (R, D), float32."""
    top = rows.abs().topk(row.num_sent, dim=-1, sorted=False).indices
    positions = top.sort(dim=-1).values
    values = rows.gather(-1, positions)
    magnitudes = values.abs()
    is_large = magnitudes > magnitudes.mean(-1, keepdim=True)
    levels = [
        (magnitudes * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)
        for chosen in (is_large.logical_not(), is_large)
    ]
    encoded[:, :LEVEL_BYTES] = torch.stack(levels, dim=-1).bfloat16().view(torch.uint8)
    order = torch.arange(row.num_sent, device=rows.device)
    high_bits = rows.new_zeros((len(rows), row.num_high_bits), dtype=torch.bool)
    high_bits.scatter_(1, (positions >> row.num_low_bits) + order, True)
    low_bits = positions.unsqueeze(-1) >> torch.arange(row.num_low_bits, device=rows.device) & 1
    bits = torch.cat([high_bits, low_bits.bool().flatten(1), values < 0, is_large], dim=1)
    encoded[:, LEVEL_BYTES:] = _packed(bits)


def _fill(rows: Tensor, encoded: Tensor, row: SparseRow) -> None:
    """Fill ``rows`` (R, D) with what is in their encoding (R, B)."""
    bits = _unpacked(encoded[:, LEVEL_BYTES:])[:, : row.num_bits]
    num_sent, num_low_bits = row.num_sent, row.num_low_bits
    sizes = [row.num_high_bits, num_sent * num_low_bits, num_sent, num_sent]
    high_bits, low_bits, is_negative, is_large = bits.split(sizes, dim=1)
    order = torch.arange(num_sent, device=rows.device)
    high = high_bits.nonzero()[:, 1].view(len(rows), num_sent) - order
    weights = 1 << torch.arange(num_low_bits, device=rows.device)
    low = (low_bits.view(len(rows), num_sent, num_low_bits) * weights).sum(-1)
    levels = encoded[:, :LEVEL_BYTES].clone(memory_format=torch.contiguous_format)
    levels = levels.view(torch.bfloat16).to(rows.dtype)
    magnitudes = torch.where(is_large.bool(), levels[:, 1:], levels[:, :1])
    values = torch.where(is_negative.bool(), -magnitudes, magnitudes)
    rows.zero_().scatter_(1, (high << num_low_bits) + low, values)


def _packed(bits: Tensor) -> Tensor:
    """Return bits (R, N) as bytes (R, ceil(N / 8)), the first bit lowest."""
    whole = nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (whole.view(len(bits), -1, 8) * weights).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """Return the bits of bytes (R, B), (R, 8 B) zeros and ones."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(1)
