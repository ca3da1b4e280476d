"""Banks of several runs on one training set, whose scores are averaged."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from source_proj._errors import MismatchError
from source_proj.bank import Bank

__all__ = ["as_banks", "require_one_training_set"]

_CALLER = 5  # of a method's constructor, whose line is named


def as_banks(given: Any) -> tuple[Bank, ...]:
    """What was given in the place of a bank, one or a list of several, all of them finalized.

    Raises:
        ValueError: there is none.
        TypeError: something else stands in a bank's place.
        BankError: a bank is not finalized.
    """
    banks: tuple[Bank, ...] = tuple(given) if isinstance(given, tuple | list) else (given,)
    if not banks:
        raise ValueError("got an empty list of banks; give at least one")
    for bank in banks:
        if not isinstance(bank, Bank):
            raise TypeError(f"got {bank!r} in the place of a bank: open it, source_proj.open({str(bank)!r})")
        bank.require_finalized()
    return banks


def require_one_training_set(banks: Sequence[Bank]) -> None:
    """Refuse to average runs over different examples, or scores of different things.

    Raises:
        MismatchError: ids, in their order, or tasks differ.

    Warns:
        UserWarning: other examples may stand under the same ids, as where they are numbers of places.
    """
    first = banks[0]
    for member in banks[1:]:
        if member.ids != first.ids:
            sizes = "" if member.n_rows == first.n_rows else f" ({first.n_rows} and {member.n_rows} examples)"
            raise MismatchError(
                f"the banks {first.path} and {member.path} hold different training ids{sizes}; "
                "an ensemble averages runs on one training set: what is appended to one is appended to all"
            )
        if member.task_spec != first.task_spec:
            raise MismatchError(
                f"the banks of an ensemble measure different things: {first.task_spec} and {member.task_spec}"
            )
        if (other := _first_other_batch(first, member)) is not None:
            warnings.warn(
                f"the banks {first.path} and {member.path} were built of other data under the same ids, first in the "
                f"batch of {other!r}, and scores of an id are averaged: if examples lie in another order there, build "
                "with the same order, or give ids=; if they are the same, prepared in another way, all is well",
                UserWarning,
                stacklevel=_CALLER,
            )


def _first_other_batch(first: Bank, member: Bank) -> Any:
    """Id of the first example of a batch that differs, of those that may be compared; None where none does."""
    for own, other in zip(first.stages, member.stages, strict=False):
        here, there = own.first_batches(), other.first_batches()
        if here is None or there is None or here[0] != there[0]:
            continue
        (size, mine), (_, theirs) = here, there
        count = min(len(mine), len(theirs))
        full = count - 1 if len(mine) != len(theirs) else count  # the last one of a shard may be short
        different = np.flatnonzero((mine[:full] != theirs[:full]).any(axis=1))
        if len(different):
            return own.ids[int(different[0]) * size]
    return None
