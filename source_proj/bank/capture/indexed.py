"""A data set that says of each example which one it is, so that a shuffled batch can be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from source_proj.gradients.training import INDEX

__all__ = ["IndexedDataset"]


class IndexedDataset(Dataset[Any]):
    """A map-style data set whose examples carry their index.

    An example that is a mapping gets an entry "index", which a model that is captured doesn't get to see: it is taken
    out of the keyword arguments before the forward pass. Any other example becomes the pair (index, example).

    Args:
        data: a map-style data set.

    Raises:
        TypeError: it has no ``__getitem__`` and ``__len__``.
        ValueError: a mapping has an entry "index" already.

    Example:
        >>> IndexedDataset(["a", "b"])[1]
        (1, 'b')
        >>> IndexedDataset([{"labels": 3}])[0]
        {'labels': 3, 'index': 0}
    """

    def __init__(self, data: Any) -> None:
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise TypeError(f"a {type(data).__name__} is no map-style data set, with __getitem__ and __len__")
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self._data))[index]
        example = self._data[index]
        if not isinstance(example, Mapping):
            return index, example
        if INDEX in example:
            raise ValueError(f"example {index} has an entry {INDEX!r} already: rename it, or give step(ids=...) itself")
        return {**example, INDEX: index}
