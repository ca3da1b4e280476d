"""RMSprop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from source_proj.trajectory.optimizers.base import Options, PreconditionedOptimizer, Updates, keys

__all__ = ["RMSprop"]


@dataclass(frozen=True)
class RMSprop(PreconditionedOptimizer):
    r"""RMSprop, with the conventions of :class:`torch.optim.RMSprop`.

    A step is :math:`θ ← θ - η b`, :math:`b ← μ b + P g`, with P = 1/(√v + ε) and v the mean square of the gradient, not
    bias-corrected; so a gradient moves the weights by :math:`η P/(1 - μ)` in all. Weight decay is coupled, as in torch;
    how it is treated, and groups: :class:`PreconditionedOptimizer`.

    Args:
        alpha: decay rate of the mean square, in [0, 1).
        momentum: μ in [0, 1).
        centered: v is the variance, the mean square less the square of the mean.
        weight_decay: λ ≥ 0.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> RMSprop(momentum=0.9).time_factor
        10.0
    """

    classes: ClassVar[Mapping[str, Options]] = {"torch.optim.rmsprop.RMSprop": {}}
    trainer_names: ClassVar[tuple[str, ...]] = ("rmsprop",)
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr alpha eps weight_decay momentum centered maximize foreach capturable differentiable"
    )
    state_keys: ClassVar[frozenset[str]] = keys("step square_avg")
    optional_state_keys: ClassVar[frozenset[str]] = keys("momentum_buffer grad_avg")
    alike: ClassVar[tuple[str, ...]] = ("alpha", "momentum", "centered", "eps")
    kept: ClassVar[tuple[str, ...]] = ("step", "square_avg", "grad_avg")

    alpha: float = 0.99
    momentum: float = field(default=0.0, kw_only=True)
    centered: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @property
    def time_factor(self) -> float:
        """1/(1 - μ)."""
        return float(f"{1 / (1 - self.momentum):.15g}")

    def step_factors(self, updates: Updates) -> list[float]:
        """√((1 - αᵀ)/(1 - αᵗ)): v begins at 0, so that the first steps, t of T, are longer than the checkpoint's."""
        return [math.sqrt((1 - self.alpha**end) / (1 - self.alpha**t)) for t, end in updates.ended()]

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:  # noqa: ARG002
        """The mean square, less the square of the mean where it is centered."""
        moment = self._tensor(entry, "square_avg")
        mean = self._tensor(entry, "grad_avg") if self.centered else torch.zeros_like(moment)
        return moment - mean.square()

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:  # noqa: ARG003, D102
        return {
            "alpha": float(group["alpha"]),
            "momentum": float(group["momentum"]),
            "centered": bool(group["centered"]),
            "eps": float(group["eps"]),
        }
