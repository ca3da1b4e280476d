"""Per-example gradients of a normalisation's weight and bias where a kernel makes them in one read (`triton_norms`)."""

from math import prod

import torch
from torch import Tensor

from .backends import available_backends

__all__ = ["channel_sums", "row_sums"]

MOST_WIDTH = 1 << 14  # numbers of a row whose statistics one program takes


def row_sums(x: Tensor, g: Tensor, axes: int, eps: float, *, centred: bool) -> tuple[Tensor, Tensor] | None:
    """Of a layer that normalises along the last axes: the sums of g n and of g over the others but the first.

    Args:
        x: the layer's input (B, ..., *shape) of any floating-point type.
        g: its output's gradient, alike.
        axes: how many there are in shape.
        eps: added to the mean square.
        centred: whether the mean is subtracted, as `LayerNorm` does and `RMSNorm` does not.

    Returns:
        Both (B, *shape) float32; None where no kernel serves the device or so wide a shape.
    """
    shape = x.shape[-axes:]
    if not _has_kernel(x) or prod(shape) > MOST_WIDTH:
        return None
    from .triton_norms import row_sums_triton

    flat = (len(x), -1, prod(shape))
    weight, bias = row_sums_triton(x.reshape(flat), g.reshape(flat), eps, centred=centred)
    return weight.unflatten(1, shape), bias.unflatten(1, shape)


def channel_sums(x: Tensor, g: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """Of a layer that normalises channels by given statistics: the sums of g n and of g over all positions.

    Args:
        x: the layer's input (B, C, ...) of any floating-point type.
        g: its output's gradient, alike.
        mean: (C,) float32.
        variance: (C,) float32.
        eps: added to the variance.

    Returns:
        Both (B, C) float32; None where no kernel serves the device.
    """
    if not _has_kernel(x):
        return None
    from .triton_norms import channel_sums_triton

    flat = (*x.shape[:2], -1)
    return channel_sums_triton(x.reshape(flat), g.reshape(flat), mean, torch.rsqrt(variance + eps))


def _has_kernel(x: Tensor) -> bool:
    return available_backends(x.device.type)[0] == "triton"
