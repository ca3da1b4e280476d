"""Half precision."""

import torch
from torch import Tensor

from source_proj.bank.codecs.base import Codec, EncodedRows

__all__ = ["Float16"]


class Float16(Codec):
    """Scale = the power of two that brings max|row| into [2¹⁴, 2¹⁵), codes = row / scale in half precision.

    So small gradients lose nothing to its short exponent: an entry errs by 2⁻¹¹ of itself, or by 2⁻³⁹ of max|row|,
    whichever is more.

    Example:
        >>> codes, scale = Float16().encode(torch.tensor([[1.0, 3.0]]))
        >>> codes.tolist(), scale.tolist()
        ([[8192.0, 24576.0]], [0.0001220703125])
    """

    name = "float16"
    dtype = torch.float16
    array_type = "float16"

    def _encode(self, rows: Tensor, sizes: Tensor) -> EncodedRows:
        exponent = torch.frexp(sizes).exponent  # max|row| in [2^(e-1), 2^e)
        scale = torch.ldexp(torch.ones_like(sizes), (exponent - 15).clamp_(min=-126))
        return EncodedRows((rows / scale[:, None]).to(torch.float16), scale)

    def decode(self, codes: Tensor, scale: Tensor | None, k: int) -> Tensor:  # noqa: ARG002, D102
        rows = codes.to(torch.float32)
        return rows if scale is None else rows.mul_(scale[:, None])
