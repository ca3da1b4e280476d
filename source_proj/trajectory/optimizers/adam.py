"""Adam, AdamW and AMSGrad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.trajectory.optimizers.base import Options, PreconditionedOptimizer, check_betas, keys

__all__ = ["Adam", "AdamMoments"]


@dataclass(frozen=True)
class AdamMoments(PreconditionedOptimizer):
    """What Adam and its kin share: a mean square of the gradient, corrected for beginning at 0; and either decay."""

    kept: ClassVar[tuple[str, ...]] = ("step", "exp_avg_sq")

    betas: tuple[float, float] = (0.9, 0.999)
    decoupled: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", check_betas(self.betas))

    @property
    def decays_with_metric(self) -> bool:
        """Whether the decay is Adam's own L2."""
        return not self.decoupled

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:
        """v/(1 - β₂ᵗ) with t the state's own step, or ``step`` where it has none."""
        return self._corrected(entry, "exp_avg_sq", step)

    def _corrected(self, entry: Mapping[str, Any], key: str, step: int) -> Tensor:
        own = float(entry.get("step", step))
        if own <= 0:
            raise MismatchError(f"a second moment after {own} steps: the state was taken before the first one")
        correction: float = 1 - self.betas[1] ** own
        return self._tensor(entry, key) / correction


@dataclass(frozen=True)
class Adam(AdamMoments):
    r"""Adam and AdamW, with the conventions of :class:`torch.optim.Adam` and :class:`torch.optim.AdamW`.

    With :math:`\hat m, \hat v` the bias-corrected means of the gradient and of its square, a step is

    .. math:: θ ← θ - η λ θ - η P \hat m, \qquad P = \mathrm{diag}(1/(\sqrt{\hat v} + ε))

    (``decoupled=True``: AdamW; else Adam's own L2, λθ added to the gradient and so multiplied by P). The first moment
    is a mean: a gradient moves the weights by η P in all. SOURCE has a number for P, or works in its metric
    (:class:`Stage`, ``preconditioner``); P is read from the optimizer's state at checkpoints (:class:`Checkpoint`,
    ``optimizer_state``), and taken as constant over a segment.

    Args:
        betas: decay rates of the two means, in [0, 1).
        amsgrad: v̂ is the largest so far.
        weight_decay: λ ≥ 0, see :class:`PreconditionedOptimizer`.
        decoupled: AdamW's decay rather than Adam's L2.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay; the first that holds a parameter counts.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> import torch
        >>> from source_proj.trajectory.optimizers import ParameterGroup
        >>> adam = Adam(betas=(0.9, 0.5), eps=0.0, weight_decay=0.01, groups=[ParameterGroup("*.bias", weight_decay=0)])
        >>> adam.group("0.bias").weight_decay, adam.group("0.weight").weight_decay
        (0, 0.01)
        >>> adam.preconditioner({"exp_avg_sq": torch.tensor([2.0, 0.0])}, step=1)
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """

    classes: ClassVar[Mapping[str, Options]] = {
        "torch.optim.adam.Adam": {"decoupled_weight_decay": False},
        "torch.optim.adamw.AdamW": {"decoupled_weight_decay": True},
    }
    trainer_names: ClassVar[tuple[str, ...]] = (
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_torch_xla",
        "adamw_torch_npu_fused",
    )
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr betas eps weight_decay amsgrad maximize foreach capturable differentiable fused"
    )
    optional_group_keys: ClassVar[frozenset[str]] = keys("decoupled_weight_decay")  # from torch 2.7 on
    state_keys: ClassVar[frozenset[str]] = keys("step exp_avg exp_avg_sq")
    optional_state_keys: ClassVar[frozenset[str]] = keys("max_exp_avg_sq")
    alike: ClassVar[tuple[str, ...]] = ("betas", "eps", "amsgrad", "decoupled_weight_decay")
    kept: ClassVar[tuple[str, ...]] = ("step", "exp_avg_sq", "max_exp_avg_sq")

    amsgrad: bool = field(default=False, kw_only=True)

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:
        """v̂; AMSGrad's largest v, corrected alike."""
        return self._corrected(entry, "max_exp_avg_sq" if self.amsgrad else "exp_avg_sq", step)

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:  # noqa: D102
        decoupled = group.get("decoupled_weight_decay")
        if decoupled is None and group["weight_decay"]:
            raise ValueError(
                f"{source} does not say whether Adam or AdamW was meant, which decay weights differently: give "
                "optimizer=source_proj.Adam(weight_decay=..., decoupled=True for AdamW)"
            )
        return {
            "betas": group["betas"],
            "eps": float(group["eps"]),
            "amsgrad": bool(group["amsgrad"]),
            "decoupled": True if decoupled is None else bool(decoupled),  # without decay they are one
        }
