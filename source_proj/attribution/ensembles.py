"""Banks of several runs on one training set, whose scores are averaged."""

from collections.abc import Sequence
from typing import Any

from source_proj._errors import MismatchError
from source_proj.bank import Bank

__all__ = ["as_banks", "require_one_training_set"]


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
