"""Whether a stage is described as its optimizer's own states say: what was forgotten shows in no score.

Another optimizer is refused. Other options, rates and counts are warned of, and stand as they were described: who gives
states that were made for the purpose, or steps of their own, knows better.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from source_proj._errors import MismatchError
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import Optimizer, Options
from source_proj.trajectory.optimizers.describe import plain_value, recognised
from source_proj.trajectory.optimizers.moments import optimizer_state_of, updates_counted
from source_proj.trajectory.recording.momentum import with_momentum_of
from source_proj.trajectory.schedules import finite_rate, schedule_function
from source_proj.trajectory.stages import Stage

__all__ = ["require_described"]

_CALLER = 7  # of sp.build, whose line is named
_PRECISION = 1e-6  # of options that were kept as tensors in single precision


def require_described(stage: Stage) -> None:
    """Compare a description with the states of the stage's checkpoints, and first with the last one that has one.

    What groups do not agree on is not compared, since one value for all stands for it, nor is a state that cannot be
    read or is of no optimizer that is known: where P is read from it, its reader says what is wrong.

    Raises:
        MismatchError: the optimizer was another one; says what to give.

    Warns:
        UserWarning: it was made with other options, had another learning rate at a checkpoint than the constant one
            that is described, or made more updates than checkpoints count steps.
    """
    if stage.preconditioner == "none":
        return
    # At a stage's begin there may be the state of an optimizer that trained before it.
    own = [checkpoint for checkpoint in stage.checkpoints if checkpoint.step > stage.start_step]
    with_state = [checkpoint for checkpoint in own if checkpoint.optimizer_state is not None]
    if not with_state:
        return
    _compare_options(stage, with_state[-1])
    _compare_rates(stage, with_state)
    _compare_steps(stage)


def _compare_options(stage: Stage, last: Checkpoint) -> None:
    optimizer, momentum_changed = stage.optimizer, stage.time_factors is not None
    try:
        state = optimizer_state_of(last)
        kind = recognised(state, "the state")
        told = _told(kind, state, optimizer)
        others = told if kind is not type(optimizer) else _contradictions(told, optimizer, momentum_changed)
    except Exception:  # whatever stands in a foreign file
        return
    cycled = _cycled(state)
    if kind is type(optimizer) and cycled is not None and "momentum" in told and not momentum_changed:
        warnings.warn(
            f"{last!r}: a scheduler moved the momentum between {cycled[0]:g} and {cycled[1]:g}, says its "
            f"optimizer_state, and stage {stage.name!r} has one momentum for all steps: give each step's own, "
            "time_factors=[1 / (1 - beta) for beta in source_proj.scheduler_rates(..., momentum=True)]",
            UserWarning,
            stacklevel=_CALLER,
        )
        return
    if kind is type(optimizer) and not others:
        return
    own = {name: getattr(optimizer, name) for name in others} if kind is type(optimizer) else {}
    said = (
        f"{last!r}: its optimizer_state is of {kind.__name__}({_listed(others)}), and stage {stage.name!r} is "
        f"described by {type(optimizer).__name__}({_listed(own)}): give optimizer=source_proj.{kind.__name__}"
        f"({_listed(told)}), as it was made"
    )
    if kind is not type(optimizer):
        raise MismatchError(f"{said}; or preconditioner='none', which reads no state")
    warnings.warn(f"{said}, if that is what you mean", UserWarning, stacklevel=_CALLER)


def _cycled(state: Mapping[str, Any]) -> tuple[float, float] | None:
    """Between what a scheduler moves the momentum, as OneCycleLR does by default; None if none does."""
    for group in state["param_groups"]:
        ends = group.get("base_momentum"), group.get("max_momentum")
        if None not in ends and ends[0] != ends[1]:
            return float(ends[0]), float(ends[1])
    return None


def _compare_rates(stage: Stage, checkpoints: Sequence[Checkpoint]) -> None:
    """Warn of a constant learning rate where the states at checkpoints have several, of which it is not always one.

    A scheduler may have stepped before the last one was kept.
    """
    if stage.lr_schedule is not None:
        _compare_schedule(stage, checkpoints)
        return
    told = [(checkpoint, _rates(checkpoint)) for checkpoint in checkpoints]
    if len({tuple(rates) for _, rates in told if rates}) < 2:
        return
    for checkpoint, rates in told:
        is_next = checkpoint is stage.checkpoints[-1] and any("initial_lr" in group for group in _groups(checkpoint))
        if rates and not is_next and not any(_is_same(rate, checkpoint.lr) for rate in rates):
            warnings.warn(
                f"{checkpoint!r}: its optimizer_state has the learning rate {rates[0] if len(rates) == 1 else rates}: "
                "where it changed give lr_schedule, a function of the step or one value per optimizer step",
                UserWarning,
                stacklevel=_CALLER,
            )
            return


def _compare_schedule(stage: Stage, checkpoints: Sequence[Checkpoint]) -> None:
    """Warn of a schedule that gives, next to a checkpoint, another learning rate than its state has.

    The state has the rate of the update before it, or of the next where that was set already. What lies behind the last
    checkpoint no schedule needs to know, so that one is left out.
    """
    last = stage.checkpoints[-1].step
    rate = schedule_function("lr_schedule", stage.lr_schedule, range(stage.start_step, last), math.inf)
    for checkpoint in checkpoints:
        told, step = _rates(checkpoint), checkpoint.step
        if step == last:
            return
        scheduled = [rate(update) for update in (step - 1, step)]
        if told and not any(_is_same(own, each) for own in told for each in scheduled):
            warnings.warn(
                f"{checkpoint!r}: its optimizer_state has the learning rate {told[0] if len(told) == 1 else told}, and "
                f"lr_schedule gives {scheduled[0]:g} for the update before it and {scheduled[1]:g} for the next: it "
                "takes the number of an update, not of an epoch; source_proj.scheduler_rates replays those of torch",
                UserWarning,
                stacklevel=_CALLER,
            )
            return


def _compare_steps(stage: Stage) -> None:
    """Warn of checkpoints between which the optimizer made more updates than they count steps: these are epochs, say.

    Fewer updates than steps there may be, as some were skipped.
    """
    told = [
        (checkpoint, count)
        for checkpoint in stage.checkpoints
        if checkpoint.optimizer_state is not None and (count := updates_counted(checkpoint))
    ]
    for (first, before), (second, after) in pairwise(told):
        if after - before > second.step - first.step:
            warnings.warn(
                f"the optimizer made {after - before} updates between the checkpoints of the steps {first.step} and "
                f"{second.step} of stage {stage.name!r}, by its states: step= counts optimizer steps, and not epochs",
                UserWarning,
                stacklevel=_CALLER,
            )
            return


def _groups(checkpoint: Checkpoint) -> Sequence[Any]:
    try:
        return optimizer_state_of(checkpoint)["param_groups"] or ()
    except Exception:  # whatever stands in a foreign file
        return ()


def _rates(checkpoint: Checkpoint) -> list[float]:
    return [rate for group in _groups(checkpoint) if (rate := _rate(group)) is not None]


def _rate(group: Any) -> float | None:
    return finite_rate(group.get("lr")) if isinstance(group, Mapping) and group.get("params") else None


def _told(kind: type[Optimizer], state: Mapping[str, Any], described: Optimizer) -> dict[str, Any]:
    """Fields of a description that all groups of a state agree on, and the largest weight decay of any."""
    # Before torch 2.7 a state does not say which decay it has.
    assumed = {"decoupled_weight_decay": getattr(described, "decoupled", True)}
    groups: list[Options] = [
        {**assumed, **{key: plain_value(value) for key, value in group.items() if key not in ("params", "param_names")}}
        for group in state["param_groups"]
        if group["params"]
    ]
    first, *rest = (kind.fields(group, "the state") for group in groups)
    told = {name: value for name, value in first.items() if all(other[name] == value for other in rest)}
    decay = max(float(group["weight_decay"]) for group in groups)
    if not decay:
        told.pop("decoupled", None)  # without decay both are one
    return {**told, "weight_decay": decay}


def _contradictions(told: Mapping[str, Any], optimizer: Optimizer, momentum_changed: bool) -> dict[str, Any]:
    """What of a state's options is not as described; β₁ and a momentum that changed enter step by step."""
    own = replace(optimizer, **{name: value for name, value in told.items() if name != "weight_decay"})
    aligned = with_momentum_of(optimizer, own)
    found = {}
    for name in told:
        value = getattr(aligned if momentum_changed or name == "betas" else own, name)
        if name == "weight_decay":  # which may fall while training goes on, and is none if it was forgotten
            if told[name] and not optimizer.weight_decay and not optimizer.groups:
                found[name] = told[name]
        elif not _is_same(value, getattr(optimizer, name)):
            found[name] = getattr(own, name)  # as the state says it
    return found


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, tuple) and isinstance(other, tuple):
        return len(value) == len(other) and all(map(_is_same, value, other))
    if isinstance(value, float) and isinstance(other, float | int):
        return math.isclose(value, other, rel_tol=_PRECISION)
    return bool(value == other)


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())
