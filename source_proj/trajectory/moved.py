"""Which parameters a stage of training moved, by what its optimizer held and by what differs between checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.layouts import unwrapped_names
from source_proj.trajectory.optimizers import Optimizer, PreconditionedOptimizer, moments
from source_proj.trajectory.stages import Stage

__all__ = [
    "held_parameters",
    "left_alone",
    "moved_by_others",
    "moved_by_stages",
    "moved_parameters",
    "points_of",
    "weights_stamp",
]


def weights_stamp(parameters: Iterable[nn.Parameter]) -> int:
    """Another number once one of the parameters was changed in place, by whatever but ``.data``."""
    return sum(p._version for p in parameters)


def left_alone(stages: Sequence[Stage], model: nn.Module) -> list[frozenset[str]]:
    """Of each stage, the parameters that it did not move and another one did, such as a backbone frozen in fine-tuning.

    A stage of which nothing is known may have moved all. Parameters that no stage moved are none of these: whoever
    attributes through them asked for it.

    Args:
        stages: in order of training.
        model: a module of their architecture.

    Raises:
        MismatchError: a checkpoint does not fit the model.
    """
    if len(stages) == 1:
        return [frozenset()]
    names = {name for name, _ in model.named_parameters()}
    moved = [own or names for own in moved_by_stages(stages, model)]
    by_any = set().union(*moved)
    return [frozenset(by_any - own) for own in moved]


def moved_by_stages(stages: Sequence[Stage], model: nn.Module) -> list[set[str]]:
    """Parameters that each stage moved from the end of the one before; empty where that is not known."""
    begins: list[Sequence[Checkpoint]] = [(), *([stage.final or stage.checkpoints[-1]] for stage in stages[:-1])]
    return [_moved_in(stage, begin, model) for stage, begin in zip(stages, begins, strict=True)]


def _moved_in(stage: Stage, begin: Sequence[Checkpoint], model: nn.Module) -> set[str]:
    moved = moved_parameters([*begin, *points_of(stage)], model)
    known = [own for own in (held_parameters([stage], model, has_one_state=moved is None), moved) if own]
    return set.intersection(*known) if known else set()


def held_parameters(stages: Sequence[Stage], model: nn.Module, has_one_state: bool) -> set[str]:
    """Parameters that any stage's optimizer held with a learning rate; empty where that is not known."""
    own = [name for name, _ in model.named_parameters()]
    held: set[str] = set()
    for stage in stages:
        names = stage.trained
        if names is None and has_one_state:
            names = _with_moments(stage, model)
        if names is None:
            return set()
        optimizer = stage.optimizer.named_for(own)
        held |= {name for name in unwrapped_names(dict.fromkeys(names), own) if _learns(optimizer, name)}
    return held & set(own)


def moved_by_others(stage: Stage, model: nn.Module, moved: set[str] | None = None) -> set[str]:
    """Parameters that differ between a stage's checkpoints and are none of its optimizer's, where both are known.

    Args:
        stage: of training.
        model: a module of its architecture.
        moved: those that differ, where checkpoints were compared already.
    """
    held = held_parameters([stage], model, has_one_state=False)
    points = points_of(stage)
    if not held or len(held) == sum(1 for _ in model.named_parameters()) or len({p.hash() for p in points}) < 2:
        return set()  # checkpoints need not be read
    return (moved or moved_parameters(points, model) or set()) - held


def moved_parameters(checkpoints: Sequence[Checkpoint], model: nn.Module) -> set[str] | None:
    """Parameters that are not the same wherever checkpoints have them; None for a single one that is no adapter's."""
    initial, *later = _distinct(checkpoints)
    first, count = initial.parameters_of(model), sum(1 for _ in model.named_parameters())
    if not later:
        if len(first) == count:
            return None
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return set(first) & learning or set(first)  # PEFT saves frozen embeddings beside an adapter of theirs
    moved: set[str] = set()
    for checkpoint in later:
        if len(moved) == count:
            break
        for name, value in checkpoint.parameters_of(model).items():
            # What an adapter's file leaves out is compared between the others.
            if name not in moved and _differ(first.setdefault(name, value), value):
                moved.add(name)
    return moved


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether they are not the same numbers; one may have been saved rounded, as in half precision."""
    coarser = min(one, other, key=Tensor.element_size).dtype
    return not torch.equal(one.to(coarser), other.to(coarser))


def _with_moments(stage: Stage, model: nn.Module) -> list[str] | None:
    """Parameters for which the optimizer's state of the last checkpoint has a second moment: had a gradient."""
    last = stage.checkpoints[-1]
    if stage.preconditioner == "none":  # which reads no state
        return None
    if not isinstance(stage.optimizer, PreconditionedOptimizer) or last.optimizer_state is None:
        return None
    return [name for name, _ in moments(last, stage.optimizer, model)]


def _learns(optimizer: Optimizer, name: str) -> bool:
    return not isinstance(optimizer, PreconditionedOptimizer) or optimizer.group(name).lr_scale > 0


def points_of(stage: Stage) -> list[Checkpoint]:
    """All weights of a stage that are known."""
    return [*stage.checkpoints, *([stage.final] if stage.final else [])]


def _distinct(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """All checkpoints, each once: the first, the last, then the rest."""
    by_hash = {checkpoint.hash(): checkpoint for checkpoint in checkpoints}
    first, *rest = by_hash.values()
    return [first, *reversed(rest)]
