"""Parameter groups: parameters with a learning rate or a weight decay of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["ParameterGroup", "check_at_least_zero", "is_glob"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose learning rate or weight decay is their own.

    Args:
        parameters: full names or globs (``"*.bias"``; ``*`` also matches dots).
        lr_scale: their learning rate as a multiple of the schedule's, ≥ 0; 0 for parameters that stay as they are.
        weight_decay: their λ; None for the optimizer's.

    Raises:
        ValueError: a value is out of its range, or no parameter is named.
    """

    parameters: Sequence[str]
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        names = [self.parameters] if isinstance(self.parameters, str) else self.parameters
        object.__setattr__(self, "parameters", tuple(names))
        if not self.parameters:
            raise ValueError("a parameter group needs names or globs of parameters, got none")
        check_at_least_zero("lr_scale", self.lr_scale)
        if self.weight_decay is not None:
            check_at_least_zero("weight_decay", self.weight_decay)

    def holds(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the group."""
        return any(name == pattern or fnmatchcase(name, pattern) for pattern in self.parameters)


def is_glob(name: str) -> bool:
    """Whether a group's name stands for several."""
    return any(letter in name for letter in "*?[")


def check_at_least_zero(name: str, value: float) -> None:
    """Refuse a number that is negative or not finite."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
