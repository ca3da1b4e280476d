"""Which optimizer it was: from a live one, a saved state, or a Trainer's argument; or refused, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from source_proj.trajectory.optimizers.base import Optimizer, Options, keys
from source_proj.trajectory.optimizers.refused import refusal

__all__ = [
    "WHILE_TRAINING",
    "check_state",
    "describe_live",
    "describe_state",
    "held_names",
    "is_optimizer_state",
    "kept_state",
    "optimizer_of_trainer",
    "plain_value",
    "read_groups",
    "recognised",
    "second_moments",
    "steps_of",
    "within",
]

# What schedulers and torch itself put into groups, and names that people give them.
_NEUTRAL = keys(
    "params param_names names initial_lr max_lr min_lr max_momentum base_momentum swa_lr lr_scale name group_name"
)
_DEEPEST = 16  # levels of dicts and lists around a state
_WRAPPERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states", "base_optimizer_state")
# Who records has nothing to describe the optimizer by; whoever reads a trainer's files has.
WHILE_TRAINING = (
    "train with one value in all groups, such as torch.optim.SGD(model.parameters(), ...), which a Trainer takes by "
    "optimizers=(optimizer, None); or record nothing, let checkpoints be saved, and read them with optimizer=, the one "
    "that suits most parameters (Trajectory.from_hf_trainer, from_lightning, or Trajectory of checkpoints)"
)
_REMEDY = (
    "give optimizer=, the one of them that comes nearest, or train with one of them; or take plain gradients with "
    "sp.SGD(), whose time scale is then unknown"
)


def read_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Read the options of a live optimizer's parameter groups at this moment, with the names of their parameters.

    Raises:
        ValueError: its class is none that is known.
    """
    implied = _known_class(optimizer)[1]
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {
            **implied,
            **{key: plain_value(value) for key, value in group.items() if key != "params"},
            "names": tuple(names[id(p)] for p in group["params"] if id(p) in names),
        }
        for group in optimizer.param_groups
    ]


def describe_live(optimizer: torch.optim.Optimizer, model: nn.Module) -> Optimizer:
    """Describe how a live optimizer acts, whatever its learning rate.

    Raises:
        ValueError: its class is none that is known, it maximizes, or its groups differ in what cannot be described.
    """
    return _known_class(optimizer)[0].from_groups(read_groups(optimizer, model), "the optimizer", remedy=WHILE_TRAINING)


def describe_state(
    state: Mapping[str, Any], source: str, names: Sequence[Sequence[str]] | None = None, assumed: Options | None = None
) -> Optimizer:
    """Say how an optimizer acted, from its ``state_dict()``.

    Groups may differ in learning rate and weight decay, unless it is SGD.

    Args:
        state: its ``state_dict()``.
        source: what an error calls the state.
        names: parameter names of each group, in its order; default: the state's own ``param_names``. Without any, all
            groups must have the same options.
        assumed: options that count where the state does not have them, such as ``decoupled_weight_decay`` before
            torch 2.7.

    Raises:
        ValueError: an optimizer, or an option, that is not known; or options that differ between groups where they
            cannot. The message names the argument to give.
    """
    kind = recognised(state, source)
    named: Sequence[Sequence[str] | None] = names or [group.get("param_names") for group in state["param_groups"]]
    groups = [
        {
            **(assumed or {}),
            **{key: plain_value(value) for key, value in group.items() if key not in ("params", "param_names")},
            "names": None if its_names is None else tuple(its_names),
        }
        for group, its_names in zip(state["param_groups"], named, strict=True)
        if group["params"]
    ]
    return kind.from_groups(groups, source)


def recognised(state: Mapping[str, Any], source: str) -> type[Optimizer]:
    """The one optimizer whose own are all options and all entries of a ``state_dict()``.

    Raises:
        ValueError: there is none.
    """
    options, entries = _signature(state)
    kinds = [kind for kind in Optimizer.known.values() if _fits(kind, options, entries)]
    if options and len(kinds) == 1:
        return kinds[0]
    raise ValueError(_unknown(options, entries, source))


def check_state(kind: type[Optimizer], state: Mapping[str, Any], source: str) -> None:
    """Refuse the state of another optimizer than the one that was named.

    Entries may be missing, and so may all options of the groups, where someone kept no more than P needs; a foreign
    one is refused.

    Raises:
        ValueError: it is of another one.
    """
    options, entries = _signature(state)
    own = kind.state_keys | kind.optional_state_keys
    if _fits(kind, [keys for keys in options if keys], []) and all(keys <= own for keys in entries):
        return
    if any(_fits(other, options, entries) for other in Optimizer.known.values()):
        raise ValueError(
            f"{source} is of {recognised(state, source).__name__}, and the trajectory's optimizer is {kind.__name__}: "
            "describe the optimizer as it was made"
        )
    raise ValueError(_unknown(options, entries, source))


