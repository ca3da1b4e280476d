"""Torch's optimizers while they run: how one acts, and the second moments that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from source_proj.trajectory.adaptive import Adam, ParameterGroup, RMSprop
from source_proj.trajectory.optimizer import SGD, Optimizer

__all__ = ["Options", "base_rate", "describe_options", "held_names", "moments_of", "read_options"]

Options = list[dict[str, Any]]
"""Options of each parameter group, without its parameters but with their names."""

_KEYS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("lr", "momentum", "weight_decay", "dampening", "nesterov", "maximize"),
    torch.optim.Adam: ("lr", "betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay", "maximize"),
    torch.optim.AdamW: ("lr", "betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay", "maximize"),
    torch.optim.RMSprop: ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"),
}
_OWN = ("lr", "weight_decay")  # what Adam's and RMSprop's groups may differ in
_DIGITS = 9  # of ratios of learning rates, which a schedule computes for each group
_KEPT = ("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg")


def read_options(optimizer: torch.optim.Optimizer, model: nn.Module) -> Options:
    """Read the options of an optimizer's parameter groups at this moment.

    Raises:
        ValueError: it is none of torch's SGD, Adam, AdamW and RMSprop themselves.
    """
    keys = _KEYS.get(type(optimizer))
    if keys is None:
        kind = type(optimizer).__name__
        why = ", whose factored second moments do not keep how it scaled and clipped its steps" * (kind == "Adafactor")
        raise ValueError(f"Recorder knows torch.optim's {', '.join(k.__name__ for k in _KEYS)}, got {kind}{why}")
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        # Torch before 2.7 says decoupled_weight_decay by the class alone.
        options = {key: _plain(group.get(key, decoupled)) for key in keys}
        found.append({**options, "names": tuple(names[id(p)] for p in group["params"] if id(p) in names)})
    return found


def base_rate(options: Options) -> float:
    """The learning rate that the groups' are multiples of: the first group's."""
    return float(options[0]["lr"])


def describe_options(options: Options, known: Optimizer | None = None) -> Optimizer:
    """Describe how an optimizer with these options acts, whatever its learning rate.

    Args:
        options: what `read_options` gave.
        known: the same optimizer's description before; it counts for ratios of learning rates when all are 0.

    Raises:
        ValueError: it maximizes, or its groups differ in what cannot be described.
    """
    if any(group["maximize"] for group in options):
        raise ValueError("the optimizer has maximize=True: minimize the negative of the loss instead")
    own = () if "dampening" in options[0] else _OWN
    for key in options[0]:
        found = [group[key] for group in options]
        if key not in ("names", *own) and any(value != found[0] for value in found):
            raise ValueError(
                f"the optimizer's parameter groups have different {key}: {found}; one value for all can be recorded"
            )
    first = options[0]
    if "dampening" in first:
        return SGD(first["momentum"], first["weight_decay"], first["dampening"], bool(first["nesterov"]))
    common = {"weight_decay": first["weight_decay"], "eps": first["eps"], "groups": _groups(options, known)}
    if "alpha" in first:
        return RMSprop(first["alpha"], momentum=first["momentum"], centered=bool(first["centered"]), **common)
    decoupled, amsgrad = bool(first["decoupled_weight_decay"]), bool(first["amsgrad"])
    return Adam(first["betas"], decoupled=decoupled, amsgrad=amsgrad, **common)


def held_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters that an optimizer holds and that require a gradient, in the model's order."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in held and p.requires_grad]


def moments_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Second moments by parameter name, in the form of a ``state_dict()``, on the CPU; the rest is left out."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {
        names[id(p)]: {key: _on_cpu(entry[key]) for key in _KEPT if key in entry}
        for p, entry in optimizer.state.items()
        if id(p) in names
    }
    return {"state": state, "param_groups": []}


def _groups(options: Options, known: Optimizer | None) -> tuple[ParameterGroup, ...]:
    """The groups that differ from the first in learning rate or decay."""
    if isinstance(known, Adam | RMSprop) and not any(group["lr"] for group in options):
        return known.groups
    base = base_rate(options)
    if base == 0 and any(group["lr"] for group in options):
        raise ValueError(
            f"the optimizer's first parameter group has learning rate 0, and others have {[g['lr'] for g in options]}: "
            "put a group that learns first"
        )
    scales = [float(f"{group['lr'] / base:.{_DIGITS}g}") if base else 1.0 for group in options]
    return tuple(
        ParameterGroup(group["names"], scale, group["weight_decay"])
        for group, scale in zip(options, scales, strict=True)
        if group["names"] and (scale, group["weight_decay"]) != (1.0, options[0]["weight_decay"])
    )


def _plain(value: Any) -> Any:
    """A number for a tensor; a tuple of numbers for a sequence."""
    if isinstance(value, Sequence):
        return tuple(float(one) for one in value)
    return float(value)


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
