"""What the codecs of a few bits share: a rotation, levels of a normal, one scale, codes packed along the row."""

from typing import ClassVar

import torch
from torch import Tensor

from source_proj.bank.codecs.base import Codec, EncodedRows
from source_proj.kernels.codes import PackedRows, encode_rows, unpack_rows
from source_proj.kernels.rotation import rotate, rotate_back
from source_proj.kernels.scoring import Strongest, score

__all__ = ["LloydMax"]

_LIMITS = torch.finfo(torch.float32)
_SMALLEST = 128 * _LIMITS.tiny  # smaller rows would have a subnormal, hence coarse, scale


class LloydMax(Codec):
    r"""Each number of the rotated row becomes the nearest of 2ᵇ levels, times one scale a row.

    With y = R x the row under a fixed random rotation (`source_proj.kernels.rotation`; so even a row with few entries
    that are not zero has numbers spread as a normal's), the code of yᵢ is the nearest to yᵢ / rms(y) of the levels with
    the least mean squared error D on a standard normal: Max, "Quantizing for minimum distortion", IRE Trans. Inf.
    Theory 6 (1960), https://doi.org/10.1109/TIT.1960.1057548; Lloyd, "Least squares quantization in PCM", ibid. 28
    (1982), https://doi.org/10.1109/TIT.1982.1056489.

    **The scale.** Let c hold the chosen levels, and let the stored row be s·c. Split an exact query, rotated, into
    q = (<q, y> / \|y\|²) y + p with p orthogonal to y. Under a random rotation the error c - (<c, y> / \|y\|²) y points
    along p and against it equally often, so that <c, p> is 0 in the mean, and

        E <q, s·c> = <q, y> · s <c, y> / \|y\|²,

    which is <q, x> if and only if **s = \|y\|² / <c, y>**. Least squares would take s = <c, y> / \|c\|², smaller by
    cos²(c, y), which is 1 - D for a normal: every score would shrink, a row's by its own factor. The price is
    length: \|s·c\|² = \|x\|² / cos². So a row errs by \|x\| √(1 / cos² - 1), about √(D / (1 - D)) of itself, and its
    square, decoded, is too large by as much; in a Gram matrix of rows that is a multiple of the identity in the mean,
    as damping is. (One rotation is drawn, for good: the error of a given row and query is fixed, as a sketch's is.)

    The rotation is worth its time: rows of a network of digits, sketched to 2,048 numbers by the sparse sketch, err by
    .010, .13 and .57 of their squares in 4, 2 and 1 bits, as normal rows do, and by .104, .41 and 1.38 without it.

    A row of zeros has scale 0, and so has one of entries below 10⁻³⁵.

    **Packing.** With ``per`` = 8 / b codes a byte, code j of a row is in byte j // per, from bit b (j % per) on; what
    the last byte has left is 0. Code i is the i-th level from below.

    Attributes:
        bits: b, a divisor of 8.
        levels: the positive half of the levels, ascending; the others are their negatives.
    """

    dtype = torch.uint8
    array_type = "uint8"
    packed = True
    bits: ClassVar[int]
    levels: ClassVar[tuple[float, ...]]

    def width(self, k: int) -> int:  # noqa: D102
        return -(-k * self.bits // 8)

    def _encode(self, rows: Tensor, sizes: Tensor) -> EncodedRows:
        power = torch.ldexp(torch.ones_like(sizes), torch.frexp(sizes).exponent - 1)  # max|row| / power in [1, 2)
        power = torch.where(sizes > _SMALLEST, power, torch.inf)
        packed = encode_rows(rotate(rows / power[:, None]), self._levels)
        along = packed.along  # of positive terms
        scale = torch.where(along > 0, packed.length**2 / along, 0.0) * torch.where(power < torch.inf, power, 0.0)
        return EncodedRows(packed.codes, scale.clamp(max=_LIMITS.max).float())

    def decode(self, codes: Tensor, scale: Tensor | None, k: int) -> Tensor:  # noqa: D102
        rows = rotate_back(unpack_rows(codes, k, self._levels))
        return rows if scale is None else rows.mul_(scale[:, None])

    def multiply(self, queries: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:  # noqa: D102
        return score(rotate(queries), PackedRows(codes, queries.shape[1], self._levels), scale)

    def search(  # noqa: D102
        self, strongest: Strongest, queries: Tensor, codes: Tensor, scale: Tensor | None, *, first: int
    ) -> None:
        strongest.add(rotate(queries), PackedRows(codes, queries.shape[1], self._levels), scale, first=first)

    @property
    def _levels(self) -> tuple[float, ...]:
        """All 2ᵇ levels, ascending."""
        return (*(-level for level in reversed(self.levels)), *self.levels)
