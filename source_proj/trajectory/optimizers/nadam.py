"""NAdam: Adam with Nesterov's momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from source_proj.trajectory.optimizers.adam import AdamMoments
from source_proj.trajectory.optimizers.base import Options, Updates, keys

__all__ = ["NAdam"]


@dataclass(frozen=True)
class NAdam(AdamMoments):
    r"""NAdam, with the conventions of :class:`torch.optim.NAdam` (Dozat 2016).

    With P as in :class:`Adam`, :math:`μ_t = β_1(1 - ½·.96^{tψ})` and :math:`m_t` the mean of gradients before bias
    correction, step t is

    .. math:: θ ← θ - η P \left(\frac{1 - μ_t}{1 - \prod_{i≤t} μ_i} g_t
              + \frac{μ_{t+1}}{1 - \prod_{i≤t+1} μ_i} m_t\right)

    The weights of all gradients in the bracket add up to the step's factor, 1 but at first.

    Args:
        betas: decay rates of the two means, in [0, 1).
        momentum_decay: ψ ≥ 0.
        decoupled: AdamW's decay rather than Adam's L2.
        weight_decay: λ ≥ 0, see :class:`PreconditionedOptimizer`.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> [round(factor, 2) for factor in NAdam().step_factors(Updates([0.1] * 400, [400]))[::133]]
        [1.06, 1.0, 1.0, 1.0]
    """

    classes: ClassVar[Mapping[str, Options]] = {"torch.optim.nadam.NAdam": {}}
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr betas eps weight_decay momentum_decay decoupled_weight_decay maximize foreach capturable differentiable"
    )
    state_keys: ClassVar[frozenset[str]] = keys("step exp_avg exp_avg_sq mu_product")
    alike: ClassVar[tuple[str, ...]] = ("betas", "eps", "momentum_decay", "decoupled_weight_decay")

    momentum_decay: float = field(default=4e-3, kw_only=True)

    def step_factors(self, updates: Updates) -> list[float]:
        """What all gradients together weigh in each step."""
        beta, product, factors = self.betas[0], 1.0, []
        for t in range(1, updates.counted.stop):
            now, following = (beta * (1 - 0.5 * 0.96 ** (s * self.momentum_decay)) for s in (t, t + 1))
            product *= now
            mean = following * (1 - beta**t) / (1 - product * following)
            factors.append((1 - now) / (1 - product) + mean)
        return factors[updates.before :]

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:  # noqa: ARG003, D102
        return {
            "betas": group["betas"],
            "eps": float(group["eps"]),
            "momentum_decay": float(group["momentum_decay"]),
            "decoupled": bool(group["decoupled_weight_decay"]),
        }
