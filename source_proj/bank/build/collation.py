"""How examples become a batch, and what would go wrong in it unseen: unlike examples, and examples in another order."""

import copy
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from source_proj.bank.build.example_places import change_of_places
from source_proj.gradients.batches import is_compared, map_tensors

__all__ = ["Collation"]

_MOST = 64  # examples of a batch that are looked at

# What torch says of rows of different lengths: tensors, and lists.
_RAGGED = ("stack expects each tensor to be equal size", "each element in list of batch should be of equal size")
_OWN_COLLATE = "give a DataLoader that makes batches of them as in training, DataLoader(data, ..., collate_fn=...)"


class Collation:
    """A loader's ``collate_fn``, of which some batches are looked at: examples must stay in the order given.

    A function that sorts them, by length for :func:`torch.nn.utils.rnn.pack_padded_sequence` say, or that puts one in
    the place of another, would put rows under other examples' ids. At the first batch, and the 2nd, 3rd, 5th, 9th and
    so on, as those before may have been in order, it is given the same examples in other orders: see
    :func:`change_of_places`. Rows that are others each time, as random masks make them, say nothing, unless the same
    ones come each time in another order.

    Args:
        collate: makes a batch of a list of examples.
        name: of the data set, for errors.
    """

    def __init__(self, collate: Callable[[Any], Any], name: str) -> None:
        self._collate = collate
        self._name = name
        self._batches = 0  # of at least two examples
        self._mixes = False  # as was said already

    def __call__(self, examples: Any) -> Any:
        """The batch of some examples.

        Raises:
            TypeError: the batch holds what examples cannot be taken out of.
            ValueError: the examples are not alike, or come out in another order.

        Warns:
            UserWarning: the examples are mixed.
        """
        batch = self._stacked(examples) if self._collate is default_collate else self._ordered(examples)
        self._require_rows(batch, len(examples))
        return batch

    def _ordered(self, examples: Any) -> Any:
        """A batch by the loader's own function, of which some are looked at."""
        look = len(examples) > 1 and not self._mixes
        if look:
            self._batches += 1
            look = self._batches == 1 or is_compared(self._batches - 1)
        again = _copied(_some(examples, self._batches)) if look else None
        batch = self._collate(examples)
        if again is not None:
            self._require_places(again)
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

    def _require_places(self, examples: list[Any]) -> None:
        """Refuse a function that moves examples, and tell of one that mixes them."""
        try:
            change = change_of_places(self._collate, examples, self._batches)
        except Exception:  # what it cannot do again, or what has no digest, says nothing of places
            return
        if change is None:
            return
        function = f"collate_fn {getattr(self._collate, '__name__', type(self._collate).__name__)!r}"
        if change == "mixed":
            self._mixes = True
            warnings.warn(
                f"{function} makes other rows of an example where others of its batch change their places, as mixup "
                "with a partner does: its row in the bank, or its scores, are of the mixture. Let it make of each "
                "example what it is by itself",
                UserWarning,
                stacklevel=2,
            )
            return
        how = "an order that it draws" if change == "shuffled" else "another order than it got them, or some twice"
        raise ValueError(
            f"{function} gives the examples of a batch in {how}, sorted by length or in place of broken ones say: each "
            "row would have another example's id. Let it keep the order, and leave broken examples out of the data "
            "set; where the model wants them sorted, pack_padded_sequence(..., enforce_sorted=False) sorts by itself"
        )


def _some(examples: Sequence[Any], seed: int) -> list[Any]:
    """As many as are looked at, in their order."""
    places = range(len(examples))
    return [examples[place] for place in sorted(random.Random(seed).sample(places, min(_MOST, len(examples))))]


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
