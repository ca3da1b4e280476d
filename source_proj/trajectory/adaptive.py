"""Optimizers that divide the gradient by its own size: what one of them does to a parameter, as a diagonal matrix P."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from source_proj._errors import MismatchError

__all__ = ["Adam", "ParameterGroup", "RMSprop", "checked_options"]


def checked_options(spec: Mapping[str, Any], expected: str, known: Collection[str]) -> dict[str, Any]:
    """Return the entries of an optimizer's description, less its name.

    Raises:
        ValueError: the description is of another optimizer than expected, or has entries that are not known.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name != expected:
        raise ValueError(f"expected the description of {expected}, got that of {name!r}")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown entries in the description of {expected}: {', '.join(unknown)}")
    return options


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose learning rate or weight decay is their own.

    Args:
        parameters: full names or globs (``"*.bias"``; ``*`` also matches dots).
        lr_scale: their learning rate as a multiple of the schedule's, ≥ 0; 0 for parameters that stay as they are.
        weight_decay: their λ; None for the optimizer's.

    Raises:
        ValueError: a value is out of its range, or no parameter is named.
    """

    parameters: Sequence[str]
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        names = [self.parameters] if isinstance(self.parameters, str) else self.parameters
        object.__setattr__(self, "parameters", tuple(names))
        if not self.parameters:
            raise ValueError("a parameter group needs names or globs of parameters, got none")
        _check("lr_scale", self.lr_scale)
        if self.weight_decay is not None:
            _check("weight_decay", self.weight_decay)

    def holds(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the group."""
        return any(name == pattern or fnmatchcase(name, pattern) for pattern in self.parameters)