def optimizer_of_trainer(name: str) -> type[Optimizer]:
    """The optimizer that transformers' ``TrainingArguments(optim=name)`` trains with.

    Raises:
        ValueError: it is none that is described.
    """
    for kind in Optimizer.known.values():
        if name in kind.trainer_names:
            return kind
    known = ", ".join(name for kind in Optimizer.known.values() for name in kind.trainer_names)
    raise ValueError(f"optim={name!r} trains with an optimizer that is not described{refusal([name], ())}: use {known}")


def held_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters that an optimizer holds and that require a gradient, in the model's order."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in held and p.requires_grad]


def second_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """What P is computed from, by parameter name, in the form of a ``state_dict()``, on the CPU.

    The number of updates is kept too where the groups count them, and no parameter's state does.
    """
    kept = _known_class(optimizer)[0].kept
    names = {id(p): name for name, p in model.named_parameters()}
    state = {
        names[id(p)]: {key: _on_cpu(entry[key]) for key in kept if key in entry}
        for p, entry in optimizer.state.items()
        if id(p) in names
    }
    counts = [{"params": [], "param_names": [], "k": group["k"]} for group in optimizer.param_groups if "k" in group]
    return {"state": state, "param_groups": counts}


def is_optimizer_state(state: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether it has the entries of an optimizer's ``state_dict()``."""
    return isinstance(state, Mapping) and {"state", "param_groups"} <= set(state)


def within(state: Any) -> Any:
    """An optimizer's ``state_dict()`` inside what scripts put around it; whatever else is given, itself."""
    for _ in range(_DEEPEST):  # a pickle may hold itself
        if is_optimizer_state(state):
            return state
        if isinstance(state, Mapping) and len(inner := [key for key in _WRAPPERS if key in state]) == 1:
            state = state[inner[0]]
        elif isinstance(state, list) and len(state) == 1:  # Lightning: one entry per optimizer
            state = state[0]
        else:
            return state
    return state


def kept_state(state: Any) -> Any:
    """Copy, from an optimizer's live state, what any P is computed from; of other tensors the shapes alone.

    All keys stay, because they are what an optimizer is recognised by. What stands around the state is left out: its
    tensors are live, too, and training goes on to change them.
    """
    state = within(state)
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return state
    wanted = {key for kind in Optimizer.known.values() for key in kind.kept}

    def copied(entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            return entry
        device = {key: "cpu" if key in wanted else "meta" for key in entry}
        return {
            key: value.detach().to(device[key], copy=True) if isinstance(value, Tensor) else value
            for key, value in entry.items()
        }

    groups = [dict(group) for group in state.get("param_groups", ())]
    return {"state": {key: copied(entry) for key, entry in state["state"].items()}, "param_groups": groups}


def steps_of(state: Mapping[str, Any]) -> int:
    """How many updates an optimizer has made by its ``state_dict()``; 0 where the state does not say.

    A parameter may have joined late, or have had no gradient now and then: the largest number counts.
    """
    entries = [entry for entry in state["state"].values() if isinstance(entry, Mapping)]
    counts = [entry["step"] for entry in entries if "step" in entry]
    return int(max([*map(float, counts), *(float(group.get("k", 0)) for group in state["param_groups"])], default=0.0))


def _known_class(optimizer: torch.optim.Optimizer) -> tuple[type[Optimizer], Options]:
    """The description of a live optimizer's very class, and the options that the class implies."""
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    for kind in Optimizer.known.values():
        if name in kind.classes:
            return kind, kind.classes[name]
    known = ", ".join(name for kind in Optimizer.known.values() for name in kind.classes)
    raise ValueError(f"known optimizers are {known}; got {name}{refusal([name], ())}: train with one of them")


def _fits(kind: type[Optimizer], options: Sequence[set[str]], entries: Sequence[set[str]]) -> bool:
    return all(kind.group_keys <= keys <= kind.group_keys | kind.optional_group_keys for keys in options) and all(
        kind.state_keys <= keys <= kind.state_keys | kind.optional_state_keys for keys in entries
    )


def _signature(state: Mapping[str, Any]) -> tuple[list[set[str]], list[set[str]]]:
    """The options of each group and the entries of each parameter's state, by name."""
    options = [set(group) - _NEUTRAL for group in state["param_groups"] if group["params"]]
    return options, [set(entry) for entry in state["state"].values() if isinstance(entry, Mapping) and entry]


def _unknown(options: Sequence[set[str]], entries: Sequence[set[str]], source: str) -> str:
    seen, kept = sorted(set().union(*options)), sorted(set().union(*entries))
    return (
        f"{source} is of an optimizer with the options {seen} and a state of {kept}{refusal((), [*seen, *kept])}; they "
        f"are not those of any that is described ({', '.join(Optimizer.known)}): {_REMEDY}"
    )


def plain_value(value: Any) -> Any:
    """A number for a tensor; a tuple of numbers for a sequence."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else tuple(value.tolist())
    if isinstance(value, list | tuple):
        return tuple(plain_value(part) for part in value)
    return value


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
