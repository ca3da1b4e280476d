"""Which parameters training moved: a frozen one says nothing of what the training data did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import PreconditionedOptimizer, moments
from source_proj.trajectory.stages import Stage
from source_proj.trajectory.trajectory import Trajectory

__all__ = ["trained_parameters", "weights_stamp"]


def weights_stamp(model: nn.Module) -> int:
    """Another number once a parameter was changed in place, by whatever but ``.data``."""
    return sum(p._version for p in model.parameters())


def trained_parameters(trajectory: Trajectory, model: nn.Module) -> tuple[list[str], str]:
    """Names of the parameters that a run moved, in the model's order; and how that is known.

    They are those that the optimizer held (as a recorder, or the run's own files, say) with a learning rate, and that
    differ between checkpoints; where one of the two is not known, the other; where neither is (a single checkpoint
    given as a dict), those that require a gradient. Of an adapter's single file they are the adapter's.

    Args:
        trajectory: the run.
        model: a module of its architecture.

    Raises:
        MismatchError: a checkpoint does not fit the model.
    """
    names = [name for name, _ in model.named_parameters()]
    moved = _moved(_distinct(trajectory), model)
    held = _held(trajectory, model, has_one_state=moved is None)
    known = {"that the optimizer held": held, "that differ between checkpoints": moved}
    reasons = [reason for reason, found in known.items() if found]
    if reasons:
        sets = [found for found in known.values() if found]
        both = [name for name in names if all(name in found for found in sets)]
        if both:
            return both, "those " + " and ".join(reasons)
        return [name for name in names if name in sets[-1]], f"those {reasons[-1]}"
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return (trainable, "those that require a gradient") if trainable else (names, "all, as none requires a gradient")


def _held(trajectory: Trajectory, model: nn.Module, has_one_state: bool) -> set[str]:
    """Parameters that any stage's optimizer held with a learning rate; empty where that is not known."""
    held: set[str] = set()
    for stage in trajectory.stages:
        names = stage.trained
        if names is None and has_one_state:
            names = _with_moments(stage, model)
        if names is None:
            return set()
        held |= {name for name in names if _learns(stage, name)}
    return held & {name for name, _ in model.named_parameters()}


def _with_moments(stage: Stage, model: nn.Module) -> list[str] | None:
    """Parameters for which the optimizer's state of the last checkpoint has a second moment: had a gradient."""
    last = stage.checkpoints[-1]
    if not isinstance(stage.optimizer, PreconditionedOptimizer) or last.optimizer_state is None:
        return None
    return [name for name, _ in moments(last, stage.optimizer, model)]


def _learns(stage: Stage, name: str) -> bool:
    optimizer = stage.optimizer
    return not isinstance(optimizer, PreconditionedOptimizer) or optimizer.group(name).lr_scale > 0


def _distinct(trajectory: Trajectory) -> list[Checkpoint]:
    """All checkpoints, each once: the first, the last, then the rest."""
    every = [
        one for stage in trajectory.stages for one in (*stage.checkpoints, *([stage.final] if stage.final else []))
    ]
    by_hash = {checkpoint.hash(): checkpoint for checkpoint in every}
    first, *rest = by_hash.values()
    return [first, *reversed(rest)]


def _moved(checkpoints: Sequence[Checkpoint], model: nn.Module) -> set[str] | None:
    """Parameters that are not the same at all checkpoints; None if there is but one, and no adapter's."""
    first = checkpoints[0].parameters_of(model)
    if len(checkpoints) == 1:
        if len(first) == sum(1 for _ in model.named_parameters()):
            return None
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return set(first) & learning or set(first)  # PEFT saves frozen embeddings beside an adapter of theirs
    same: dict[str, Tensor] = dict(first)
    for checkpoint in checkpoints[1:]:
        if not same:
            break
        there = checkpoint.parameters_of(model)
        same = {name: value for name, value in same.items() if name in there and torch.equal(value, there[name])}
    return set(first) - set(same)
