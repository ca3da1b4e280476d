"""One byte a number."""

import torch
from torch import Tensor

from source_proj.bank.codecs.base import Codec, EncodedRows

__all__ = ["Int8"]

_SMALLEST = 127 * torch.finfo(torch.float32).tiny  # smaller rows would have a subnormal, hence coarse, scale


class Int8(Codec):
    """Scale = max|row| / 127 and codes ``round(row / scale)``, halves to even: an entry errs by half a scale at most.

    Symmetric: -128 is never used. A row of zeros has scale 0, and so has one of entries below 10⁻³⁵.

    Example:
        >>> codes, scale = Int8().encode(torch.tensor([[1.0, -2.0, 254.0]]))
        >>> codes.tolist(), scale.tolist()
        ([[0, -1, 127]], [2.0])
    """

    name = "int8"
    dtype = torch.int8
    array_type = "int8"
    compressible = True

    def _encode(self, rows: Tensor, sizes: Tensor) -> EncodedRows:
        scale = torch.where(sizes > _SMALLEST, sizes / 127, 0.0)
        divisor = torch.where(scale > 0, scale, torch.inf)[:, None]
        return EncodedRows((rows / divisor).round_().to(torch.int8), scale)

    def decode(self, codes: Tensor, scale: Tensor | None, k: int) -> Tensor:  # noqa: ARG002, D102
        rows = codes.to(torch.float32)
        return rows if scale is None else rows.mul_(scale[:, None])
