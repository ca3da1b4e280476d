"""How the optimizer turned gradients into steps, in the terms that unrolling needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from source_proj.trajectory.adaptive import Adam, RMSprop, checked_options

__all__ = ["SGD", "Optimizer", "optimizer_from_spec"]


@dataclass(frozen=True)
class SGD:
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

    preconditioned: ClassVar[bool] = False

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
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be finite and at least 0, got {self.weight_decay}")
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

    def with_decay_divided(self, scale: float) -> SGD:
        """The same optimizer with its weight decay divided by a number: that for the mean loss."""
        return replace(self, weight_decay=self.weight_decay / scale)

    def spec(self) -> dict[str, Any]:
        """Describe the optimizer in JSON-able terms; :meth:`from_spec` reads it back."""
        return {"name": "SGD", **asdict(self)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> SGD:
        """Rebuild the optimizer from :meth:`spec`.

        Raises:
            ValueError: the description is of another optimizer, or has unknown entries.
        """
        return cls(**checked_options(spec, "SGD", cls.__dataclass_fields__))


Optimizer = SGD | Adam | RMSprop
"""How gradients became steps."""

_KNOWN: dict[str, type[SGD] | type[Adam] | type[RMSprop]] = {"SGD": SGD, "Adam": Adam, "RMSprop": RMSprop}


def optimizer_from_spec(spec: Mapping[str, Any]) -> Optimizer:
    """Rebuild any optimizer from its ``spec()``.

    Raises:
        ValueError: it is of no known kind, or has unknown entries.
    """
    kind = _KNOWN.get(spec.get("name", ""))
    if kind is None:
        raise ValueError(f"the optimizer {spec.get('name')!r} is unknown; known are {', '.join(_KNOWN)}")
    found: Optimizer = kind.from_spec(spec)
    return found