@dataclass(frozen=True)
class _Adaptive:
    """What Adam and RMSprop share: groups, weight decay, and how they are written down."""

    preconditioned: ClassVar[bool] = True
    moments: ClassVar[tuple[str, ...]] = ()
    """Entries of a parameter's state that P is computed from."""

    weight_decay: float = field(default=0.0, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)
    groups: tuple[ParameterGroup, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        _check("weight_decay", self.weight_decay)
        _check("eps", self.eps)

    @property
    def time_factor(self) -> float:
        """What one gradient's total displacement is, in units of its learning rate times P."""
        return 1.0

    @property
    def decays_with_metric(self) -> bool:
        """Whether the decay is coupled: added to the gradient, and so multiplied by P."""
        return True

    def group(self, name: str) -> ParameterGroup:
        """The first group that holds a parameter, decay filled in; one of its own if there is none."""
        found = next((group for group in self.groups if group.holds(name)), ParameterGroup((name,)))
        decay = self.weight_decay if found.weight_decay is None else found.weight_decay
        return ParameterGroup(found.parameters, found.lr_scale, decay)

    def with_decay_divided(self, scale: float) -> Any:
        """The same optimizer with every weight decay divided by a number: that for the mean loss."""
        groups = [
            {**asdict(one), "weight_decay": None if one.weight_decay is None else one.weight_decay / scale}
            for one in self.groups
        ]
        return type(self).from_spec(
            {**self.spec(), "weight_decay": self.weight_decay / scale, "groups": groups}
        )  # fmt: skip

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:
        """The mean square of the gradient v̂ that a parameter's state holds, float64, of the parameter's shape."""
        raise NotImplementedError

    def preconditioner(self, entry: Mapping[str, Any], step: int) -> Tensor:
        r"""Diagonal of P, :math:`1/(\sqrt{\hat v} + ε)`, float64; 0 where v̂ is 0.

        Where no training gradient has ever been other than 0, P meets nothing but zeros, and its huge 1/ε would only
        blow up a query's gradient that the sketch mixes into other columns; so it counts as 0 there.
        """
        moment = self.second_moment(entry, step).clamp(min=0)
        return torch.where(moment > 0, 1 / (moment.sqrt() + self.eps), 0.0)

    def _entry(self, entry: Mapping[str, Any], key: str) -> Tensor:
        if key not in entry:
            raise MismatchError(
                f"the state of a parameter has {sorted(entry)}, and {type(self).__name__} needs {key!r}: "
                "describe the optimizer as it was made"
            )
        return torch.as_tensor(entry[key]).detach().cpu().double()

    def spec(self) -> dict[str, Any]:
        """Describe the optimizer in JSON-able terms; :meth:`from_spec` reads it back."""
        return {"name": type(self).__name__, **asdict(self)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Any:
        """Rebuild the optimizer from :meth:`spec`.

        Raises:
            ValueError: the description is of another optimizer, or has unknown entries.
        """
        options = checked_options(spec, cls.__name__, cls.__dataclass_fields__)
        groups = tuple(ParameterGroup(**{**one, "parameters": tuple(one["parameters"])}) for one in options["groups"])
        betas = {"betas": tuple(options["betas"])} if "betas" in options else {}
        return cls(**{**options, **betas, "groups": groups})


@dataclass(frozen=True)
class Adam(_Adaptive):
    r"""Adam and AdamW, with the conventions of :class:`torch.optim.Adam` and :class:`torch.optim.AdamW`.

    With :math:`\hat m, \hat v` the bias-corrected means of the gradient and of its square, a step is

    .. math:: θ ← θ - η λ θ - η P \hat m, \qquad P = \mathrm{diag}(1/(\sqrt{\hat v} + ε))

    (``decoupled=True``: AdamW; else Adam's own L2, λθ added to the gradient and so multiplied by P). The first moment
    is a mean: a gradient moves the weights by η P in all. SOURCE has a number for P, or works in its metric
    (:class:`Stage`, ``metric``); P is read from the optimizer's state at checkpoints (:class:`Checkpoint`,
    ``optimizer_state``), and taken as constant over a segment.

    Weight decay is exact where it is decoupled and the same for all parameters (lr_scale included). Otherwise it is a
    diagonal Λ that no k x k matrix holds; it is replaced by its mean where gradients are,
    :math:`\bar λ = \sum_i Λ_i P_i \hat v_i / \sum_i P_i \hat v_i`, with :math:`Λ_i = λ P_i` where it is coupled.

    Args:
        betas: decay rates of the two means, in [0, 1).
        amsgrad: v̂ is the largest so far.
        weight_decay: λ ≥ 0.
        decoupled: AdamW's decay rather than Adam's L2.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay; the first that holds a parameter counts.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> adam = Adam(betas=(0.9, 0.5), eps=0.0, weight_decay=0.01, groups=[ParameterGroup("*.bias", weight_decay=0)])
        >>> adam.group("0.bias").weight_decay, adam.group("0.weight").weight_decay
        (0, 0.01)
        >>> adam.preconditioner({"exp_avg_sq": torch.tensor([2.0, 0.0])}, step=1)
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """

    betas: tuple[float, float] = (0.9, 0.999)
    decoupled: bool = field(default=True, kw_only=True)
    amsgrad: bool = field(default=False, kw_only=True)

    moments: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")

    @property
    def decays_with_metric(self) -> bool:
        """Whether the decay is Adam's own L2."""
        return not self.decoupled

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:
        """v/(1 - β₂ᵗ) with t the state's own step, or ``step`` where it has none; AMSGrad's largest v."""
        own = float(entry.get("step", step))
        if own <= 0:
            raise MismatchError(f"a second moment after {own} steps: the state was taken before the first one")
        correction: float = 1 - self.betas[1] ** own
        return self._entry(entry, "max_exp_avg_sq" if self.amsgrad else "exp_avg_sq") / correction


@dataclass(frozen=True)
class RMSprop(_Adaptive):
    r"""RMSprop, with the conventions of :class:`torch.optim.RMSprop`.

    A step is :math:`θ ← θ - η b`, :math:`b ← μ b + P g`, with P = 1/(√v + ε) and v the mean square of the gradient, not
    bias-corrected; so a gradient moves the weights by :math:`η P/(1 - μ)` in all. Weight decay is coupled, as in torch;
    how it is treated, and groups: :class:`Adam`.

    Args:
        alpha: decay rate of the mean square, in [0, 1).
        momentum: μ in [0, 1).
        centered: v is the variance, the mean square less the square of the mean.
        weight_decay: λ ≥ 0.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> RMSprop(momentum=0.9).time_factor
        10.0
    """

    alpha: float = 0.99
    momentum: float = field(default=0.0, kw_only=True)
    centered: bool = field(default=False, kw_only=True)

    moments: ClassVar[tuple[str, ...]] = ("square_avg",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @property
    def time_factor(self) -> float:
        """1/(1 - μ)."""
        return float(f"{1 / (1 - self.momentum):.15g}")

    def second_moment(self, entry: Mapping[str, Any], step: int) -> Tensor:  # noqa: ARG002
        """The mean square, less the square of the mean where it is centered."""
        moment = self._entry(entry, "square_avg")
        mean = self._entry(entry, "grad_avg") if self.centered else torch.zeros_like(moment)
        return moment - mean.square()


def _check(name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def matched_groups(optimizer: _Adaptive, names: Sequence[str]) -> list[list[str]]:
    """Names of the parameters of each group, in the model's order."""
    found = {name: next((g for g, group in enumerate(optimizer.groups) if group.holds(name)), None) for name in names}
    return [[name for name in names if found[name] == g] for g in range(len(optimizer.groups))]
