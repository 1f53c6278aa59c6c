"""How many bytes a row of a sparse tensor has on the wire, and for what. Pure: no torch."""

from __future__ import annotations

from dataclasses import dataclass

SPARSE_BLOCK = 4096
"""Elements of a sparse change that are one row."""
LEVEL_BYTES = 4
"""Two bfloat16 numbers per row: the magnitude of its small values and that of its large ones."""


@dataclass(frozen=True, slots=True)
class SparseRow:
    """The format of one row of D elements, of which the k largest by magnitude are sent.

    A row has two levels of 16 bits, one for the magnitudes below their mean and one for those above
    it. A value has a sign and the choice of a level, 2 bits. Positions have ``l = floor(log2(D /
    k))`` low bits each; what is above the low bits rises from position to position, so it is a
    bitmap in which position i sets bit ``(p_i >> l) + i``, of ``k + ((D - 1) >> l)`` bits. The
    length is the same for all rows. Bytes of D = 4096, which are 16,384 in float32:

    - 1 %: k = 41, l = 6: ``4 + (41 + 63 + 41 (6 + 2)) / 8 = 58``, 282 times fewer
    - 2 %: k = 82, l = 5: ``4 + (82 + 127 + 82 (5 + 2)) / 8 = 102``, 161 times fewer
    - 3 %: k = 123, l = 5: ``4 + (123 + 127 + 123 (5 + 2)) / 8 = 143``, 115 times fewer

    Source of the positions: Elias 1974, https://doi.org/10.1145/321812.321820; of top-k with 2
    bits per value: SparseLoCo, Sarfi et al. 2025, https://arxiv.org/abs/2508.15706.
    """

    length: int
    """D."""
    density: float
    """Share of the elements that are sent, in (0, 1]; rounded to a whole number, at least one."""

    @property
    def num_sent(self) -> int:
        """Return k."""
        return max(1, round(self.density * self.length))

    @property
    def num_low_bits(self) -> int:
        """Bits of a position that are sent as they are."""
        return (self.length // self.num_sent).bit_length() - 1

    @property
    def num_high_bits(self) -> int:
        """Bits of the map of what is above them, for the whole row."""
        return self.num_sent + ((self.length - 1) >> self.num_low_bits)

    @property
    def num_bits(self) -> int:
        """Bits of a row without its levels."""
        return self.num_high_bits + self.num_sent * (self.num_low_bits + 2)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return LEVEL_BYTES + -(-self.num_bits // 8)
