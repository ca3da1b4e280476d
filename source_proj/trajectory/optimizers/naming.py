"""Which parameter is which in an optimizer's saved state, where parameters have numbers and often no names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.trajectory.layouts import unwrapped_names
from source_proj.trajectory.optimizers.base import Optimizer

__all__ = ["grouped_names", "named_entries", "parameter_names"]

# transformers' rule of today, and that of its releases before 4.48, which knew layers by type and biases by name alone
_UNDECAYED = (
    re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"),
    re.compile(r"bias"),
)


def grouped_names(model: nn.Module, rule: int = 0) -> list[list[str]]:
    """Names of a model's trainable parameters in the two groups of transformers' Trainer: with weight decay, without.

    Biases and the parameters of norms are not decayed: those within an :class:`torch.nn.LayerNorm`, or of a name that
    says so. Within a group the order is that of ``model.named_parameters()``.

    Args:
        model: the model that was trained, its frozen parameters frozen.
        rule: 0 for transformers of today; 1 for releases before 4.48, which decayed the weights of other norms.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1, bias=False))
        >>> grouped_names(model)
        [['0.weight', '2.weight'], ['0.bias', '1.weight', '1.bias']]
    """
    inside_norm = {
        f"{prefix}{'.' if prefix else ''}{local}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for local, _ in module.named_parameters()
    }
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [name in inside_norm or bool(_UNDECAYED[rule].search(name.lower())) for name in names]
    return [[n for n, p in zip(names, plain, strict=True) if p is undecayed] for undecayed in (False, True)]


def parameter_names(
    state: Mapping[str, Any], model: nn.Module, source: str, optimizer: Optimizer | None = None
) -> list[list[str]]:
    """Parameter names of each group of a ``state_dict()``, in the group's order.

    They are the state's own ``param_names`` where it has them. Otherwise the state's groups are compared with the
    orders in which optimizers are made, all shapes that it holds with the parameters': the model's parameters, or the
    trainable ones; the groups of ``optimizer``; transformers' two groups.

    Args:
        state: ``state_dict()`` of the optimizer.
        model: the model that was trained.
        source: what an error calls the state.
        optimizer: its description, for its groups.

    Raises:
        MismatchError: numbers or shapes do not fit the model's parameters.
    """
    groups: Sequence[Mapping[str, Any]] = state["param_groups"]
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sizes = [len(group["params"]) for group in groups]
    numbers = [number for group in groups for number in group["params"]]
    misfit = ""
    for order in _orders(model, len(groups), optimizer):
        if [len(names) for names in order] != sizes:
            continue
        name_of = dict(zip(numbers, (name for names in order for name in names), strict=True))
        wrong = next((n for n, shape in _shapes(state) if n in name_of and shape != shapes[name_of[n]]), None)
        if wrong is None:
            return [list(names) for names in order]
        shape = dict(_shapes(state))[wrong]
        misfit = f", and its number {wrong} has shape {shape} where {name_of[wrong]!r} has {shapes[name_of[wrong]]}"
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    raise MismatchError(
        f"{source}: the optimizer's state has groups of {sizes} parameters without names{misfit}. "
        f"{type(model).__name__} has {len(shapes)} parameters, {trainable} of which require a gradient: the "
        "optimizer's parameters are others, or in another order than the model's. Save the state of an optimizer made "
        "from model.named_parameters(), which names them, or give optimizer= with groups= for all parameters in the "
        "optimizer's order, or the model that was trained, with the same parameters frozen"
    )


def named_entries(
    state: Mapping[str, Any], model: nn.Module, source: str, optimizer: Optimizer | None = None
) -> dict[str, Mapping[str, Any]]:
    """Entries of a ``state_dict()`` by parameter name; see `parameter_names`."""
    entries: Mapping[Any, Mapping[str, Any]] = state["state"]
    own = [name for name, _ in model.named_parameters()]
    if entries and all(isinstance(key, str) for key in entries):
        return unwrapped_names(entries, own)
    names = parameter_names(state, model, source, optimizer)
    pairs = (
        pair
        for group, its_names in zip(state["param_groups"], names, strict=True)
        for pair in zip(group["params"], its_names, strict=True)
    )
    return unwrapped_names({name: entries[number] for number, name in pairs if number in entries}, own)


def _orders(model: nn.Module, count: int, optimizer: Optimizer | None) -> Iterator[Sequence[Sequence[str]]]:
    parameters = dict(model.named_parameters())
    for names in (list(parameters), [name for name, p in parameters.items() if p.requires_grad]):
        if count == 1:
            yield [names]
        elif optimizer is not None:
            yield _matched_groups(optimizer, names)
    if count == 2:
        for rule in range(len(_UNDECAYED)):
            yield grouped_names(model, rule)


def _matched_groups(optimizer: Optimizer, names: Sequence[str]) -> list[list[str]]:
    """Names of the parameters of each described group, in the model's order."""
    holder = {name: next((g for g, group in enumerate(optimizer.groups) if group.holds(name)), None) for name in names}
    return [[name for name in names if holder[name] == g] for g in range(len(optimizer.groups))]


def _shapes(state: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Shapes that an optimizer's state tells, by parameter number."""
    for number, entry in state["state"].items():
        for key in ("exp_avg_sq", "exp_avg", "momentum_buffer", "square_avg", "sum", "exp_inf", "z"):
            if isinstance(entry.get(key), Tensor):
                yield number, tuple(entry[key].shape)
                break
