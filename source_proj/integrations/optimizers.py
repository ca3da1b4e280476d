"""An optimizer's saved state in the terms of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from source_proj.trajectory import SGD, Adam, Optimizer, ParameterGroup, RMSprop

__all__ = ["described_optimizer"]

_Group = Mapping[str, Any]


def described_optimizer(
    state: Mapping[str, Any], names: Sequence[str] | None, source: str, decoupled: bool | None = None
) -> Optimizer:
    """Say how an optimizer acted, from the options of its parameter groups.

    Groups may differ in learning rate (``initial_lr`` counts where there is a schedule) and weight decay.

    Args:
        state: its ``state_dict()``.
        names: parameter names in the order of their numbers in the state; None if they are not known, which will do
            where all groups have the same options.
        source: what an error calls the state.
        decoupled: what Adam's weight decay is where the state does not say, as of torch before 2.7.

    Raises:
        ValueError: an optimizer, or an option, that is not known; or options that differ between groups where they
            cannot. The message names the argument to give.
    """
    groups: list[_Group] = [group for group in state["param_groups"] if group["params"]]
    keys = set(groups[0])
    if any(group.get("maximize") for group in groups):
        raise ValueError(f"{source}: the optimizer maximizes: minimize the negative of the loss instead")
    if {"momentum", "nesterov"} <= keys:
        return _sgd(groups, source)
    kept = {key for entry in state["state"].values() for key in entry}
    if {"betas", "eps"} <= keys and "exp_avg_sq" in kept:
        return _adam(groups, names, source, decoupled)
    if {"alpha", "centered"} <= keys:
        _alike(groups, ("alpha", "momentum", "centered", "eps"), source)
        first = groups[0]
        return RMSprop(
            first["alpha"],
            momentum=first["momentum"],
            centered=first["centered"],
            eps=first["eps"],
            **_decays(groups, names, source),
        )
    raise ValueError(
        f"{source} is of an optimizer with the options {sorted(keys)} and a state of {sorted(kept)}, which is none of "
        "torch's SGD, Adam, AdamW, RMSprop: give optimizer=, the one of them that comes nearest"
    )


def _sgd(groups: Sequence[_Group], source: str) -> SGD:
    _alike(groups, ("lr", "momentum", "weight_decay", "dampening", "nesterov"), source)
    first = groups[0]
    return SGD(
        float(first["momentum"]), float(first["weight_decay"]), float(first["dampening"]), bool(first["nesterov"])
    )


def _adam(groups: Sequence[_Group], names: Sequence[str] | None, source: str, decoupled: bool | None) -> Adam:
    _alike(groups, ("betas", "eps", "amsgrad", "decoupled_weight_decay"), source)
    first = groups[0]
    decoupled = first.get("decoupled_weight_decay", decoupled)
    if decoupled is None:
        if any(group.get("weight_decay") for group in groups):
            raise ValueError(
                f"{source} does not say whether Adam or AdamW was meant, which decay weights differently: give "
                "optimizer=source_proj.Adam(weight_decay=..., decoupled=True for AdamW)"
            )
        decoupled = True  # without decay they are one
    return Adam(
        tuple(first["betas"]),
        eps=first["eps"],
        decoupled=decoupled,
        amsgrad=bool(first.get("amsgrad", False)),
        **_decays(groups, names, source),
    )


def _decays(groups: Sequence[_Group], names: Sequence[str] | None, source: str) -> dict[str, Any]:
    """Weight decay of the first group, and the groups that differ from it in that or in learning rate."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    decays = [float(group.get("weight_decay", 0.0)) for group in groups]
    differing = [
        (group, rate / rates[0] if rates[0] else 1.0, decay)
        for group, rate, decay in zip(groups, rates, decays, strict=True)
        if (rate, decay) != (rates[0], decays[0])
    ]
    if differing and names is None:
        raise ValueError(
            f"{source}: the parameter groups have learning rates {rates} and weight decays {decays}; the model says "
            "which parameter is in which group: give model= or optimizer= with groups="
        )
    numbers = sorted(number for group in groups for number in group["params"])
    return {
        "weight_decay": decays[0],
        "groups": tuple(
            ParameterGroup(
                tuple(names[numbers.index(number)] for number in group["params"]), lr_scale=scale, weight_decay=decay
            )
            for group, scale, decay in differing
            if names is not None
        ),
    }


def _alike(groups: Sequence[_Group], keys: Sequence[str], source: str) -> None:
    for key in keys:
        found = [group.get(key) for group in groups]
        if any(value != found[0] for value in found):
            raise ValueError(
                f"{source}: the parameter groups have different {key}, {found}, where one value for all is needed: "
                "give optimizer= with the one that suits most parameters"
            )
