"""Batches as trees of tensors: what of them belongs to an example, and how to take some examples out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, SourceProjError

__all__ = [
    "Batch",
    "batch_size",
    "map_tensors",
    "nonfinite_examples",
    "per_example_tensors",
    "require_in_front",
    "take",
]

Batch: TypeAlias = Any  # a tensor, or tuples, lists and mappings of them; other leaves are passed through untouched


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The same tree with every tensor replaced by `change(tensor)`, always visited in the same order.

    Example:
        >>> map_tensors({"x": torch.ones(2), "note": "kept"}, lambda t: t * 2)
        {'x': tensor([2., 2.]), 'note': 'kept'}
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def batch_size(batch: Batch) -> int:
    """Number of examples: that of the labels of a dict, else the first dim that most of the batch's tensors share.

    Raises:
        ValueError: there is no tensor with a dimension.
    """
    lengths: list[int] = []

    def look(tensor: Tensor) -> Tensor:
        lengths.extend(tensor.shape[:1])
        return tensor

    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    map_tensors(labels if isinstance(labels, Tensor) and labels.dim() else batch, look)
    if not lengths:
        raise ValueError(
            f"the batch of type {type(batch).__name__} holds no tensor whose first dimension counts examples"
        )
    return max(lengths, key=lengths.count)


def per_example_tensors(batch: Batch, size: int) -> tuple[list[Tensor], Callable[[list[Tensor]], Batch]]:
    """The tensors whose first dimension counts examples, and how to put such a list back into the tree.

    Tensors of another length are one thing shared by all examples and stay in place.
    """
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] == (size,):
            tensors.append(tensor)
        return tensor

    def rebuild(replacements: list[Tensor]) -> Batch:
        left = iter(replacements)
        return map_tensors(batch, lambda tensor: next(left) if tensor.shape[:1] == (size,) else tensor)

    map_tensors(batch, collect)
    return tensors, rebuild


def take(batch: Batch, examples: list[int], size: int | None = None) -> Batch:
    """The batch of the given ones of its `size` examples, in that order.

    Example:
        >>> take((torch.arange(4), [torch.eye(4)]), [2])[0]
        tensor([2])
    """
    tensors, rebuild = per_example_tensors(batch, batch_size(batch) if size is None else size)
    return rebuild([tensor[torch.tensor(examples, device=tensor.device)] for tensor in tensors])


def nonfinite_examples(rows: Tensor) -> list[int]:
    """Positions of the rows (B, k) that hold a NaN or an infinity.

    Example:
        >>> nonfinite_examples(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
        [1]
    """
    return [int(i) for i in torch.isfinite(rows).all(dim=1).logical_not().nonzero()[:, 0]]


def require_in_front(
    function: Callable[[nn.Module, Batch], Any], model: nn.Module, batch: Batch, size: int, problem: Exception
) -> None:
    """Say what is wrong with a batch that a function of a model takes as a whole, and not an example of it.

    Args:
        function: of (model, batch) to (B,).
        model: the model.
        batch: the whole.
        size: the number of its examples.
        problem: what came of an example alone.

    Raises:
        GradientError: it is such a batch.
    """
    if isinstance(problem, SourceProjError):
        return
    try:
        with torch.no_grad():
            taken = tuple(function(model, batch).shape) == (size,)
    except Exception:  # whatever a model makes of a batch that is none
        return
    if not taken or size == 1:
        return
    shapes: list[tuple[int, ...]] = []
    map_tensors(batch, lambda tensor: shapes.append(tuple(tensor.shape)) or tensor)  # type: ignore[func-returns-value]
    said = str(problem).partition("\n")[0]
    raise GradientError(
        f"the model takes a batch of {size} examples, and no example of it alone ({said}): the first "
        f"dimension of its tensors, of shapes {shapes[:10]}, must count examples, and where it is not {size} a tensor "
        "counts as shared by all. Let the DataLoader give batches with the examples in front, and transpose or join "
        "them in the model"
    ) from problem
