"""What every optimizer says of itself: its signature, its preconditioner, and how far a gradient moves the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.trajectory.layouts import unwrapped_names
from source_proj.trajectory.optimizers.groups import ParameterGroup, check_at_least_zero, is_glob

__all__ = ["Optimizer", "Options", "PreconditionedOptimizer", "Updates", "check_betas", "keys"]

Options = Mapping[str, Any]
"""A parameter group's options, in plain numbers; ``names`` are its parameters', None where they are not known."""

_GIVEN = "give optimizer= with the one that suits most parameters"
_DIGITS = 9  # of ratios of learning rates, which a schedule computes for each group
_SAME = 1e-6  # of the largest rate: learning rates that differ by less have kept their ratio


class Updates(NamedTuple):
    """The updates that were made in a stage, from its first one on; steps that were skipped are none.

    Attributes:
        rates: learning rate of each.
        checkpoints: how many of them came before each checkpoint.
        before: how many the optimizer had made before the stage.
    """

    rates: Sequence[float]
    checkpoints: Sequence[int]
    before: int = 0

    @property
    def counted(self) -> range:
        """The optimizer's own number of each update to the last checkpoint, from 1 on."""
        return range(self.before + 1, self.before + self.checkpoints[-1] + 1)

    def ended(self) -> Iterator[tuple[int, int]]:
        """The optimizer's own number of each update, and that of the update before the next checkpoint."""
        for begin, end in pairwise([0, *self.checkpoints]):
            for t in range(begin + 1, end + 1):
                yield self.before + t, self.before + end


def check_betas(betas: Sequence[float]) -> tuple[float, ...]:
    """Two decay rates as plain numbers.

    Raises:
        ValueError: one is outside of [0, 1).
    """
    plain = tuple(float(beta) for beta in betas)
    if len(plain) != 2 or not all(0 <= beta < 1 for beta in plain):
        raise ValueError(f"betas must be two numbers in [0, 1), got {plain}")
    return plain


def keys(names: str) -> frozenset[str]:
    """Names of a signature, written in a row."""
    return frozenset(names.split())


@dataclass(frozen=True)
class Optimizer:
    """How gradients became steps. A subclass is one optimizer, known to all readers by being defined.

    A subclass is a frozen dataclass. Its class attributes are its signature: a saved state is taken for an optimizer
    only if every option of every group, and every entry of every parameter's state, is the optimizer's own.

    Attributes:
        classes: full names of the classes that act like this, each with the group options that it implies.
        trainer_names: names for it among transformers' ``TrainingArguments(optim=)``.
        group_keys: options that each of its parameter groups has.
        optional_group_keys: options that some versions of it have.
        state_keys: entries of a parameter's state.
        optional_state_keys: entries that depend on its options.
        alike: options that must be the same in all groups.
        kept: entries of a state that P is computed from.
        preconditioned: whether it has a P other than the identity.
    """

    known: ClassVar[dict[str, type[Optimizer]]] = {}

    classes: ClassVar[Mapping[str, Options]] = {}
    trainer_names: ClassVar[tuple[str, ...]] = ()
    group_keys: ClassVar[frozenset[str]] = frozenset()
    optional_group_keys: ClassVar[frozenset[str]] = frozenset()
    state_keys: ClassVar[frozenset[str]] = frozenset()
    optional_state_keys: ClassVar[frozenset[str]] = frozenset()
    alike: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()
    preconditioned: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if cls.classes:
            Optimizer.known[cls.__name__] = cls

    @property
    def weight_decay(self) -> float:
        """λ of parameters that are in no group; a field of every subclass."""
        raise NotImplementedError

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """Parameters with their own learning rate or decay."""
        return ()

    @property
    def time_factor(self) -> float:
        """What one gradient's total displacement is, in units of its learning rate times P."""
        return 1.0

    @property
    def plain_updates(self) -> int:
        """How many updates at a run's beginning are without P."""
        return 0

    @property
    def decays_with_steps(self) -> bool:
        """Whether a step's decay is multiplied by the step's factor as well."""
        return True

    def step_factors(self, updates: Updates) -> list[float] | None:  # noqa: ARG002
        """What each update moves the weights by in all, in units of its rate times P times :attr:`time_factor`.

        P is that of the checkpoint that ends the interval, where the optimizer's own P changes with the step in a way
        that is known. None stands for 1 at every update.
        """
        return None

    def group(self, name: str) -> ParameterGroup:
        """The first group that holds a parameter, decay filled in; one of its own if there is none."""
        holder = next((group for group in self.groups if group.holds(name)), ParameterGroup((name,)))
        decay = self.weight_decay if holder.weight_decay is None else holder.weight_decay
        return ParameterGroup(holder.parameters, holder.lr_scale, decay)

    def named_for(self, names: Iterable[str]) -> Self:
        """The same optimizer with its groups under the names that a model has, whichever wrapper is around either.

        Args:
            names: of all parameters of the model.
        """
        full = [name for group in self.groups for name in group.parameters if not is_glob(name)]
        placed = {old: name for name, old in unwrapped_names(dict(zip(full, full, strict=True)), names).items()}
        groups = tuple(
            replace(group, parameters=tuple(placed.get(name, name) for name in group.parameters))
            for group in self.groups
        )
        changed: dict[str, Any] = {} if groups == self.groups else {"groups": groups}
        return replace(self, **changed)

    def with_decay_divided(self, scale: float) -> Self:
        """The same optimizer with every weight decay divided by a number: that for the mean loss."""
        changed: dict[str, Any] = {"weight_decay": self.weight_decay / scale}
        if self.groups:
            changed["groups"] = tuple(
                group if group.weight_decay is None else replace(group, weight_decay=group.weight_decay / scale)
                for group in self.groups
            )
        return replace(self, **changed)

    @classmethod
    def from_groups(
        cls, groups: Sequence[Options], source: str, before: Optimizer | None = None, *, remedy: str = _GIVEN
    ) -> Self:
        """Describe the optimizer by the options of its parameter groups.

        Args:
            groups: of all groups, at one moment.
            source: what an error calls them.
            before: the same optimizer's description before; it counts for ratios of learning rates when all are 0.
            remedy: what the reader of an error can do about groups that differ.

        Raises:
            ValueError: it maximizes, goes uphill, or its groups differ in what cannot be described.
        """
        rates = [float(group.get("lr", 0.0)) for group in groups]
        if not all(_least(group) <= rate < math.inf for group, rate in zip(groups, rates, strict=True)):
            raise ValueError(f"{source} has the learning rates {rates}: each must be finite, and at least 0")
        if any(group.get("maximize") for group in groups):
            raise ValueError(f"{source} has maximize=True: minimize the negative of the loss instead")
        for key in cls.alike:
            values = [group.get(key) for group in groups]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{source}: the parameter groups have different {key}: {values}; one value for all can be "
                    f"described: {remedy}"
                )
        return cls(**cls.fields(groups[0], source), **cls._decays(groups, source, before))

    @classmethod
    def fields(cls, group: Options, source: str) -> dict[str, Any]:
        """The description's own fields, from the options of a group.

        Raises:
            ValueError: the options make it act in a way that is not described.
        """
        raise NotImplementedError

    @classmethod
    def _decays(cls, groups: Sequence[Options], source: str, before: Optimizer | None) -> dict[str, Any]:  # noqa: ARG003
        return {"weight_decay": float(groups[0]["weight_decay"])}


