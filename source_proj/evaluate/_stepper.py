"""One step of an optimizer of torch as a function that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj.gradients import batched_products

__all__ = ["COUNTERS", "OptimizerFactory", "State", "Stepper", "derivatives", "made"]

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

COUNTERS = {"step": 0.0, "mu_product": 1.0}
"""Parts of optimizers' states that do not depend on gradients, with what they begin with."""


class State(NamedTuple):
    """What a step begins with: parameters, and the optimizer's moments of each."""

    parameters: list[Tensor]
    moments: list[dict[str, Any]]


class Stepper:
    """An optimizer of torch as a function of parameters, gradients and moments."""

    def __init__(self, optimizer: OptimizerFactory, start: list[Tensor], lr: Sequence[float] | None) -> None:
        self._parameters = [nn.Parameter(p.clone()) for p in start]
        self._optimizer, self._lr = made(optimizer, self._parameters), lr
        if "differentiable" not in self._optimizer.defaults:
            raise ValueError(
                f"{type(self._optimizer).__name__} cannot be differentiated: give an optimizer of torch.optim that "
                "takes differentiable=True, such as SGD, Adam or AdamW"
            )
        place = {id(p): i for i, p in enumerate(self._parameters)}
        self._optimizer.defaults["differentiable"] = True
        self._groups = []
        for group in self._optimizer.param_groups:
            group.update(differentiable=True, foreach=False)
            group.update({key: False for key in ("fused", "capturable") if key in group})
            self._groups.append([place[id(p)] for p in group["params"]])
            if group.get("dampening"):
                raise ValueError(f"dampening={group['dampening']} is not differentiated by torch: use dampening=0")
        missing = len(self._parameters) - len({i for group in self._groups for i in group})
        if missing:
            raise MismatchError(f"the optimizer lacks {missing} of {len(place)} parameters: freeze them in the model")

    def begin(self, start: list[Tensor]) -> State:
        """Parameters, and the moments that the optimizer begins with.

        They are made by a step at which nothing moves, and not by the first one: SGD cuts its buffer off from the first
        gradient, and Adam counts steps in float32, which would round a double run.
        """
        zeros = [torch.zeros_like(p) for p in start]
        _, found = self.step(0, State(zeros, [{} for _ in start]), zeros)
        unknown = {
            key
            for parameter, own in zip(start, found, strict=True)
            for key, value in own.items()
            if key not in COUNTERS and (not isinstance(value, Tensor) or value.shape != parameter.shape)
        }
        if unknown:
            raise ValueError(f"{type(self._optimizer).__name__} keeps {sorted(unknown)}, whose derivative is not known")
        return State(start, [{k: _first(k, v, p) for k, v in own.items()} for p, own in zip(start, found, strict=True)])

    def step(self, t: int, state: State, gradients: list[Tensor]) -> State:
        """One step; its results follow from what is given, which is left as it is."""
        optimizer = self._optimizer
        parameters = [p.clone() for p in state.parameters]
        optimizer.state.clear()
        for p, gradient, moments in zip(parameters, gradients, state.moments, strict=True):
            p.grad = gradient
            if moments:
                optimizer.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in moments.items()}
        for group, places in zip(optimizer.param_groups, self._groups, strict=True):
            group["params"] = [parameters[i] for i in places]
            if self._lr is not None:
                group["lr"] = self._lr[t]
        with _no_rate_of_zero(optimizer) as resting:
            optimizer.step()
        still = {i for group in resting for i in self._groups[group]}
        after = [state.parameters[i].clone() if i in still else p for i, p in enumerate(parameters)]
        return State(after, [dict(optimizer.state[p]) for p in parameters])

    def pull_back(
        self, t: int, state: State, gradients: list[Tensor], adjoint: list[Tensor], moments: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
        """Adjoints ``(B, *shape)`` of a step's parameters, gradients and moments, from those of its results.

        They are not finite where the step's derivative is not: a second moment whose square has vanished in the
        precision at hand has a root of infinite slope, which no number may stand for.
        """
        leaves = State(
            [p.detach().clone().requires_grad_() for p in state.parameters],
            [{k: _leaf(k, v) for k, v in own.items()} for own in state.moments],
        )
        asked = [g.clone().requires_grad_() for g in gradients]
        after = self.step(t, leaves, asked)
        outputs, cotangents = list(after.parameters), list(adjoint)
        for made, own in zip(after.moments, moments, strict=True):
            outputs += [made[k] for k in own]
            cotangents += list(own.values())
        kept = [[k for k in own if k not in COUNTERS] for own in leaves.moments]
        held = [own[k] for own, keys in zip(leaves.moments, kept, strict=True) for k in keys]
        found = derivatives(outputs, [*leaves.parameters, *asked, *held], cotangents)
        n = len(asked)
        settled = [_settled(*part) for part in zip(gradients, adjoint, moments, strict=True)]
        rest = iter(found[2 * n :])
        return (
            [_limit(d, own) for d, own in zip(found[:n], settled, strict=True)],
            [_limit(d, own) for d, own in zip(found[n : 2 * n], settled, strict=True)],
            [{k: _limit(next(rest), own) for k in keys} for keys, own in zip(kept, settled, strict=True)],
        )


@contextmanager
def _no_rate_of_zero(optimizer: torch.optim.Optimizer) -> Iterator[list[int]]:
    """Let a differentiable Adam step by another rate where its own is 0, by which it divides.

    Yields:
        The groups that it would leave where they are. Their moments, which do not depend on the rate, are right.
    """
    resting = []
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        resting = [place for place, group in enumerate(optimizer.param_groups) if float(group["lr"]) == 0]
    rates = [optimizer.param_groups[place]["lr"] for place in resting]
    for place in resting:
        optimizer.param_groups[place]["lr"] = 1.0
    try:
        yield resting
    finally:
        for place, rate in zip(resting, rates, strict=True):
            optimizer.param_groups[place]["lr"] = rate


def _settled(gradient: Tensor, adjoint: Tensor, moments: dict[str, Tensor]) -> Tensor:
    """Where a gradient is zero and what follows from it is known, ``(B, *shape)`` bool."""
    known = adjoint.isfinite()
    for moment in moments.values():
        known = known & moment.isfinite()
    return known & (gradient == 0)


def _limit(derivative: Tensor, settled: Tensor) -> Tensor:
    """A derivative ``(B, *shape)``, zero where it is 0 · ∞ at a zero gradient.

    The root of a second moment that is zero there has no slope, and its limit is zero. Any other NaN, and what is
    infinite, stays for the check of the scores: a number in its place would pass it.
    """
    return torch.where(derivative.isnan() & settled, 0.0, derivative)


def made(optimizer: Any, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of parameters.

    Raises:
        TypeError: what was given makes none.
        ValueError: it has other parameters.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        name = type(optimizer).__name__
        raise TypeError(
            f"optimizer must be a function of parameters, got a {name} that has its own: give lambda parameters: "
            f"torch.optim.{name}(parameters, …)"
        )
    result = optimizer(list(parameters)) if callable(optimizer) else optimizer
    if not isinstance(result, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a function of parameters to an optimizer of torch.optim, got {result!r}")
    known = {id(p) for p in parameters}
    foreign = sum(id(p) not in known for group in result.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"{foreign} parameters of the {type(result).__name__} are not among those that optimizer= was called with: "
            "make it from its argument, as lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    return result


def _first(key: str, value: Any, parameter: Tensor) -> Any:
    return torch.tensor(COUNTERS[key], dtype=parameter.dtype, device="cpu") if key in COUNTERS else value


def _leaf(key: str, value: Any) -> Any:
    return value if key in COUNTERS else value.detach().clone().requires_grad_()


def derivatives(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products of B cotangents at once: ``(B, *shape)`` for each input."""
    connected = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    size = len(cotangents[0])
    if not connected:
        return [x.new_zeros(size, *x.shape) for x in inputs]
    heads, given = [o for o, _ in connected], [c for _, c in connected]
    found = batched_products(heads, inputs, given)
    return [x.new_zeros(size, *x.shape) if d is None else d for d, x in zip(found, inputs, strict=True)]
