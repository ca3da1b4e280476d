"""Which parameters training moved: a frozen one says nothing of what the training data did."""

from __future__ import annotations

import warnings

from torch import nn

from source_proj.trajectory.moved import held_parameters, moved_by_others, moved_by_stages, moved_parameters, points_of
from source_proj.trajectory.stages import Stage
from source_proj.trajectory.trajectory import Trajectory

__all__ = ["trained_parameters"]

_NAMED = 3  # parameters spelled out in a warning


def trained_parameters(trajectory: Trajectory, model: nn.Module) -> tuple[list[str], str]:
    """Names of the parameters that a run moved, in the model's order; and how that is known.

    They are those that the optimizer held (as a recorder, or the run's own files, say) with a learning rate, and that
    differ between checkpoints; where one of the two is not known, the other; where neither is (a single checkpoint
    given as a dict), those that require a gradient. Of an adapter's single file they are the adapter's. Of several
    stages they are those that any of them moved, each from the end of the one before.

    Args:
        trajectory: the run.
        model: a module of its architecture.

    Raises:
        MismatchError: a checkpoint does not fit the model.

    Warns:
        UserWarning: some differ between a stage's checkpoints though its optimizer does not hold them.
    """
    if len(trajectory.stages) > 1:
        for stage in trajectory.stages:
            _warn_of_others(stage, model)
        return _of_stages(trajectory, model)
    names = [name for name, _ in model.named_parameters()]
    moved = moved_parameters([one for stage in trajectory.stages for one in points_of(stage)], model)
    _warn_of_others(trajectory.stages[0], model, moved)
    held = held_parameters(trajectory.stages, model, has_one_state=moved is None)
    known = {"that the optimizer held": held, "that differ between checkpoints": moved}
    reasons = [reason for reason, found in known.items() if found]
    if reasons:
        sets = [found for found in known.values() if found]
        both = [name for name in names if all(name in found for found in sets)]
        if both:
            return both, "those " + " and ".join(reasons)
        return [name for name in names if name in sets[-1]], f"those {reasons[-1]}"
    return _trainable(model)


def _warn_of_others(stage: Stage, model: nn.Module, moved: set[str] | None = None) -> None:
    """Say which parameters are left out though they moved, as those of a second optimizer."""
    others = sorted(moved_by_others(stage, model, moved))
    if others:
        warnings.warn(
            f"parameters {others[:_NAMED]} ({len(others)}) moved in stage {stage.name!r}, and the optimizer that was "
            "recorded does not hold them: scores take them for constants. Where a second optimizer trains them, give "
            "Trajectory([Checkpoint(state, step, lr=...), ...], optimizer=the one of the two that suits most), which "
            "takes all that moved; where they follow others, as an average's, nothing is to be done",
            UserWarning,
            stacklevel=2,
        )


def _of_stages(trajectory: Trajectory, model: nn.Module) -> tuple[list[str], str]:
    """Those that any stage moved: what the first one did is not seen in the weights at its end alone."""
    by_stage = moved_by_stages(trajectory.stages, model)
    unknown = [stage.name for stage, own in zip(trajectory.stages, by_stage, strict=True) if not own]
    moved, reason = set().union(*by_stage), "those that any stage moved"
    if unknown:
        others, which = _trainable(model)
        moved, reason = moved.union(others), f"{reason} and, as nothing says what stage {unknown[0]!r} did, {which}"
    return [name for name, _ in model.named_parameters() if name in moved], reason


def _trainable(model: nn.Module) -> tuple[list[str], str]:
    """Where nothing is known of training."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trainable:
        return trainable, "those that require a gradient"
    return [name for name, _ in model.named_parameters()], "all, as none requires a gradient"
