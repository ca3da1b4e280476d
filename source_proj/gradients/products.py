"""Vector-Jacobian products of many cotangents at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

__all__ = ["batched_products"]


def batched_products(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Products of B cotangents with the derivatives of some outputs, by the graph, which stays.

    Args:
        outputs: with a graph.
        inputs: by which to take derivatives.
        cotangents: ``(B, *shape)`` for each output.

    Returns:
        ``(B, *shape)`` for each input; None for one that no output was made of.
    """
    product = partial(torch.autograd.grad, outputs, inputs, allow_unused=True, retain_graph=True)
    try:
        return list(product(cotangents, is_grads_batched=True))
    except RuntimeError:  # vmap has no rule for it, as for sparse tensors and GroupNorm's second derivative
        each = [product([cotangent[place] for cotangent in cotangents]) for place in range(len(cotangents[0]))]
    return [_stacked(parts) for parts in zip(*each, strict=True)]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.stack(there) if there else None  # what is not connected is so for every cotangent
