"""What of an optimizer may change from step to step: what is integrated step by step, and nothing else."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from source_proj._errors import MismatchError
from source_proj.trajectory.optimizers import Optimizer, Updates

__all__ = ["require_integrable", "with_momentum_of"]

_FIRST = 4  # steps that tell whether momentum enters otherwise than by the time factor
_INTEGRATED = ("momentum", "dampening")  # they enter by the time factor alone


def with_momentum_of(known: Optimizer, now: Optimizer) -> Optimizer:
    """An optimizer, with another one's momentum: β, and Adam's β₁, but not β₂, which its second moment hangs on."""
    if type(now) is not type(known):
        return now
    names = {field.name for field in fields(now)}
    changed: dict[str, Any] = {name: getattr(known, name) for name in _INTEGRATED if name in names}
    if "betas" in names:
        changed["betas"] = (getattr(known, "betas")[0], *getattr(now, "betas")[1:])  # noqa: B009
    return replace(now, **changed)


def _factors(optimizer: Optimizer) -> list[float] | None:
    """What the optimizer makes of its first steps under a constant rate."""
    return optimizer.step_factors(Updates([1.0] * _FIRST, [_FIRST]))


def require_integrable(known: Optimizer, now: Optimizer, step: int) -> None:
    """Refuse an optimizer of which more changed than learning rate and momentum.

    Raises:
        MismatchError: names what changed.
    """
    aligned = with_momentum_of(known, now)
    if aligned == known and (now == known or _factors(now) == _factors(known)):
        return
    aligned = aligned if aligned != known else now  # its momentum makes each step's length, as NAdam's does
    names = [f.name for f in fields(now) if getattr(aligned, f.name) != getattr(known, f.name, None)]
    changes = ", ".join(f"{name}={getattr(now, name)!r} was {getattr(known, name, None)!r}" for name in names)
    raise MismatchError(
        f"the optimizer's options changed at step {step}: {changes or type(now).__name__}. Only learning rate and "
        "momentum (β₁) may change during a stage, the latter where it scales all steps alike; record another stage "
        "from here"
    )
