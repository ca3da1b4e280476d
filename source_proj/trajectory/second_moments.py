"""What an optimizer's state says of each parameter: found by name, checked against its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj._io.loading import load_tensors
from source_proj.trajectory.adaptive import Adam, RMSprop, matched_groups
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.wrappers import unwrapped_name

__all__ = ["Moments", "moments"]

_WRAPPERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states")
_Entry = Mapping[str, Any]


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


def moments(checkpoint: Checkpoint, optimizer: Adam | RMSprop, model: nn.Module) -> Iterator[tuple[str, Moments]]:
    """Read a checkpoint's optimizer state, parameter by parameter; those that it does not hold are not yielded.

    The state is what ``optimizer.state_dict()`` gave: parameters by number. They are named by its ``param_names``,
    else, in each group, by the order of the model's parameters: all of them, or those that require a gradient.

    Raises:
        MismatchError: there is no state, or it fits neither the model nor the optimizer's groups; says what can be
            done.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, entry in _by_name(checkpoint, optimizer, model).items():
        if name not in shapes or not any(key in entry for key in optimizer.moments):
            continue  # a buffer of another wrapper, or a parameter that never had a gradient
        group = optimizer.group(name)
        second = optimizer.second_moment(entry, checkpoint.step)
        if tuple(second.shape) != shapes[name]:
            raise MismatchError(
                f"{checkpoint!r}: the second moment of {name!r} has shape {tuple(second.shape)}, and the parameter "
                f"{shapes[name]}: the optimizer's parameters are in another order than the model's. Save the state "
                "of an optimizer made from model.named_parameters(), which names them, or give Adam's groups= "
                "in the optimizer's order"
            )
        scale = group.lr_scale * optimizer.preconditioner(entry, checkpoint.step)
        decay = float(group.weight_decay or 0.0)
        factor = scale if optimizer.decays_with_metric else torch.full_like(scale, group.lr_scale)
        yield name, Moments(scale, second, decay * factor)


def _by_name(checkpoint: Checkpoint, optimizer: Adam | RMSprop, model: nn.Module) -> dict[str, _Entry]:
    state = _unwrap(_load(checkpoint), repr(checkpoint))
    entries: Mapping[Any, _Entry] = state["state"]
    own = dict(model.named_parameters())
    if entries and all(isinstance(key, str) for key in entries):
        return {unwrapped_name(key, own): entry for key, entry in entries.items()}
    groups: Sequence[Mapping[str, Any]] = state["param_groups"]
    numbers = [list(group["params"]) for group in groups]
    if all("param_names" in group for group in groups):
        names = [[unwrapped_name(name, own) for name in group["param_names"]] for group in groups]
    else:
        names = _in_order([len(group) for group in numbers], optimizer, model, repr(checkpoint))
    pairs = ((n, name) for ns, its in zip(numbers, names, strict=True) for n, name in zip(ns, its, strict=True))
    return {name: entries[number] for number, name in pairs if number in entries}


def _in_order(counts: list[int], optimizer: Adam | RMSprop, model: nn.Module, source: str) -> list[list[str]]:
    """Name the parameters of each group of a state that does not, by their numbers and the model's order."""
    parameters = dict(model.named_parameters())
    candidates = [list(parameters), [name for name, p in parameters.items() if p.requires_grad]]
    for names in candidates:
        found = [names] if len(counts) == 1 else matched_groups(optimizer, names)
        if [len(group) for group in found] == counts:
            return found
    described = [len(group) for group in matched_groups(optimizer, candidates[0])]
    raise MismatchError(
        f"{source}: the optimizer's state has groups of {counts} parameters without names; the model has "
        f"{len(candidates[0])}, {len(candidates[1])} of which require a gradient, and groups= describes {described}. "
        "Save the state of an optimizer made from model.named_parameters(), which names them, or give groups= for all "
        "parameters in the optimizer's order"
    )


def _load(checkpoint: Checkpoint) -> Any:
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
    return load_tensors(Path(state), f"{checkpoint!r} needs its optimizer's state_dict() there, saved alone")


def _unwrap(state: Any, source: str) -> Mapping[str, Any]:
    if isinstance(state, Mapping):
        if {"state", "param_groups"} <= set(state) and isinstance(state["state"], Mapping):
            return state
        if len(inner := [key for key in _WRAPPERS if key in state]) == 1:
            return _unwrap(state[inner[0]], source)
    if isinstance(state, list) and len(state) == 1:  # Lightning: one entry per optimizer
        return _unwrap(state[0], source)
    found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
    raise MismatchError(f"{source}: its optimizer_state must be an optimizer's state_dict(), and has {found}")
