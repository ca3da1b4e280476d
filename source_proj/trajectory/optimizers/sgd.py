"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from source_proj.trajectory.optimizers.base import Optimizer, Options, keys
from source_proj.trajectory.optimizers.groups import check_at_least_zero

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD(Optimizer):
    r"""Stochastic gradient descent, with the conventions of :class:`torch.optim.SGD`.

    With gradient :math:`g_t` of the loss plus ``weight_decay`` times the weights, momentum β and dampening δ,

    .. math:: b_t = β b_{t-1} + (1 - δ) g_t, \qquad θ_t = θ_{t-1} - η_t b_t

    so that one gradient moves the weights, over all later steps together, by :math:`η (1 - δ)/(1 - β)`.
    Nesterov's variant (δ = 0 there) steps along :math:`g_t + β b_t`, whose total is :math:`η/(1 - β)` as well.
    Torch leaves the very first gradient undampened; that one step is not told apart here. Gradient clipping
    is no part of this description: where it was active, the true steps were shorter.

    Args:
        momentum: β in [0, 1).
        weight_decay: λ ≥ 0, the coupled L2 coefficient.
        dampening: δ in [0, 1). As in torch, it does nothing without momentum.
        nesterov: Nesterov's momentum; as in torch, it needs momentum and no dampening.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> SGD(momentum=0.9).time_factor
        10.0
    """

    classes: ClassVar[Mapping[str, Options]] = {"torch.optim.sgd.SGD": {}}
    trainer_names: ClassVar[tuple[str, ...]] = ("sgd",)
    # Without "fused", which torch has had since 2.3, timm's SGDW has the same options.
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr momentum dampening weight_decay nesterov maximize foreach differentiable fused"
    )
    optional_state_keys: ClassVar[frozenset[str]] = keys("momentum_buffer")
    alike: ClassVar[tuple[str, ...]] = ("lr", "momentum", "weight_decay", "dampening", "nesterov")

    momentum: float = 0.0
    weight_decay: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name in ("momentum", "dampening"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"{name} must lie in [0, 1), got {value}: no gradient has a finite total step otherwise"
                )
        check_at_least_zero("weight_decay", self.weight_decay)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "Nesterov's momentum needs momentum > 0 and dampening = 0, "
                f"got momentum={self.momentum}, dampening={self.dampening}"
            )

    @property
    def time_factor(self) -> float:
        """What one gradient's total displacement is, in units of its learning rate: (1 − δ)/(1 − β)."""
        if self.momentum == 0:
            return 1.0
        # Rounded to 15 digits, so that momentum 0.9 gives 10 and not 10.000000000000002.
        return float(f"{(1 - self.dampening) / (1 - self.momentum):.15g}")

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:  # noqa: ARG003, D102
        return {
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "nesterov": bool(group["nesterov"]),
        }
