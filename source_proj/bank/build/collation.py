"""How examples become a batch, and what would go wrong in it unseen: unlike examples, and examples in another order."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import default_collate

from source_proj.bank.build.batch_hash import batch_hash
from source_proj.gradients.batches import map_tensors

__all__ = ["Collation"]

_REPEATS = 4  # before a function is said to draw nothing

# What torch says of rows of different lengths: tensors, and lists.
_RAGGED = ("stack expects each tensor to be equal size", "each element in list of batch should be of equal size")
_OWN_COLLATE = "give a DataLoader that makes batches of them as in training, DataLoader(data, ..., collate_fn=...)"


class Collation:
    """A loader's ``collate_fn``, of which the first batch is looked at: its examples must be in the order given.

    A function that sorts them, by length for :func:`torch.nn.utils.rnn.pack_padded_sequence` say, would put every row
    under another example's id. It is given the same examples the other way round: rows that are then the same ones in
    an order that is not the other way round were moved. Rows that are others, as random masks make them, say nothing,
    nor do rows that the same examples don't make again.

    Args:
        collate: makes a batch of a list of examples.
        name: of the data set, for errors.
    """

    def __init__(self, collate: Callable[[Any], Any], name: str) -> None:
        self._collate = collate
        self._name = name
        self._looked = collate is default_collate

    def __call__(self, examples: Any) -> Any:
        """The batch of some examples.

        Raises:
            TypeError: the batch holds what examples cannot be taken out of.
            ValueError: the examples are not alike, or come out in another order.
        """
        batch = self._stacked(examples) if self._collate is default_collate else self._ordered(examples)
        self._require_rows(batch, len(examples))
        return batch

    def _ordered(self, examples: Any) -> Any:
        """A batch by the loader's own function, whose first one is looked at."""
        again = None if self._looked or len(examples) < 2 else _copied(examples)
        batch = self._collate(examples)
        if again is not None:
            self._looked = True
            self._require_order(batch, again)
        return batch

    def _stacked(self, examples: Any) -> Any:
        """A batch by torch's own function, which takes the entries of the first example for those of all."""
        _require_same_entries(examples, self._name)
        try:
            return default_collate(examples)
        except TypeError as error:
            raise TypeError(
                f"the examples of {self._name} make no batch ({str(error).splitlines()[-1]}): let the data set give "
                "tensors, arrays, numbers, texts, and tuples, lists or dicts of them (of a picture of PIL by "
                f"transform=torchvision.transforms.ToTensor()), or {_OWN_COLLATE}"
            ) from error
        except RuntimeError as error:
            if not any(said in str(error) for said in _RAGGED):
                raise
            raise ValueError(
                f"the rows of {self._name} are of different lengths, and make no batch "
                f"({str(error).splitlines()[-1]}): give a DataLoader that pads them as in training, "
                "DataLoader(data, batch_size=..., collate_fn=...), say by transformers' DataCollatorWithPadding"
            ) from error

    def _require_rows(self, batch: Any, count: int) -> None:
        """Refuse tensors whose rows torch cannot take by their numbers.

        Raises:
            TypeError: says of which kind.
        """

        def look(tensor: Tensor) -> Tensor:
            if tensor.is_nested or (tensor.layout != torch.strided and tensor.shape[:1] == (count,)):
                kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
                raise TypeError(
                    f"a batch of {self._name} holds a {kind} tensor, of which single examples cannot be taken: pad "
                    "and stack its rows, or give a list of one tensor for each example, and let the model make it"
                )
            return tensor

        map_tensors(batch, look)

    def _require_order(self, batch: Any, examples: list[Any]) -> None:
        if _is_palindrome(examples):
            return
        try:
            with torch.random.fork_rng(devices=[]):
                reverse = self._collate(examples[::-1])
                rows, reversed_rows = (_row_digests(each, len(examples)) for each in (batch, reverse))
                moved = bool(rows) and reversed_rows != rows[::-1] and sorted(reversed_rows) == sorted(rows)
                moved = moved and self._is_repeated(rows, examples)
        except Exception:  # what it cannot do twice, or what has no digest, says nothing of the order
            return
        if moved:
            function = getattr(self._collate, "__name__", type(self._collate).__name__)
            raise ValueError(
                f"collate_fn {function!r} gives the examples of a batch in another order than it got them, by length "
                "say: each row would have another example's id. Let it keep the order; where the model wants them "
                "sorted, pack_padded_sequence(..., enforce_sorted=False) sorts by itself"
            )

    def _is_repeated(self, rows: list[bytes], examples: list[Any]) -> bool:
        """Whether the same examples make the same rows again: of rows that are drawn, an order may come by chance."""
        try:
            again = [_row_digests(self._collate(list(examples)), len(examples)) for _ in range(_REPEATS)]
        except Exception:  # it changes what it is given
            return True
        return all(each == rows for each in again)


def _copied(examples: Any) -> list[Any] | None:
    """Examples for a second batch, as a function may change what it is given; None where they cannot be copied."""
    try:
        return copy.deepcopy(list(examples))
    except Exception:  # whatever an example is made of
        return None


def _require_same_entries(examples: Any, name: str) -> None:
    """Refuse dicts of different entries, and examples that lack a value.

    Raises:
        ValueError: they are; says which example it is, of which batch an error's note says.
    """
    if not isinstance(examples, list):
        return
    for place, example in enumerate(examples):
        keyed = isinstance(example, Mapping)
        if keyed and isinstance(examples[0], Mapping) and example.keys() != examples[0].keys():
            raise ValueError(
                f"the examples of {name} have different entries, and make no batch: number {place} of this one has "
                f"{sorted(map(str, example))}, number 0 has {sorted(map(str, examples[0]))}; give all of them the same"
            )
        entries = example.items() if keyed else enumerate(example) if isinstance(example, tuple | list) else ()
        absent = [key for key, value in entries if value is None]
        if absent:
            raise ValueError(
                f"number {place} of this batch of {name} has None as its entry {absent[0]!r}: leave such examples out, "
                "or give them a value"
            )


def _is_palindrome(examples: Sequence[Any]) -> bool:
    """Whether examples are the same ones the other way round."""
    try:
        return batch_hash(examples) == batch_hash(examples[::-1])
    except TypeError:  # of other things than numbers
        return False


def _row_digests(batch: Any, count: int) -> list[bytes]:
    """A digest of all that a batch holds for each of its examples, in its order; none where it holds nothing by row."""
    columns = list(_columns(batch, count))
    return [batch_hash([column[row] for column in columns]) for row in range(count if columns else 0)]


def _columns(batch: Any, count: int) -> list[Any]:
    """What has one entry for each example.

    Raises:
        ValueError: nothing has.
    """
    if isinstance(batch, Tensor | np.ndarray):
        return [batch] if batch.ndim and len(batch) == count else []
    if isinstance(batch, Mapping):
        return [column for value in batch.values() for column in _columns(value, count)]
    if isinstance(batch, PackedSequence):
        raise ValueError("its examples are mixed")
    if not isinstance(batch, list | tuple):
        return []
    within = [[] if isinstance(value, Mapping) and len(batch) == count else _columns(value, count) for value in batch]
    if len(batch) == count and not all(within):
        return [batch]  # a list of the examples; or of two columns of two, of which one is by step
    return [column for columns in within for column in columns]
