"""Weights that an adapter leaves as they are: no checkpoint holds them, so a bank notes what tells them from others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.trajectory import Checkpoint
from source_proj.trajectory.layouts import unwrapped_names
from source_proj.trajectory.placement import placement_of

__all__ = ["BasePrint", "base_print", "require_base"]

BasePrint = Mapping[str, tuple[float, float]]
"""Of each tensor, by name: the sum of some of its numbers, with signs of their own, and the root of the mean square."""

_LOOKED_AT = 256  # numbers of each tensor, evenly spread
_UNUSED = ".original_module."  # PEFT keeps what it replaced: a classifier's random head
_ROUNDED = 2.0**-7  # of the sum's own size: rounding to bfloat16 changes it by a tenth of that


def base_print(model: nn.Module, checkpoints: Iterable[Checkpoint]) -> dict[str, tuple[float, float]]:
    """Numbers of those weights of a model that some of the checkpoints do not hold; none where each holds all.

    Nothing is said of a model that is sharded over processes, nor of weights that are quantised or not in memory.

    Args:
        model: what was trained.
        checkpoints: of its run.
    """
    told = {name: _numbers(value) for name, value in _left(model, checkpoints).items()}
    return {name: numbers for name, numbers in told.items() if all(map(math.isfinite, numbers))}


def require_base(model: nn.Module, there: BasePrint, checkpoints: Iterable[Checkpoint], where: str) -> None:
    """Compare a model's weights with what a bank notes of those that its checkpoints do not hold.

    Args:
        model: what is asked, or makes rows.
        there: as `base_print` gave it.
        checkpoints: those that are put into it.
        where: the bank.

    Raises:
        MismatchError: it has others; names the first.
    """
    left = _left(model, checkpoints) if there else {}
    known = unwrapped_names(there, left) if left else {}
    for name, value in left.items():
        if name not in known:
            continue
        (total, size), (here, other) = known[name], _numbers(value)
        spread = max(size, other) * math.sqrt(min(_LOOKED_AT, value.numel()))
        if not abs(here - total) <= _ROUNDED * spread:
            raise MismatchError(
                f"the checkpoints of {where} hold an adapter alone, and the model has another base: its {name} is not "
                f"what the bank was built with (some of its numbers, with signs, add up to {here:.6g} here and "
                f"{total:.6g} there). Give the base model that the adapter was trained on"
            )


def _left(model: nn.Module, checkpoints: Iterable[Checkpoint]) -> dict[str, Tensor]:
    """The weights, by name in order, that some of the checkpoints leave as they are, and that can be looked at."""
    if not placement_of(model).is_copied:
        return {}
    names = {name for checkpoint in checkpoints for name in checkpoint.left_to(model)}
    own = model.state_dict()
    return {name: own[name] for name in sorted(names) if _UNUSED not in f".{name}" and _is_plain(own[name])}


def _is_plain(value: Tensor) -> bool:
    """Whether it holds the numbers that it stands for, in memory: no codes of quantised ones, and nothing offloaded."""
    return type(value) is Tensor and value.is_floating_point() and not value.is_meta and value.numel() > 0


def _numbers(value: Tensor) -> tuple[float, float]:
    """The two numbers of a tensor; signs are the same for each of as many numbers."""
    flat = value.detach().reshape(-1)
    places = torch.arange(min(_LOOKED_AT, len(flat)), device=flat.device) * len(flat) // min(_LOOKED_AT, len(flat))
    numbers = flat[places].cpu().to(torch.float64).numpy()
    signs = 2.0 * np.random.Generator(np.random.Philox(len(numbers))).integers(2, size=len(numbers)) - 1
    return float(numbers @ signs), float(np.sqrt(np.mean(numbers**2)))
