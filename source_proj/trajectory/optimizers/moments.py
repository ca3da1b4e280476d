"""What an optimizer's state says of each parameter at a checkpoint: found by name, checked against its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError, SourceProjError
from source_proj._io.loading import load_tensors
from source_proj.trajectory.optimizers.base import PreconditionedOptimizer
from source_proj.trajectory.optimizers.describe import check_state, is_optimizer_state, steps_of, within
from source_proj.trajectory.optimizers.naming import named_entries

__all__ = [
    "Moments",
    "holds_optimizer",
    "is_untouched",
    "moments",
    "names_parameters",
    "optimizer_state_of",
    "updates_counted",
]


class StateAtStep(Protocol):
    """What is wanted of a checkpoint."""

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""

    @property
    def optimizer_state(self) -> Mapping[str, Any] | str | Path | None:
        """The optimizer's ``state_dict()``, or a file with it."""


class Moments(NamedTuple):
    """One parameter at one checkpoint.

    Attributes:
        preconditioner: diagonal of P, the group's ``lr_scale`` included, float64; 0 where nothing moves.
        second: mean square v̂ of its gradient, float64.
        decay: the diagonal Λ that its weights decay by, per unit of Σ lr, float64.
    """

    preconditioner: Tensor
    second: Tensor
    decay: Tensor


def moments(
    checkpoint: StateAtStep, optimizer: PreconditionedOptimizer, model: nn.Module, plain: float = 0.0
) -> Iterator[tuple[str, Moments]]:
    """Read a checkpoint's optimizer state, parameter by parameter; those that it does not hold are not yielded.

    The state is what ``optimizer.state_dict()`` gave: parameters by number. They are named by its ``param_names``,
    else by the order of the model's parameters, see :func:`parameter_names`.

    Args:
        checkpoint: the weights, with the optimizer's state.
        optimizer: how gradients became steps.
        model: says which parameters there are.
        plain: share of the time since the checkpoint before that went without P; there it is the identity.

    Raises:
        MismatchError: there is no state, or it fits neither the model nor the optimizer; says what can be done.
    """
    source = repr(checkpoint)
    try:
        yield from _moments(_unwrap(_load(checkpoint), source), source, checkpoint.step, optimizer, model, plain)
    except SourceProjError as error:
        if source in str(error):
            raise
        raise MismatchError(f"{source}: {error}") from error
    except Exception as error:  # whatever stands in a foreign file where a number, a list or a tensor must be
        where = checkpoint.optimizer_state if isinstance(checkpoint.optimizer_state, str | Path) else "its dict"
        raise MismatchError(
            f"{source}: its optimizer_state ({where}) is not as an optimizer's state_dict() must be "
            f"({type(error).__name__}: {error}): save optimizer.state_dict() anew"
        ) from error


def _moments(
    state: Mapping[str, Any],
    source: str,
    step: int,
    optimizer: PreconditionedOptimizer,
    model: nn.Module,
    plain: float,
) -> Iterator[tuple[str, Moments]]:
    try:
        check_state(type(optimizer), state, f"{source}: its optimizer_state")
    except ValueError as error:
        raise MismatchError(str(error)) from error
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    own_step = steps_of(state) or step  # steps that were skipped are none of the optimizer's
    for name, entry in named_entries(state, model, source, optimizer).items():
        if name not in shapes or not any(key in entry for key in optimizer.kept):
            continue  # a buffer of another wrapper, or a parameter that never had a gradient
        group = optimizer.group(name)
        second = optimizer.second_moment(entry, own_step)
        if tuple(second.shape) != shapes[name]:
            raise MismatchError(
                f"{source}: the second moment of {name!r} has shape {tuple(second.shape)}, and the parameter "
                f"{shapes[name]}: give the model that was trained"
            )
        if not (torch.isfinite(second) & (second >= 0)).all():
            raise MismatchError(
                f"{source}: the second moment of {name!r} is a mean of squares, and holds numbers below 0 or not "
                "finite: the file was altered, or training diverged"
            )
        own = optimizer.preconditioner(entry, own_step)
        scale = group.lr_scale * torch.where(own > 0, own + plain * (1 - own), 0.0)
        decay = float(group.weight_decay or 0.0)
        factor = scale if optimizer.decays_with_metric else torch.full_like(scale, group.lr_scale)
        yield name, Moments(scale, second, decay * factor)


def names_parameters(checkpoint: StateAtStep) -> bool:
    """Whether a checkpoint's optimizer state names its parameters, so that their order does not matter.

    Raises:
        MismatchError: there is no state.
    """
    state = optimizer_state_of(checkpoint)
    by_name = all(isinstance(key, str) for key in state["state"])
    return by_name or all("param_names" in group for group in state["param_groups"])


def holds_optimizer(path: Path) -> bool:
    """Whether a file of weights that :func:`torch.save` wrote has its optimizer's state beside them."""
    if not is_zipfile(path):  # neither safetensors nor torch's former format, which could only be read whole
        return False
    try:
        return is_optimizer_state(within(load_tensors(path, "", mapped=True)))
    except SourceProjError:  # whoever reads the weights says what is wrong
        return False


def optimizer_state_of(checkpoint: StateAtStep) -> Mapping[str, Any]:
    """A checkpoint's optimizer state, of a file mapped: take options and counts of it, and let it go.

    Raises:
        MismatchError: there is none, or it is no optimizer's.
    """
    return _unwrap(_load(checkpoint, mapped=True), repr(checkpoint))


def updates_counted(checkpoint: StateAtStep) -> int:
    """How many updates the optimizer had made by its state, before the stage too.

    Where the state does not say, or cannot be read, it is 0; what is wrong with it is said where P is read.
    """
    try:
        return steps_of(optimizer_state_of(checkpoint))
    except Exception:  # whatever stands in a foreign file
        return 0


def is_untouched(checkpoint: StateAtStep) -> bool:
    """Whether a checkpoint's optimizer state says that no update was ever made."""
    try:
        entries = optimizer_state_of(checkpoint)["state"].values()
        return not any(float(entry.get("step", bool(entry))) for entry in entries)
    except Exception:  # whatever stands in a foreign file
        return False


def _load(checkpoint: StateAtStep, *, mapped: bool = False) -> Any:
    state = checkpoint.optimizer_state
    if state is None:
        raise MismatchError(
            f"{checkpoint!r} has no optimizer_state, and the preconditioner of its optimizer is read from there. Give "
            "Checkpoint(..., optimizer_state=optimizer.state_dict()) or a file with it; or record the run with "
            "Recorder, which keeps it; or, without any state, take plain gradients with preconditioner='none' (their "
            "time scale is then unknown: choose Source(time_scale=...))"
        )
    if not isinstance(state, str | Path):
        return state
    remedy = f"{checkpoint!r} needs its optimizer's state_dict() there, saved alone"
    return load_tensors(Path(state), remedy, mapped=mapped)


def _unwrap(state: Any, source: str) -> Mapping[str, Any]:
    found = within(state)
    if is_optimizer_state(found) and isinstance(found["state"], Mapping):
        return found
    content = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
    raise MismatchError(f"{source}: its optimizer_state must be an optimizer's state_dict(), and has {content}")
