"""Schedule-free SGD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from source_proj.trajectory.optimizers.averaging import averaging_factors
from source_proj.trajectory.optimizers.base import Optimizer, Options, Updates, keys
from source_proj.trajectory.optimizers.groups import check_at_least_zero

__all__ = ["ScheduleFreeSGD"]


@dataclass(frozen=True)
class ScheduleFreeSGD(Optimizer):
    """Schedule-free SGD, with the conventions of ``schedulefree.SGDScheduleFree``; see :func:`averaging_factors`.

    Args:
        momentum: β in [0, 1].
        weight_decay: λ ≥ 0, added to the gradient.
        warmup_steps: of the optimizer's own warm-up.
        r: power of the step in an average's weight.
        weight_lr_power: power of the largest rate so far in it.
        averaged: whether the checkpoints hold the averaged weights x, saved after ``optimizer.eval()``; else those that
            gradients are taken at, which the model has while it is trained.

    Raises:
        ValueError: a value is out of its range.
    """

    classes: ClassVar[Mapping[str, Options]] = {"schedulefree.sgd_schedulefree.SGDScheduleFree": {}}
    trainer_names: ClassVar[tuple[str, ...]] = ("schedule_free_sgd",)
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr momentum weight_decay warmup_steps r weight_lr_power train_mode k weight_sum lr_max scheduled_lr foreach"
    )
    state_keys: ClassVar[frozenset[str]] = keys("z")
    alike: ClassVar[tuple[str, ...]] = (
        "lr", "momentum", "weight_decay", "warmup_steps", "r", "weight_lr_power", "train_mode",
    )  # fmt: skip

    momentum: float = 0.9
    weight_decay: float = field(default=0.0, kw_only=True)
    warmup_steps: int = field(default=0, kw_only=True)
    r: float = field(default=0.0, kw_only=True)
    weight_lr_power: float = field(default=2.0, kw_only=True)
    averaged: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {self.momentum}")
        for name in ("weight_decay", "warmup_steps"):
            check_at_least_zero(name, getattr(self, name))

    def step_factors(self, updates: Updates) -> list[float]:
        """The share of each step that reaches the weights at the end."""
        return averaging_factors(updates, self.momentum, self.warmup_steps, self.r, self.weight_lr_power, self.averaged)

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:  # noqa: ARG003, D102
        return {
            "momentum": float(group["momentum"]),
            "warmup_steps": int(group["warmup_steps"]),
            "r": float(group["r"]),
            "weight_lr_power": float(group["weight_lr_power"]),
            "averaged": not group["train_mode"],
        }
