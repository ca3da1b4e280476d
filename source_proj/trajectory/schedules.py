"""What changes from update to update, such as the learning rate: a function, or a number for each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import repeat
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from source_proj._io.numbers import whole_number

__all__ = ["finite_rate", "schedule_function", "scheduler_rates"]


def finite_rate(value: Any) -> float | None:
    """A number that is finite and at least 0, of Python, NumPy or torch; None for all else.

    >>> finite_rate(0.5), finite_rate([0.5]), finite_rate("0.5"), finite_rate(-1)
    (0.5, None, None, None)
    """
    try:
        number = float("nan" if isinstance(value, str) else value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several
        return None
    return number if 0 <= number < math.inf else None


def schedule_function(name: str, schedule: Any, updates: range, largest: float) -> Callable[[int], float]:
    """A schedule as a checked function of the update's number.

    Args:
        name: what an error calls it.
        schedule: a function of the update's number, or one value for each of the updates.
        updates: their numbers.
        largest: that a value may be.

    Raises:
        TypeError: it is neither.
        ValueError: there are more or fewer values than updates; or, when it is called, a value is out of range.
    """
    function: Callable[[int], object] = schedule if callable(schedule) else _values(name, schedule, updates)

    def checked(step: int) -> float:
        value = function(step)
        rate = finite_rate(value)
        if rate is None or rate > largest:
            bound = "" if largest == math.inf else f" and at most {largest:g}"
            raise ValueError(f"{name} gives {value!r} for update {step}: must be finite and at least 0{bound}")
        return rate

    return checked


def scheduler_rates(
    make: Callable[[torch.optim.Optimizer], LRScheduler],
    lr: float | Sequence[float],
    steps: int,
    *,
    every: int = 1,
    momentum: bool = False,
) -> list[float]:
    """Learning rate of each update under a scheduler of torch, as ``lr_schedule=`` takes it.

    The scheduler runs again beside an optimizer of nothing, so that the rates are its own to the last bit.

    Args:
        make: makes the scheduler for an optimizer, as training did.
        lr: what the optimizer was made with; a number for each parameter group where groups differ. The rates are
            those of the first.
        steps: updates, as many as the last checkpoint counts.
        every: updates between two steps of the scheduler: 1 where it stepped after each batch, the updates of an epoch
            where it stepped after each epoch.
        momentum: return the momentum of each update instead, which OneCycleLR and CyclicLR change, too. Of SGD,
            ``time_factors=[1 / (1 - beta) for beta in ...]`` follows it.

    Returns:
        ``steps`` numbers.

    Raises:
        TypeError: ``make`` makes no scheduler, or one whose rates depend on how training went.
        ValueError: ``steps`` or ``every`` is no whole number of at least 1.

    Example:
        >>> from torch.optim.lr_scheduler import StepLR
        >>> scheduler_rates(lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.5), lr=0.1, steps=5, every=2)
        [0.1, 0.1, 0.05, 0.05, 0.025]
    """
    steps, every = whole_number(steps, "steps", least=1), whole_number(every, "every", least=1)
    rates = [lr] if isinstance(lr, int | float) else list(lr)
    nothing = [{"params": [torch.zeros(1, dtype=torch.float32, device="cpu")], "lr": float(rate)} for rate in rates]
    optimizer = torch.optim.SGD(nothing, lr=float(rates[0]), momentum=0.5 if momentum else 0.0)
    with warnings.catch_warnings():  # torch warns of schedulers that step without an optimizer, and of its own calls
        warnings.simplefilter("ignore")
        return _replayed(make(optimizer), optimizer, "momentum" if momentum else "lr", steps, every)


def _replayed(scheduler: Any, optimizer: torch.optim.Optimizer, option: str, steps: int, every: int) -> list[float]:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau's rates depend on how training went: give lr_schedule= the rate of each update"
        )
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "state_dict"):
        raise TypeError(f"make must make a scheduler of torch for the optimizer that it gets, got {scheduler!r}")
    values: list[float] = []
    while True:
        values += repeat(float(optimizer.param_groups[0][option]), min(every, steps - len(values)))
        if len(values) == steps:
            return values
        scheduler.step()


def _values(name: str, schedule: Any, updates: range) -> Callable[[int], object]:
    remedy = "give a function of the update's number (lambda step: 0.1), or one value for each update"
    if isinstance(schedule, LRScheduler):
        kind = type(schedule).__name__
        raise TypeError(
            f"{name} is a {kind}, which does not say how often it stepped: give source_proj.scheduler_rates(lambda "
            f"optimizer: {kind}(optimizer, ...), lr=0.1, steps={updates.stop}, every=1)"
        )
    if isinstance(schedule, str | Mapping | Set):  # of a mapping or a set, list() would take what are no rates
        raise TypeError(f"{name} is {schedule!r}: {remedy}")
    try:
        values = list(schedule)
    except TypeError:
        raise TypeError(f"{name} is {schedule!r}: {remedy}") from None
    if len(values) != len(updates):
        raise ValueError(
            f"{name} has {len(values)} entries for the {len(updates)} optimizer steps {updates.start} to "
            f"{updates.stop}: give one each"
        )
    return lambda step: values[step - updates.start]
