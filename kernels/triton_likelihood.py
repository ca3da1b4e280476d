"""Log-likelihoods of labels under logits on GPUs (needs triton): the logits are read once, and once more backward.

Torch would write log-probabilities in float32 and their gradients, each as large as the logits, and the logits'
gradient again for every view that was taken of them.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton_device import interpreted, on_device

__all__ = ["label_likelihood_triton"]

_BLOCK = 4096  # logits that a program reads at once


@triton.jit
def _forward_kernel(values, highests, totals, logits, labels, width, stride_b, stride_t, steps, BLOCK: tl.constexpr):
    """Of one position: the largest logit and the sum of exponentials in one go."""
    row = tl.program_id(0).to(tl.int64)
    own = logits + row // steps * stride_b + row % steps * stride_t
    most = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(own + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, x)
        # Of lanes that have seen nothing yet both are minus infinity, whose difference is no number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - shift) + tl.exp(x - shift)
        most = higher
    highest = tl.max(most, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    log_total = tl.log(tl.sum(total * tl.exp(most - shift), 0))
    tl.store(highests + row, shift)  # apart: their sum would round the logarithm away where logits are large
    tl.store(totals + row, log_total)
    tl.store(values + row, tl.load(own + tl.load(labels + row)).to(tl.float32) - shift - log_total)


@triton.jit
def _backward_kernel(
    gradients,
    of_values,
    highests,
    totals,
    logits,
    labels,
    width,
    stride_b,
    stride_t,
    steps,
    of_logits,
    BLOCK: tl.constexpr,
):
    """The gradient of one position's logits; none of the positions behind the labels."""
    row, step = tl.program_id(0).to(tl.int64) // of_logits, tl.program_id(0) % of_logits
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gradient = tl.zeros((BLOCK,), dtype=tl.float32)
    if step < steps:
        at = row * steps + step
        x = tl.load(logits + row * stride_b + step * stride_t + column, mask=there, other=0.0).to(tl.float32)
        hit = (column == tl.load(labels + at)).to(tl.float32)
        gradient = tl.load(of_values + at) * (hit - tl.exp(x - tl.load(highests + at) - tl.load(totals + at)))
    tl.store(gradients + (row * of_logits + step) * width + column, gradient, mask=there)


class LabelLikelihood(torch.autograd.Function):
    """`gradients/layout.py` knows it by this name."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        values = torch.empty(labels.shape, device=logits.device, dtype=torch.float32)
        highests, totals = torch.empty_like(values), torch.empty_like(values)
        _fill(values, highests, totals, logits, labels)
        ctx.save_for_backward(logits, labels, highests, totals)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_values: Tensor) -> tuple[Tensor, None]:
        logits, labels, highests, totals = ctx.saved_tensors
        gradients = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _fill_back(gradients, of_values.contiguous(), highests, totals, logits, labels)
        return gradients, None


def label_likelihood_triton(logits: Tensor, labels: Tensor) -> Tensor:
    """Log p(label) (B, S) float32 at the first S positions of logits (B, T, V), for labels (B, S) int64.

    Differentiable once by the logits, which are of any floating-point type and contiguous along V.
    """
    apply: Callable[..., Tensor] = LabelLikelihood.apply  # some of torch's versions have types for it
    return apply(logits, labels.contiguous())


@on_device
def _fill(values: Tensor, highests: Tensor, totals: Tensor, logits: Tensor, labels: Tensor) -> None:
    width, steps = logits.shape[2], labels.shape[1]
    if values.numel():
        _forward_kernel[(values.numel(),)](
            values, highests, totals, logits, labels, width, logits.stride(0), logits.stride(1), steps,
            BLOCK=_block(width), num_warps=8,
        )  # fmt: skip


@on_device
def _fill_back(
    gradients: Tensor, of_values: Tensor, highests: Tensor, totals: Tensor, logits: Tensor, labels: Tensor
) -> None:
    (batch, positions, width), block = logits.shape, _block(logits.shape[2])
    if gradients.numel():
        _backward_kernel[(batch * positions, -(-width // block))](
            gradients, of_values, highests, totals, logits, labels, width, logits.stride(0), logits.stride(1),
            labels.shape[1], positions, BLOCK=block, num_warps=8,
        )  # fmt: skip


def _block(width: int) -> int:
    most = 1 << 16 if interpreted() else _BLOCK  # the interpreter's time goes by programs
    return min(most, 1 << (width - 1).bit_length())
