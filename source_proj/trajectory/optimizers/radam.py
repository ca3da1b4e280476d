"""RAdam: Adam with a rectified first phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from source_proj.trajectory.optimizers.adam import AdamMoments
from source_proj.trajectory.optimizers.base import Options, Updates, keys

__all__ = ["RAdam"]

_TRACTABLE = 5.0  # length of the second moment's average above which it is used


@dataclass(frozen=True)
class RAdam(AdamMoments):
    r"""RAdam, with the conventions of :class:`torch.optim.RAdam` (Liu et al. 2020, arXiv 1908.03265).

    With :math:`ρ_∞ = 2/(1-β_2) - 1` and :math:`ρ_t = ρ_∞ - 2tβ_2^t/(1-β_2^t)`, a step is :math:`-η \hat m` while
    :math:`ρ_t ≤ 5`, and later :math:`-η r_t P \hat m`, with P as in :class:`Adam` and

    .. math:: r_t = \sqrt{\frac{(ρ_t-4)(ρ_t-2)ρ_∞}{(ρ_∞-4)(ρ_∞-2)ρ_t}}

    Args:
        betas: decay rates of the two means, in [0, 1).
        decoupled: AdamW's decay rather than Adam's L2.
        weight_decay: λ ≥ 0, see :class:`PreconditionedOptimizer`.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> RAdam().plain_updates, [round(f, 3) for f in RAdam().step_factors(Updates([0.1] * 3000, [3000]))[::1000]]
        (5, [1.0, 0.646, 0.829])
    """

    classes: ClassVar[Mapping[str, Options]] = {"torch.optim.radam.RAdam": {}}
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr betas eps weight_decay decoupled_weight_decay maximize foreach capturable differentiable"
    )
    state_keys: ClassVar[frozenset[str]] = keys("step exp_avg exp_avg_sq")
    alike: ClassVar[tuple[str, ...]] = ("betas", "eps", "decoupled_weight_decay")

    @property
    def plain_updates(self) -> int:
        """The updates of which ρ is too small."""
        t = 0
        while self._length(t + 1) <= _TRACTABLE < self._longest:
            t += 1
        return t

    def step_factors(self, updates: Updates) -> list[float]:
        """The rectification r of each step; 1 while there is none."""
        return [self._rectification(t) for t in updates.counted]

    @property
    def _longest(self) -> float:
        return 2 / (1 - self.betas[1]) - 1

    def _length(self, t: int) -> float:
        power: float = self.betas[1] ** t
        return self._longest - 2 * t * power / (1 - power)

    def _rectification(self, t: int) -> float:
        longest, length = self._longest, self._length(t)
        if length <= _TRACTABLE:
            return 1.0
        return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:
        """The description's own fields.

        Raises:
            ValueError: β₂ is so small that no step would ever be rectified.
        """
        if 2 / (1 - group["betas"][1]) - 1 <= _TRACTABLE:
            raise ValueError(f"{source}: with betas={group['betas']} RAdam never divides by its second moment: use SGD")
        return {
            "betas": group["betas"],
            "eps": float(group["eps"]),
            "decoupled": bool(group["decoupled_weight_decay"]),
        }