@dataclass(frozen=True)
class PreconditionedOptimizer(Optimizer):
    r"""An optimizer that multiplies each coordinate of the gradient by a number of its own: a diagonal matrix P.

    Weight decay is exact where it is decoupled and the same for all parameters (lr_scale included). Otherwise it is a
    diagonal Λ that no k x k matrix holds; it is replaced by its mean where gradients are,
    :math:`\bar λ = \sum_i Λ_i P_i \hat v_i / \sum_i P_i \hat v_i`, with :math:`Λ_i = λ P_i` where it is coupled.

    Args:
        weight_decay: λ ≥ 0.
        eps: ε ≥ 0.
        groups: parameters with their own learning rate or decay; the first that holds a parameter counts.
    """

    preconditioned: ClassVar[bool] = True

    weight_decay: float = field(default=0.0, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)
    groups: tuple[ParameterGroup, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        check_at_least_zero("weight_decay", self.weight_decay)
        check_at_least_zero("eps", self.eps)

    @property
    def decays_with_metric(self) -> bool:
        """Whether the decay is coupled: added to the gradient, and so multiplied by P."""
        return True

    @property
    def decays_with_steps(self) -> bool:
        """Whether the decay is coupled."""
        return self.decays_with_metric

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

    def _tensor(self, entry: Mapping[str, Any], key: str) -> Tensor:
        if key not in entry:
            raise MismatchError(
                f"the state of a parameter has {sorted(entry)}, and {type(self).__name__} needs {key!r}: "
                "describe the optimizer as it was made"
            )
        value = entry[key].detach() if isinstance(entry[key], Tensor) else torch.as_tensor(entry[key], device="cpu")
        if value.is_complex():
            raise MismatchError(f"the state of a parameter has {key!r} of complex numbers: the file was altered")
        return value.cpu().double()

    @classmethod
    def _decays(cls, groups: Sequence[Options], source: str, before: Optimizer | None) -> dict[str, Any]:
        """Weight decay of the first group, and the groups that differ from it in that or in learning rate."""
        decay = float(groups[0]["weight_decay"])
        if before is not None and not any(group["lr"] for group in groups):
            return {"weight_decay": decay, "groups": before.groups}
        differing = [
            (group, scale)
            for group, scale in zip(groups, _scales(groups, source), strict=True)
            if (scale, group["weight_decay"]) != (1.0, groups[0]["weight_decay"])
        ]
        if any(group["names"] is None for group, _ in differing):
            raise ValueError(
                f"{source}: the parameter groups have learning rates {[group['lr'] for group in groups]} and weight "
                f"decays {[group['weight_decay'] for group in groups]}; the model says which parameter is in which "
                "group: give model= or optimizer= with groups="
            )
        own = [ParameterGroup(g["names"], scale, float(g["weight_decay"])) for g, scale in differing if g["names"]]
        return {"weight_decay": decay, "groups": tuple(own)}


def _least(group: Options) -> float:
    """The learning rate from which on one counts as 0: schedules round when they add up to nothing."""
    return -_SAME * abs(float(group.get("initial_lr", 0.0)))


def _scales(groups: Sequence[Options], source: str) -> list[float]:
    """Learning rates as multiples of the first group's: those that a schedule began with, if it kept their ratios."""
    rates = [float(group["lr"]) for group in groups]
    peaks = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if peaks[0] == 0 and any(peaks):
        raise ValueError(
            f"{source}: the first parameter group has learning rate 0, and others have {peaks}: put a group that "
            "learns first"
        )
    largest = max(peaks)
    if any(abs(r * peaks[0] - rates[0] * p) > _SAME * largest**2 for r, p in zip(rates, peaks, strict=True)):
        raise ValueError(
            f"{source}: the parameter groups began with learning rates {peaks} and have {rates} now: one schedule for "
            "all groups can be described"
        )
    return [float(f"{peak / peaks[0]:.{_DIGITS}g}") if peaks[0] else 1.0 for peak in peaks]
