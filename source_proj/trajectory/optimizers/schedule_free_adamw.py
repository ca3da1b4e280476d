"""Schedule-free AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from source_proj.trajectory.optimizers.adam import AdamMoments
from source_proj.trajectory.optimizers.averaging import averaging_factors
from source_proj.trajectory.optimizers.base import Options, Updates, keys

__all__ = ["ScheduleFreeAdamW"]


@dataclass(frozen=True)
class ScheduleFreeAdamW(AdamMoments):
    """Schedule-free AdamW, with the conventions of ``schedulefree.AdamWScheduleFree``; see :func:`averaging_factors`.

    P is that of :class:`Adam`. There is no first moment: β₁ is the share of the averaged weights where gradients are
    taken. The decay goes the gradient's way, but is not multiplied by P.

    Args:
        betas: β₁ in [0, 1), and the decay rate of the mean square.
        weight_decay: λ ≥ 0.
        warmup_steps: of the optimizer's own warm-up.
        r: power of the step in an average's weight.
        weight_lr_power: power of the largest rate so far in it.
        averaged: whether the checkpoints hold the averaged weights x, saved after ``optimizer.eval()``; else those that
            gradients are taken at, which the model has while it is trained.
        eps: ε ≥ 0.
        groups: parameters with their own decay.

    Raises:
        ValueError: a value is out of its range.
    """

    classes: ClassVar[Mapping[str, Options]] = {"schedulefree.adamw_schedulefree.AdamWScheduleFree": {}}
    trainer_names: ClassVar[tuple[str, ...]] = ("schedule_free_adamw",)
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr betas eps weight_decay warmup_steps r weight_lr_power train_mode k weight_sum lr_max scheduled_lr foreach"
    )
    state_keys: ClassVar[frozenset[str]] = keys("z exp_avg_sq")
    alike: ClassVar[tuple[str, ...]] = ("betas", "eps", "warmup_steps", "r", "weight_lr_power", "train_mode")

    warmup_steps: int = field(default=0, kw_only=True)
    r: float = field(default=0.0, kw_only=True)
    weight_lr_power: float = field(default=2.0, kw_only=True)
    averaged: bool = field(default=True, kw_only=True)

    @property
    def decays_with_steps(self) -> bool:
        """The decay is averaged as the gradient is."""
        return True

    def step_factors(self, updates: Updates) -> list[float]:
        """The share of each step that reaches the weights at the end."""
        return averaging_factors(updates, self.betas[0], self.warmup_steps, self.r, self.weight_lr_power, self.averaged)

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:  # noqa: ARG003, D102
        return {
            "betas": group["betas"],
            "eps": float(group["eps"]),
            "warmup_steps": int(group["warmup_steps"]),
            "r": float(group["r"]),
            "weight_lr_power": float(group["weight_lr_power"]),
            "averaged": not group["train_mode"],
        }
