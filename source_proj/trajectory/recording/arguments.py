"""What a Recorder is called with, refused by name before anything is opened."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from source_proj.trajectory.placement import require_shapes
from source_proj.trajectory.schedules import finite_rate

__all__ = ["innermost", "require_options", "require_training", "still_trained"]

_NAMED = 3  # parameters spelled out in a warning


def innermost(optimizer: Any) -> Any:
    """The optimizer within wrappers that step by it, as accelerate's and Lightning's do; of all else, itself."""
    while hasattr(optimizer, "accelerator_state") or not isinstance(optimizer, torch.optim.Optimizer | nn.Module):
        within = getattr(optimizer, "optimizer", None)
        if within is None:
            break
        optimizer = within
    return optimizer


def require_training(model: Any, optimizer: Any) -> torch.optim.Optimizer:
    """Refuse what is no model or no optimizer, and an optimizer of another model.

    Returns:
        The optimizer, without wrappers around it.

    Raises:
        TypeError: one of them is something else, such as the other one; names what was got.
        ValueError: the model is not made yet, or the optimizer trains no parameter of it.
    """
    optimizer = innermost(optimizer)
    kinds: list[tuple[str, Any, type]] = [
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
    ]
    wrong = [
        f"{name} must be {'an' if name == 'optimizer' else 'a'} {kind.__name__} of torch, got {_named(value)}"
        for name, value, kind in kinds
        if not isinstance(value, kind)
    ]
    if wrong:
        swapped = isinstance(model, torch.optim.Optimizer) and isinstance(optimizer, nn.Module)
        remedy = "they are swapped: " if swapped else ""
        raise TypeError(f"{'; '.join(wrong)}: {remedy}give Recorder(model, optimizer, dir)")
    require_shapes(model)
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the optimizer trains no parameter of the model {type(model).__name__}: give the model it was made for"
        )
    trained: torch.optim.Optimizer = optimizer
    return trained


def require_options(stage: Any, also: Any, max_grad_norm: Any, **steps: Any) -> None:
    """Refuse other options of a kind that would show only when a run is read, or as an error of Python's.

    Args:
        stage: a name.
        also: things with a state.
        max_grad_norm: a number, or None.
        **steps: numbers of steps, or None, by the argument's name.

    Raises:
        TypeError: one is of another kind; names what was got, and what to give.
        ValueError: ``max_grad_norm`` is no positive number.
    """
    if not isinstance(stage, str):
        raise TypeError(f"stage must be a name, got {stage!r}: give stage={str(stage)!r}")
    if hasattr(also, "state_dict"):
        raise TypeError(f"also must be a list, got a {_named(also)}: give also=[...] around it")
    for name, numbers in steps.items():
        if numbers is not None and not isinstance(numbers, Iterable):
            raise TypeError(f"{name} must be numbers of optimizer steps, got {numbers!r}: give {name}=[{numbers!r}]")
    if max_grad_norm is not None and not finite_rate(max_grad_norm):
        raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm!r}; leave it out without clipping")


def still_trained(before: Sequence[str], now: Sequence[str], step: int) -> Sequence[str]:
    """Names of the parameters that are trained now.

    Args:
        before: those that were at the checkpoint before.
        now: those that are.
        step: optimizer steps until now.

    Warns:
        UserWarning: these are others; a stage has one set of them, which moved from its beginning to its end.
    """
    changes = [(set(before) - set(now), "frozen"), (set(now) - set(before), "unfrozen")]
    said = [f"{sorted(names)[:_NAMED]} ({len(names)}) were {what}" for names, what in changes if names]
    if said:
        warnings.warn(
            f"parameters {' and '.join(said)} since the checkpoint before step {step}: scores take all of a stage's "
            "for trained throughout; where they are frozen or unfrozen, end the stage by trajectory(), and record what "
            "follows by another Recorder",
            UserWarning,
            stacklevel=5,
        )
    return now


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
