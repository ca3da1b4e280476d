"""Schedules of transformers with settings of their own (``lr_scheduler_kwargs``), computed by transformers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["rates_with_options"]

_RELATIVE = 1e-9  # a logged rate is a float64 printed whole
_SAME = 1e-6  # integrals of the learning rate that differ by less are one


def rates_with_options(
    name: str, options: Mapping[str, Any], known: Mapping[int, float], total: int, base: float, warmup: int | None
) -> list[float]:
    """Learning rate of every update of a run.

    Args:
        name: ``lr_scheduler_type``; any whose rates follow from the update's number.
        options: ``lr_scheduler_kwargs``, such as ``{"min_lr": 1e-6}``.
        known: update's number → learning rate, which a warm-up must agree with.
        total: steps T that the schedule was made for.
        base: peak learning rate.
        warmup: warm-up steps; None to find them out.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no such schedule or option; or no warm-up, or several that differ, agree with the known rates.
    """
    fitting = []
    for steps in range(total + 1) if warmup is None else (warmup,):
        factor = _factor(name, options, steps, total, base)
        if all(abs(base * factor(update) - rate) <= _RELATIVE * base for update, rate in known.items()):
            fitting.append([base * factor(update) for update in range(total)])
    integrals = [sum(rates) for rates in fitting]
    what = f"schedule {name!r} with the options {dict(options)}"
    if not fitting:
        tried = "any warm-up" if warmup is None else f"{warmup} warm-up steps"
        raise ValueError(
            f"{what} and {tried} does not give the learning rates that are known: say by schedule_options= and "
            "warmup_steps= what the run had"
        )
    if max(integrals) - min(integrals) > _SAME * max(integrals):
        raise ValueError(f"{what} gives the known learning rates under {len(fitting)} warm-ups: give warmup_steps=")
    return fitting[0]


def _factor(name: str, options: Mapping[str, Any], warmup: int, total: int, base: float) -> Callable[[int], float]:
    """What the peak learning rate is multiplied by, as a function of the update's number."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"schedule {name!r} needs transformers: pip install 'source-proj[hf]'") from error
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True, dtype=torch.float32, device="cpu")], lr=base)
    try:
        scheduler = transformers.get_scheduler(name, optimizer, warmup, total, dict(options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"transformers makes no schedule {name!r} with {dict(options)}: {error}") from error
    if not hasattr(scheduler, "lr_lambdas"):
        raise ValueError(f"schedule {name!r} follows the losses: give schedule=, one learning rate per update")
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
