"""What a Recorder is called with, refused by name before anything is opened."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["require_training"]


def require_training(model: Any, optimizer: Any) -> None:
    """Refuse what is no model or no optimizer, and an optimizer of another model.

    Raises:
        TypeError: one of them is something else, such as the other one; names what was got.
        ValueError: the optimizer trains no parameter of the model.
    """
    kinds: list[tuple[str, Any, type]] = [
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
    ]
    wrong = [
        f"{name} must be {'an' if name == 'optimizer' else 'a'} {kind.__name__} of torch, got {_named(value)}"
        for name, value, kind in kinds
        if not isinstance(value, kind)
    ]
    if wrong:
        swapped = isinstance(model, torch.optim.Optimizer) and isinstance(optimizer, nn.Module)
        remedy = "they are swapped: " if swapped else ""
        raise TypeError(f"{'; '.join(wrong)}: {remedy}give Recorder(model, optimizer, dir)")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the optimizer trains no parameter of the model {type(model).__name__}: give the model it was made for"
        )


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
