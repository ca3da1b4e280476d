"""Adagrad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.trajectory.optimizers.base import Options, PreconditionedOptimizer, Updates, keys
from source_proj.trajectory.optimizers.groups import check_at_least_zero

__all__ = ["Adagrad"]


@dataclass(frozen=True)
class Adagrad(PreconditionedOptimizer):
    r"""Adagrad, with the conventions of :class:`torch.optim.Adagrad` (Duchi et al. 2011).

    Step t is :math:`-η P g/(1 + (t-1) δ)` with P = 1/(√S + ε) and S the sum of all squares so far. A checkpoint after T
    steps gives S there; within the steps before it S grows like t, so that P is larger by √(T/t). Weight decay is
    coupled.

    Args:
        lr_decay: δ ≥ 0.
        weight_decay: λ ≥ 0, see :class:`PreconditionedOptimizer`.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> Adagrad().step_factors(Updates([0.1] * 4, [4]))[::3]
        [2.0, 1.0]
    """

    classes: ClassVar[Mapping[str, Options]] = {"torch.optim.adagrad.Adagrad": {}}
    trainer_names: ClassVar[tuple[str, ...]] = ("adagrad",)
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr lr_decay eps weight_decay initial_accumulator_value maximize foreach differentiable fused"
    )
    state_keys: ClassVar[frozenset[str]] = keys("step sum")
    alike: ClassVar[tuple[str, ...]] = ("lr_decay", "eps", "initial_accumulator_value")
    kept: ClassVar[tuple[str, ...]] = ("step", "sum")

    lr_decay: float = 0.0
    eps: float = field(default=1e-10, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero("lr_decay", self.lr_decay)

    def step_factors(self, updates: Updates) -> list[float]:
        """√(T/t)/(1 + (t - 1) δ)."""
        return [math.sqrt(end / t) / (1 + (t - 1) * self.lr_decay) for t, end in updates.ended()]

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:
        """S over the number of steps."""
        own = float(entry.get("step", step))
        if own <= 0:
            raise MismatchError(f"a sum of squares after {own} steps: the state was taken before the first one")
        return self._tensor(entry, "sum") / own

    def preconditioner(self, entry: Mapping[str, Any], step: int) -> Tensor:  # noqa: ARG002
        """1/(√S + ε); 0 where S is 0."""
        total = self._tensor(entry, "sum")
        return torch.where(total > 0, 1 / (total.sqrt() + self.eps), 0.0)

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:
        """The description's own fields.

        Raises:
            ValueError: the sum began at another value than 0, which it cannot be told from.
        """
        if group["initial_accumulator_value"] != 0:
            raise ValueError(
                f"{source} has initial_accumulator_value={group['initial_accumulator_value']}, and how P falls from "
                "there is not described: train with 0"
            )
        return {"lr_decay": float(group["lr_decay"]), "eps": float(group["eps"])}
