"""Batches as trees of tensors: what of them belongs to an example, and how to take some examples out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, SourceProjError

__all__ = [
    "Batch",
    "batch_size",
    "has_lists",
    "is_compared",
    "lists_examples",
    "map_tensors",
    "nonfinite_examples",
    "own_copy",
    "per_example_tensors",
    "require_examples",
    "require_in_front",
    "square_lists_noted",
    "take",
    "with_own_batch",
]

_T = TypeVar("_T")

Batch: TypeAlias = Any  # a tensor, or tuples, lists and mappings of them; other leaves are passed through untouched


def map_tensors(
    batch: Batch, change: Callable[[Tensor], Tensor], instead: Callable[[Batch], Batch | None] = lambda _: None
) -> Batch:
    """The same tree with every tensor replaced by `change(tensor)`, always visited in the same order.

    Where `instead` of a part below the top gives something, that takes the part's place.

    Example:
        >>> map_tensors({"x": torch.ones(2), "note": "kept"}, lambda t: t * 2)
        {'x': tensor([2., 2.]), 'note': 'kept'}
    """

    def below(value: Batch) -> Batch:
        other = instead(value)
        return map_tensors(value, change, instead) if other is None else other

    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: below(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(below(value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(below(value) for value in batch)
    return batch


def own_copy(batch: Batch, *, keep_flags: bool = False) -> Batch:
    """A batch that may be changed: a forward pass may pop entries, or write into its input, and the next sees neither.

    Its tensors have no graph; with `keep_flags` those that require a gradient go on doing so.

    Example:
        >>> batch = {"x": torch.ones(2)}
        >>> own_copy(batch).pop("x").add_(1), batch["x"]
        (tensor([2., 2.]), tensor([1., 1.]))
    """

    def copied(tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        return own.requires_grad_() if keep_flags and tensor.requires_grad else own

    return map_tensors(batch, copied)


def with_own_batch(function: Callable[[Any, Batch], _T]) -> Callable[[Any, Batch], _T]:
    """The function of (model, batch), called with a copy of the batch each time."""
    return lambda model, batch: function(model, own_copy(batch))


def is_compared(number: int) -> bool:
    """Whether the batch of this number, from 0 on, is compared with parts of it: the 2nd, 3rd, 5th, 9th and so on.

    Examples may depend on each other without a trace in the graph (padding cut to the longest, say), and those of the
    first batch, which is always looked at, may happen not to.

    Example:
        >>> [number for number in range(20) if is_compared(number)]
        [1, 2, 4, 8, 16]
    """
    return number > 0 and number & (number - 1) == 0


def batch_size(batch: Batch) -> int:
    """Number of examples: that of the labels of a dict, else the first dim that most of the batch's tensors share.

    A list of tensors of several lengths is one of examples, and counts as it is long.

    Raises:
        ValueError: there is no tensor with a dimension.
    """
    lengths: list[int] = []

    def look(tensor: Tensor) -> Tensor:
        lengths.extend(tensor.shape[:1])
        return tensor

    def look_at_list(value: Batch) -> Batch | None:
        if not _all_are(value, Tensor) or len({tensor.shape[:1] for tensor in value}) < 2:
            return None
        lengths.append(len(value))
        return value

    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    map_tensors(labels if isinstance(labels, Tensor) and labels.dim() else batch, look, look_at_list)
    if not lengths:
        raise ValueError(
            f"the batch of type {type(batch).__name__} holds no tensor whose first dimension counts examples: let the "
            "DataLoader give tensors, or tuples, lists and dicts of them"
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


def require_examples(batch: Batch, ids: Sequence[Any]) -> None:
    """Refuse a batch that has not one entry for each of the examples that it was made of.

    Raises:
        ValueError: says how many it has.
    """
    if not per_example_tensors(batch, len(ids))[0]:
        raise ValueError(
            f"the batch of ids {ids[0]!r} to {ids[-1]!r} has {batch_size(batch)} examples, and {len(ids)} were asked "
            "for: collate_fn must neither drop nor add examples, nor join them in one row, as "
            "DataCollatorWithFlattening does (give what was packed as the examples, or batches of one)"
        )


def take(batch: Batch, examples: list[int], size: int | None = None) -> Batch:
    """The batch of the given ones of its `size` examples, in that order: rows of tensors, and entries of lists.

    Example:
        >>> take((torch.arange(4), [torch.eye(4)], ["a", "b", "c", "d"]), [2])
        (tensor([2]), [tensor([[0., 0., 1., 0.]])], ['c'])
    """
    size = batch_size(batch) if size is None else size

    def rows(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] != (size,):
            return tensor
        return tensor[torch.tensor(examples, device=tensor.device, dtype=torch.int64)]

    def entries(value: Batch) -> Batch | None:
        return type(value)(value[example] for example in examples) if lists_examples(value, size) else None

    return map_tensors(batch, rows, entries)


def has_lists(batch: Batch, size: int) -> bool:
    """Whether the batch holds lists with an entry for each of its `size` examples."""
    lists: list[Batch] = []

    def look(value: Batch) -> Batch | None:
        if not lists_examples(value, size):
            return None
        lists.append(value)
        return value

    map_tensors(batch, lambda tensor: tensor, look)
    return bool(lists)


@contextmanager
def square_lists_noted(batch: Batch, size: int) -> Iterator[None]:
    """Errors within say where a list may have been of examples, and was taken for one of columns."""
    try:
        yield
    except Exception as error:
        squares: list[str] = []

        def look(value: Batch) -> None:
            if size > 1 and _all_are(value, Tensor) and len(value) == size and not lists_examples(value, size):
                squares.append(
                    f"The batch of {size} examples holds a {type(value).__name__} of {size} tensors of {size} rows, "
                    "which was taken for columns, each with a row for each example. If they are the examples, choose "
                    "another batch_size, for this batch and the last one."
                )

        map_tensors([batch], lambda tensor: tensor, look)
        for square in squares:
            error.add_note(square)
        raise


def lists_examples(value: Batch, size: int) -> bool:
    """Whether it is a list with an entry for each example, such as texts or images of several sizes, and no columns.

    A tuple of numbers is a shape, whatever its length.
    """
    if type(value) not in (list, tuple) or len(value) != size:
        return False
    if _all_are(value, Tensor):
        return any(tensor.shape[:1] != (size,) for tensor in value)
    if _all_are(value, Mapping):
        return True
    if any(isinstance(entry, Tensor | Mapping) for entry in value):
        return False
    nested = [entry for entry in value if isinstance(entry, list | tuple)]
    if nested:
        return len(nested) == size and not any(per_example_tensors(entry, size)[0] for entry in nested)
    return type(value) is list or not _all_are(value, Number)


def _all_are(value: Batch, kind: type) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, kind) for entry in value)


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
    if isinstance(problem, SourceProjError) or size == 1 or "in-place" in str(problem):
        return
    try:  # with gradients, so that no model writes into its parameters
        taken = tuple(function(model, batch).shape) == (size,)
    except Exception:  # whatever a model makes of a batch that is none
        return
    if not taken:
        return
    shapes: list[tuple[int, ...]] = []
    map_tensors(batch, lambda tensor: shapes.append(tuple(tensor.shape)) or tensor)  # type: ignore[func-returns-value]
    said = str(problem).partition("\n")[0]
    raise GradientError(
        f"the model takes a batch of {size} examples, and no example of it alone ({said}): the first "
        f"dimension of its tensors, of shapes {shapes[:10]}, must count examples, and where it is not {size} a tensor "
        "counts as shared by all. Let the DataLoader give batches with the examples in front, and transpose or join "
        "them in the model. Where the model says squeeze(), squeeze(-1) or flatten(1) keeps the examples"
    ) from problem
