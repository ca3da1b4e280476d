"""Which parameter is which in a Trainer's ``optimizer.pt``, where parameters have numbers and no names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from source_proj._errors import MismatchError
from source_proj.integrations.trainer_folders import read_tensors

__all__ = ["NamedState", "grouped_names", "model_of", "optimizer_names"]

# transformers' rule of today, and that of its releases before 4.48, which knew layers by type and biases by name alone
_UNDECAYED = (
    re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)"),
    re.compile(r"bias"),
)


class NamedState(Mapping[str, Any]):
    """An optimizer's state in a file, read when it is asked for, with parameter names put to its numbers.

    They are where :class:`torch.optim.Optimizer` has them if it is made from named parameters: ``param_names`` in each
    of ``param_groups``.

    Args:
        file: what :func:`torch.save` wrote of ``optimizer.state_dict()``.
        names: parameter names in the order of their numbers.
    """

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self.file = file
        self.names = tuple(names)

    def __repr__(self) -> str:
        return f"NamedState({str(self.file)!r})"

    def __getitem__(self, key: str) -> Any:
        value = read_tensors(self.file)[key]
        if key != "param_groups":
            return value
        numbers = sorted(number for group in value for number in group["params"])
        return [
            {**group, "param_names": [self.names[numbers.index(number)] for number in group["params"]]}
            for group in value
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(("state", "param_groups"))

    def __len__(self) -> int:
        return 2


def grouped_names(model: nn.Module, rule: int = 0) -> list[list[str]]:
    """Names of a model's trainable parameters in the Trainer's two groups: with weight decay, and without.

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


def optimizer_names(state: Mapping[str, Any], model: nn.Module, source: str) -> list[str]:
    """Parameter names in the order of their numbers in an optimizer's state, checked against all shapes that it holds.

    One group holds the trainable parameters in the model's order; two groups are the Trainer's.

    Args:
        state: ``state_dict()`` of the optimizer.
        model: the model that was trained.
        source: what an error calls the state.

    Raises:
        MismatchError: numbers or shapes do not fit the model's parameters.
    """
    groups = state["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for names in _orders(model, len(groups)):
        if [len(group) for group in names] != sizes:
            continue
        flat = [name for group in names for name in group]
        numbers = [number for group in groups for number in group["params"]]
        if all(shape == shapes[flat[numbers.index(number)]] for number, shape in _shapes(state)):
            return [flat[numbers.index(number)] for number in sorted(numbers)]
    raise MismatchError(
        f"{source} has groups of {sizes} parameters, which are not the trainable parameters of {type(model).__name__} "
        f"in the Trainer's order ({[len(group) for group in grouped_names(model)]} with and without weight decay) nor "
        "in the model's: give the model that was trained as model=, with the same parameters frozen"
    )


def model_of(folder: Path) -> nn.Module:
    """The architecture that a checkpoint's ``config.json`` names, without memory for weights.

    Raises:
        ValueError: there is none, transformers has no such class, or it is not installed.
    """
    remedy = "give the model as model="
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} has no config.json that says which parameter has which number: {remedy}")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the order of parameters in optimizer.pt follows from the model: {remedy}, or install source-proj[hf]"
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name in config.architectures or ():
        kind = getattr(transformers, name, None)
        if kind is not None:
            with torch.device("meta"):
                model: nn.Module = kind(config)
            return model
    raise ValueError(f"transformers has no model {config.architectures} ({str(folder)!r}): {remedy}")


def _orders(model: nn.Module, groups: int) -> Iterator[Sequence[Sequence[str]]]:
    if groups == 1:
        yield [[name for name, parameter in model.named_parameters() if parameter.requires_grad]]
    elif groups == 2:
        for rule in range(len(_UNDECAYED)):
            yield grouped_names(model, rule)


def _shapes(state: Mapping[str, Any]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Shapes that an optimizer's state tells, by parameter number."""
    for number, kept in state["state"].items():
        for key in ("exp_avg_sq", "exp_avg", "momentum_buffer", "square_avg"):
            if isinstance(kept.get(key), torch.Tensor):
                yield int(number), tuple(kept[key].shape)
                break
