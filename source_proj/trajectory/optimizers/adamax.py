"""Adamax: Adam by the largest gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from source_proj.trajectory.optimizers.base import Options, PreconditionedOptimizer, check_betas, keys

__all__ = ["Adamax"]

_ABOVE = 1 + 1e-4  # of ε, which single precision adds to |g| = 0


@dataclass(frozen=True)
class Adamax(PreconditionedOptimizer):
    r"""Adamax, with the conventions of :class:`torch.optim.Adamax` (Kingma and Ba 2015, arXiv 1412.6980).

    A step is :math:`-η P \hat m` with P = 1/u, and :math:`u ← \max(β_2 u, |g| + ε)`. Its square stands for the mean
    square of the gradient where coordinates are weighed against each other. Weight decay is coupled.

    Args:
        betas: decay rates of the mean and of the largest gradient, in [0, 1).
        weight_decay: λ ≥ 0, see :class:`PreconditionedOptimizer`.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> Adamax().preconditioner({"exp_inf": torch.tensor([0.5, 1e-8])}, step=1)
        tensor([2., 0.], dtype=torch.float64)
    """

    classes: ClassVar[Mapping[str, Options]] = {"torch.optim.adamax.Adamax": {}}
    group_keys: ClassVar[frozenset[str]] = keys("lr betas eps weight_decay maximize foreach capturable differentiable")
    state_keys: ClassVar[frozenset[str]] = keys("step exp_avg exp_inf")
    alike: ClassVar[tuple[str, ...]] = ("betas", "eps")
    kept: ClassVar[tuple[str, ...]] = ("step", "exp_inf")

    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", check_betas(self.betas))

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:  # noqa: ARG002
        """u²."""
        return self._tensor(entry, "exp_inf").square()

    def preconditioner(self, entry: Mapping[str, Any], step: int) -> Tensor:  # noqa: ARG002
        """1/u; 0 where no gradient was ever other than 0."""
        largest = self._tensor(entry, "exp_inf")
        return torch.where(largest > self.eps * _ABOVE, 1 / largest, 0.0)

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:  # noqa: ARG003, D102
        return {"betas": group["betas"], "eps": float(group["eps"])}
