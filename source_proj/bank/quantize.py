"""Rows in fewer bytes: int8 or float16 with one scale a row."""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

__all__ = ["STORAGES", "Storage", "decode", "encode", "has_scale", "row_sizes"]

Storage = Literal["int8", "float16", "float32"]
STORAGES: tuple[str, ...] = get_args(Storage)

_SMALLEST = 127 * torch.finfo(torch.float32).tiny  # smaller rows would have a subnormal, hence coarse, scale


def has_scale(storage: str) -> bool:
    """Whether rows of this storage have a scale each."""
    return storage != "float32"


def row_sizes(rows: Tensor) -> Tensor:
    """max|row| of rows ``(n, k)``, as ``(n,)``; NaN or infinite where an entry is, and found ten times faster so."""
    return rows.abs().amax(dim=1)


def encode(rows: Tensor, storage: str, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Encode finite rows ``(n, k)`` float32 as ``(n, k)`` of the storage's type and scales ``(n,)`` float32.

    ``sizes`` saves a pass over the rows where :func:`row_sizes` is known.

    * int8: scale = max|row| / 127 and entries ``round(row / scale)``, halves to even, so that an entry errs by at most
      half a scale; symmetric, -128 is never used. A row of zeros has scale 0, and so has one of entries below 10⁻³⁵.
    * float16: scale is the power of two that brings max|row| into [2¹⁴, 2¹⁵), so that small gradients lose nothing to
      float16's short exponent: an entry errs by 2⁻¹¹ of itself, or by 2⁻³⁹ of max|row|, whichever is more.
    * float32: the rows themselves, without scales.

    >>> values, scale = encode(torch.tensor([[1.0, -2.0, 254.0]]), "int8")
    >>> values.tolist(), scale.tolist()
    ([[0, -1, 127]], [2.0])
    """
    if storage == "float32":
        return rows.float(), None
    largest = row_sizes(rows) if sizes is None else sizes
    if storage == "int8":
        scale = torch.where(largest > _SMALLEST, largest / 127, 0.0)
        divisor = torch.where(scale > 0, scale, torch.inf)[:, None]
        return (rows / divisor).round_().to(torch.int8), scale
    exponent = torch.frexp(largest).exponent  # max|row| in [2^(e-1), 2^e)
    scale = torch.ldexp(torch.ones_like(largest), (exponent - 15).clamp_(min=-126))
    return (rows / scale[:, None]).to(torch.float16), scale


def decode(values: np.ndarray, scale: np.ndarray | None) -> Tensor:
    """Return the rows ``(n, k)`` float32 of what :func:`encode` made; never shares memory with it."""
    rows = torch.from_numpy(values)
    if scale is None:
        return rows.to(torch.float32, copy=True)
    return rows.to(torch.float32, copy=True).mul_(torch.from_numpy(scale)[:, None])
