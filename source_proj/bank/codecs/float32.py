"""Rows as they are."""

import torch
from torch import Tensor

from source_proj.bank.codecs.base import Codec, EncodedRows

__all__ = ["Float32"]


class Float32(Codec):
    """The rows themselves, without scales.

    Example:
        >>> Float32().encode(torch.tensor([[0.1]]))
        EncodedRows(codes=tensor([[0.1000]]), scale=None)
    """

    name = "float32"
    dtype = torch.float32
    array_type = "float32"
    has_scale = False

    def _encode(self, rows: Tensor, sizes: Tensor) -> EncodedRows:  # noqa: ARG002
        return EncodedRows(rows.float(), None)

    def decode(self, codes: Tensor, scale: Tensor | None, k: int) -> Tensor:  # noqa: ARG002, D102
        rows = codes.to(torch.float32, copy=True)
        return rows if scale is None else rows.mul_(scale[:, None])
