"""Margins of labels as one step of autograd: a small model's pass spends as long on the loss as on a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["label_margin"]


def label_margin(logits: Tensor, labels: Tensor) -> Tensor:
    r"""The margin :math:`z_y - \log \sum_{c ≠ y} e^{z_c}` of each label, (B,).

    Args:
        logits: z (B, C), C at least 2.
        labels: y (B,) int64, from 0 to C - 1.

    Example:
        >>> label_margin(torch.tensor([[0.0, 3.0]]), torch.tensor([1]))
        tensor([3.])
    """
    label = labels[:, None]
    if torch.compiler.is_compiling() or any(map(torch._C._functorch.is_functorch_wrapped_tensor, (logits, labels))):
        return _margin(logits, label)
    apply: Callable[..., Tensor] = LabelMargin.apply  # some of torch's versions have types for it
    return apply(logits, label)


class LabelMargin(torch.autograd.Function):
    """Of logits (B, C) and labels (B, 1), as often differentiable; `gradients/layout.py` knows it by this name."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, label: Tensor) -> Tensor:
        ctx.save_for_backward(logits, label)
        ctx.save_for_forward(logits, label)
        return _margin(logits, label)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        """The tangent of the label's logit, less the others' mean by softmax."""
        logits, label = ctx.saved_tensors
        return tangent.gather(1, label).squeeze(1) - (_others(logits, label).softmax(1) * tangent).sum(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """One for the label, and minus the softmax of the others."""
        logits, label = ctx.saved_tensors
        return _others(logits, label).softmax(1).neg().scatter(1, label, 1.0) * g[:, None], None


def _margin(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(1, label).squeeze(1) - _others(logits, label).logsumexp(1)


def _others(logits: Tensor, label: Tensor) -> Tensor:
    return logits.scatter(1, label, -math.inf)
