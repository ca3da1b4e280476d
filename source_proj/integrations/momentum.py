"""Momentum that changed on the way: how far each update moves the weights in all, where every update's is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias

from source_proj.trajectory import Optimizer
from source_proj.trajectory.recording.momentum import require_integrable

__all__ = ["GivenValues", "given_values", "has_momentum", "momentum_factors", "require_momentum", "time_factors"]

GivenValues: TypeAlias = Callable[[int], float] | Sequence[float]
"""Learning rate or momentum of every update: a function of its number, or one value each."""


def momentum_factors(
    optimizer: Optimizer,
    described: Mapping[int, Optimizer],
    groups: Mapping[int, Mapping[str, Any]],
    last: int,
    logged: Mapping[int, float] | None = None,
    given: GivenValues | None = None,
) -> list[float] | None:
    """The optimizer's time factor at every update, for :class:`Stage`; None where it is one number.

    The momentum of SGD and RMSprop enters there. That of Adam (β₁) does not: its first moment is a mean.

    Args:
        optimizer: how gradients became steps.
        described: the same, as each checkpoint's file says, by step.
        groups: the first parameter group of each file, by step; a schedule that cycles momentum leaves its bounds.
        last: number of updates.
        logged: update's number → momentum.
        given: momentum of every update, which counts before what was logged.

    Raises:
        ValueError: momentum changed, and not every update's is known; or ``given`` is not one value each, or of an
            optimizer without momentum.
        MismatchError: another option changed between checkpoints.
    """
    for step, now in described.items():
        require_integrable(optimizer, now, step)
    require_momentum(optimizer, given)
    if not has_momentum(optimizer):
        return None
    if given is not None:
        return time_factors(optimizer, given_values("momentum", given, last))
    known = {t: value for t, value in (logged or {}).items() if t < last}
    cycled = [(g["base_momentum"], g["max_momentum"]) for g in groups.values() if "max_momentum" in g]
    at_steps = {step: group["momentum"] for step, group in groups.items() if "momentum" in group}
    if len({*at_steps.values(), *known.values()}) <= 1 and all(least == most for least, most in cycled):
        return None
    if len(known) == last:
        return time_factors(optimizer, [known[t] for t in range(last)])
    bounds = f", in cycles between {cycled[0][0]} and {cycled[0][1]}" if cycled else ""
    raise ValueError(
        f"the optimizer's momentum changed during the run (at checkpoints, by step, it was {at_steps}{bounds}), and "
        f"it is known of {len(known)} of {last} updates: give momentum=, a function of the update's number or one "
        "value each; or record the run by a Recorder or a RecorderCallback, or in Lightning by "
        "LearningRateMonitor('step', log_momentum=True)"
    )


def has_momentum(optimizer: Optimizer) -> bool:
    """Whether momentum enters the optimizer's time factor; Adam's β₁ does not."""
    return "momentum" in {field.name for field in fields(optimizer)}


def require_momentum(optimizer: Optimizer, given: GivenValues | None) -> None:
    """Refuse momenta of an optimizer whose time they do not change, which would be left out of account.

    Raises:
        ValueError: they were given for such a one.
    """
    if given is not None and not has_momentum(optimizer):
        raise ValueError(
            f"momentum= (--momentum) belongs to SGD and RMSprop, and the run was trained with "
            f"{type(optimizer).__name__}, whose steps no momentum makes longer: leave it out"
        )


def time_factors(optimizer: Optimizer, momenta: Sequence[float]) -> list[float]:
    """The time factor that each update's momentum makes of an optimizer that :func:`has_momentum`."""
    factor = {value: replace(optimizer, **{"momentum": value}).time_factor for value in set(momenta)}
    return [factor[value] for value in momenta]


def given_values(name: str, given: GivenValues, last: int) -> list[float]:
    """What a user gave for updates 0 to last - 1.

    Raises:
        ValueError: it is not one value each.
    """
    values = [float(given(t)) for t in range(last)] if callable(given) else [float(value) for value in given]
    if len(values) != last:
        raise ValueError(f"{name} has {len(values)} entries for the {last} updates of the run: give one each")
    return values
