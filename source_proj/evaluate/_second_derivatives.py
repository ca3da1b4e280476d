"""The second derivatives that exact unrolling is made of, held to central differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from source_proj._errors import GradientError
from source_proj.evaluate._step_gradient import StepGradient
from source_proj.evaluate._stepper import derivatives

__all__ = ["require_true_products"]

_WIDTHS = (1e-7, 1e-8, 1e-9)
"""Of central differences, beside the weights. A gradient jumps where a unit turns on; a width that holds such a kink
says nothing, and narrower ones seldom hold one."""

_SUSPECT = 1e-4  # of all products: honest models stay below 1e-6
_WRONG = 1e-2  # of those by one parameter
_ROUNDING = 1e-13  # of the gradient, divided by the width
_EXAMPLES = 32  # of a batch
_COTANGENTS = 4


def require_true_products(gradient: StepGradient, places: Sequence[int], parameters: Sequence[Tensor]) -> None:
    """Refuse a model whose gradient torch differentiates otherwise than it changes.

    With the gradient G(θ) of a batch, random cotangents c and a random v, cᵀ (∂G/∂θ) v of the backward pass is compared
    with cᵀ (G(θ + hv) − G(θ − hv)) / 2h in double precision. Where they differ for every h, each parameter is moved
    alone. Draws of torch are the same in all passes. Numbers without a gradient, as those of a padding row, are left
    out: they stand still, and torch does not tell what depends on them.

    Args:
        gradient: of the model in double precision.
        places: of the batch's examples.
        parameters: θ, in any precision.

    Raises:
        GradientError: torch's product is wrong, for the model cuts the graph, or uses an operation that torch has no
            right second derivative of; or a second pass gives another gradient.
    """
    _Differences(gradient, places[:_EXAMPLES], [p.detach().double() for p in parameters]).require_equal()


class _Differences:
    def __init__(self, gradient: StepGradient, places: Sequence[int], parameters: list[Tensor]) -> None:
        self._gradient, self._places, self._parameters = gradient, places, parameters
        self._generator = torch.Generator().manual_seed(0)
        device = parameters[0].device
        self._devices = [device] if device.type == "cuda" else []
        self._moving = [torch.ones_like(p, dtype=torch.bool) for p in parameters]

    def require_equal(self) -> None:
        here, again = self._at(self._parameters), self._at(self._parameters)
        size, change = _norm(here), _norm([a - b for a, b in zip(here, again, strict=True)])
        if change > 1e-6 * size:
            raise GradientError(
                f"a second pass with the same weights gives another gradient, by {change / size:.1e} of it: the model "
                "counts its passes or draws otherwise than by torch, and steps cannot be made again; leave that out"
            )
        self._moving = [g != 0 for g in here]
        if self._least_error(size, None) <= _SUSPECT:
            return
        for place, name in enumerate(self._gradient.names):
            error = self._least_error(size, place)
            if error > _WRONG:
                raise GradientError(
                    f"torch differentiates the gradient by {name!r} wrongly: its products are off central differences "
                    f"by {error:.1e} of their size; replace the layer that uses it (an operation with a wrong second "
                    "derivative, a detach(), a rounding or a backward pass of its own in it), or freeze it"
                )

    def _least_error(self, size: float, place: int | None) -> float:
        """What products are off by for the best of the widths; as soon as it is little, for that one."""
        least = math.inf
        for width in _WIDTHS:
            least = min(least, self._error(width, size, place))
            if least <= _SUSPECT:
                break
        return least

    def _error(self, width: float, size: float, place: int | None) -> float:
        """What the numbers cᵀ (∂G/∂θ) v are off by, beside their size; v moves all parameters, or that at a place."""
        cotangents = self._drawn(_COTANGENTS)
        moves = [move[0] if place in (None, i) else torch.zeros_like(move[0]) for i, move in enumerate(self._drawn(1))]
        products = _numbers(self._products(cotangents), moves)
        differences = _numbers(cotangents, self._difference(moves, width))
        off, own = float((products - differences).norm()), max(float(products.norm()), float(differences.norm()))
        rounding = _ROUNDING / width * size * _norm(cotangents) / math.sqrt(max(1, sum(c.numel() for c in cotangents)))
        return off / own if rounding < off < math.inf else 0.0

    def _drawn(self, count: int) -> list[Tensor]:
        """Random moves ``(count, *shape)`` of each parameter, as large as its weights are, 0 where it stands still."""
        whole = _norm(self._parameters) / sum(p.numel() for p in self._parameters) ** 0.5 or 1.0
        return [
            torch.randn(count, *p.shape, generator=self._generator, dtype=p.dtype, device="cpu").to(p.device)
            * max(float(p.norm()) / max(1, p.numel()) ** 0.5, 1e-2 * whole)
            * moving
            for p, moving in zip(self._parameters, self._moving, strict=True)
        ]

    def _at(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        leaves = [p.detach().clone().requires_grad_() for p in parameters]
        with torch.random.fork_rng(self._devices), self._gradient.held(leaves):
            torch.manual_seed(0)
            return [g.detach() for g in self._gradient.of(self._places, leaves, None)]

    def _difference(self, moves: Sequence[Tensor], width: float) -> list[Tensor]:
        up, down = (
            self._at([p + sign * width * move for p, move in zip(self._parameters, moves, strict=True)])
            for sign in (1, -1)
        )
        return [(a - b) * own / (2 * width) for a, b, own in zip(up, down, self._moving, strict=True)]

    def _products(self, cotangents: list[Tensor]) -> list[Tensor]:
        """cᵀ ∂G/∂θ as unrolling makes it, ``(B, *shape)`` for each parameter."""
        leaves = [p.detach().clone().requires_grad_() for p in self._parameters]
        with torch.random.fork_rng(self._devices), self._gradient.held(leaves):
            torch.manual_seed(0)
            ones = torch.ones(len(self._places), dtype=torch.float64, device=leaves[0].device)
            products = derivatives(self._gradient.of(self._places, leaves, ones), leaves, cotangents)
        return [product * own for product, own in zip(products, self._moving, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def _numbers(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Inner products of B rows of all parameters with one column, ``(B,)``."""
    parts = [row.reshape(len(row), -1) @ column.reshape(-1) for row, column in zip(rows, columns, strict=True)]
    return torch.stack(parts).sum(0)
