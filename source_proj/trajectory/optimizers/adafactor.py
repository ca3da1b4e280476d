"""Adafactor, as transformers' Trainer has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from source_proj.trajectory.optimizers.base import Options, PreconditionedOptimizer, Updates, keys

__all__ = ["Adafactor"]


@dataclass(frozen=True)
class Adafactor(PreconditionedOptimizer):
    r"""Adafactor with a given learning rate, with the conventions of ``transformers.Adafactor``.

    Reference: Shazeer and Stern 2018, arXiv 1804.04235. A step is :math:`-η P g` with :math:`P = 1/\sqrt{v}`; of a
    matrix v is the outer product of the means of rows R and of columns C, :math:`v = R C^T/\bar R`. With
    ``scale_parameter`` P is multiplied by the root mean square of the weights as well. What the state does not keep is
    not described: that an update of root mean square above ``clip_threshold`` is shortened to it. Averaged over steps
    the root mean square is 1, the threshold by default: where gradients' sizes vary much from batch to batch, true
    steps are shorter.

    Args:
        beta1: decay rate of a mean of the updates, not bias-corrected; None for none.
        scale_parameter: steps scale with the weights.
        smallest_scale: the least of that scale.
        weight_decay: λ ≥ 0, decoupled.
        eps: what is added to squares.
        groups: parameters with their own learning rate or decay.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> rows, columns = torch.tensor([4.0, 4.0]), torch.tensor([1.0, 0.25])
        >>> Adafactor().preconditioner({"exp_avg_sq_row": rows, "exp_avg_sq_col": columns, "RMS": 1.0}, step=1)
        tensor([[1., 2.],
                [1., 2.]], dtype=torch.float64)
    """

    classes: ClassVar[Mapping[str, Options]] = {"transformers.optimization.Adafactor": {}}
    trainer_names: ClassVar[tuple[str, ...]] = ("adafactor",)
    group_keys: ClassVar[frozenset[str]] = keys(
        "lr eps clip_threshold decay_rate beta1 weight_decay scale_parameter relative_step warmup_init"
    )
    state_keys: ClassVar[frozenset[str]] = keys("step RMS")
    optional_state_keys: ClassVar[frozenset[str]] = keys("exp_avg exp_avg_sq exp_avg_sq_row exp_avg_sq_col")
    alike: ClassVar[tuple[str, ...]] = ("eps", "beta1", "scale_parameter", "relative_step", "clip_threshold")
    kept: ClassVar[tuple[str, ...]] = ("step", "RMS", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")

    beta1: float | None = None
    scale_parameter: bool = field(default=False, kw_only=True)
    smallest_scale: float = field(default=1e-3, kw_only=True)
    eps: float = field(default=1e-30, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta1 is not None and not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1 must lie in [0, 1) or be None, got {self.beta1}")

    @property
    def decays_with_metric(self) -> bool:
        """The decay is decoupled."""
        return False

    def step_factors(self, updates: Updates) -> list[float] | None:
        """1 - β₁ᵗ, the weight of all updates in their mean."""
        if self.beta1 is None:
            return None
        return [1 - self.beta1**t for t in updates.counted]

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:  # noqa: ARG002
        """The mean square that the state stands for."""
        if "exp_avg_sq" in entry:
            return self._tensor(entry, "exp_avg_sq")
        rows, columns = self._tensor(entry, "exp_avg_sq_row"), self._tensor(entry, "exp_avg_sq_col")
        means = rows.mean(-1, keepdim=True)
        return (rows / means.where(means > 0, 1.0)).unsqueeze(-1) * columns.unsqueeze(-2)  # (…, rows, columns)

    def preconditioner(self, entry: Mapping[str, Any], step: int) -> Tensor:
        """1/√v, times the scale of the weights; 0 where there was no gradient but ε."""
        moment = self.second_moment(entry, step)
        scale = max(self.smallest_scale, float(entry["RMS"])) if self.scale_parameter else 1.0
        return torch.where(moment > 2 * self.eps, scale * moment.rsqrt(), 0.0)

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:
        """The description's own fields.

        Raises:
            ValueError: it makes its learning rate itself, or decays by it.
        """
        if group["relative_step"]:
            raise ValueError(
                f"{source} has relative_step=True and makes its learning rate itself, which no schedule says: train "
                "with relative_step=False and lr=, as the Trainer does"
            )
        if group["scale_parameter"] and group["weight_decay"]:
            raise ValueError(
                f"{source} has scale_parameter=True and weight decay, which then scales with the weights and is not "
                "described: train with one of them"
            )
        return {
            "beta1": None if group["beta1"] is None else float(group["beta1"]),
            "scale_parameter": bool(group["scale_parameter"]),
            "smallest_scale": float(group["eps"][1]),
            "eps": float(group["eps"][0]),
        }
