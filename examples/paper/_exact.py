"""SOURCE without a sketch, for networks of linear layers too large to hold their gradients.

A layer's gradient is s aᵀ, so inner products of gradients are sums over layers of products of inner products:
⟨g, g'⟩ = Σ_l (a_l·a'_l)(s_l·s'_l). SOURCE needs nothing else: f(H) = f(0) I + (1/n) Σ_ij g_i F_ij g_jᵀ makes of
gradients combinations of gradients. It takes the spectrum of an n x n Gram matrix, n the stage's examples times
checkpoints, and gives what a sketch of SOURCE estimates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _kronecker import Rows, rows_of
from torch import Tensor, nn

import source_proj as sp
from source_proj.attribution.spectral import decay_operator, response

__all__ = ["ExactSource"]

_ROWS = 2048  # of a Gram matrix that are made at once

Layers = Mapping[str, Rows]


@dataclass(frozen=True)
class _Segment:
    """A segment's training gradients, and the spectrum of their Gram matrix over their number: that of H, but zeros."""

    first_stage: bool
    layers: Layers
    n: int
    time: float
    decay: float
    values: Tensor
    vectors: Tensor


class ExactSource:
    """SOURCE with the empirical Fisher and mean query gradients, at some of the checkpoints.

    Args:
        model: of linear layers alone.
        task: the task.
        trajectory: the run.
        data: training set of each stage.
        queries: the queries.
        checkpoints: which of each stage's are used, ascending; time goes by between them as well.
        segments: how many each stage is cut into, each of as many checkpoints.
    """

    def __init__(
        self, model: nn.Module, task: sp.Task, trajectory: sp.Trajectory, data: Mapping[str, Any], queries: Any,
        checkpoints: Sequence[int], segments: int = 1,
    ) -> None:  # fmt: skip
        self._segments: list[_Segment] = []
        for index, stage in enumerate(trajectory.stages):
            integrals = [0.0, *stage.describe().lr_integrals]
            (whole,) = stage.describe().cut(1)
            begin = 0.0
            for group in np.array_split(np.array(checkpoints), segments):
                end = integrals[-1] if group[-1] == checkpoints[-1] else integrals[group[-1] + 1]
                layers = rows_of(model, task, [stage.checkpoints[c] for c in group], data[stage.name], training=True)
                time = whole.time * (end - begin) / integrals[-1]
                self._segments.append(_fitted(layers, time, whole.decay, first_stage=index == 0))
                begin = end
        asked = rows_of(model, task, [trajectory.stages[-1].checkpoints[c] for c in checkpoints], queries)
        count = next(iter(asked.values())).inputs.shape[1]  # Q
        self._queries = [_mean(_products(asked, segment.layers), count) for segment in self._segments]  # ∇m·a
        self._between = {
            (late, early): _products(self._segments[late].layers, self._segments[early].layers)
            for late in range(len(self._segments)) for early in range(late)
        }  # fmt: skip

    def scores(self, damping: float | None) -> np.ndarray:
        """Scores ``(Q, N)`` of the first stage's examples; in c, tr(H)/``damping`` is added to H: None for nothing."""
        inner = list(self._queries)  # of what reaches each segment's end with its gradients, (Q, C n)
        total = torch.zeros(())
        for late in range(len(self._segments) - 1, -1, -1):
            segment = self._segments[late]
            if segment.first_stage:
                ridge = 0.0 if damping is None else float(segment.values.sum()) / damping
                respond = response(segment.time, segment.decay, ridge)
                # The Gram matrix of a segment with itself is V diag(n σ) Vᵀ.
                own = (inner[late] @ segment.vectors) * respond(segment.values.double()).float() @ segment.vectors.T
                total = total - own.unflatten(1, (-1, segment.n)).mean(1) / segment.n
            kept = decay_operator(segment.time, segment.decay)
            at_zero, weights = float(kept(torch.zeros(1))), _coefficients(inner[late], segment, kept)
            for early in range(late):
                inner[early] = at_zero * inner[early] + weights @ self._between[late, early]
        scores: np.ndarray = total.numpy()
        return scores


def _fitted(layers: Layers, time: float, decay: float, *, first_stage: bool) -> _Segment:
    first = next(iter(layers.values())).inputs
    gram = _products(layers, layers).div_(first.shape[0] * first.shape[1])
    # Eigenvalues are right to float32 rounding of the largest one, which damping and finite time hide.
    values, vectors = torch.linalg.eigh(gram)
    return _Segment(first_stage, layers, first.shape[1], time, decay, values.clamp_(min=0), vectors)


def _coefficients(inner: Tensor, segment: _Segment, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Z with f(H) q = f(0) q + Z a, for the inner products of q with the segment's gradients a."""
    sigma = segment.values.double()
    at_zero = function(torch.zeros(1, dtype=torch.float64))
    floor = torch.finfo(torch.float32).eps * float(sigma.max())
    slope = torch.where(sigma > floor, (function(sigma) - at_zero) / sigma.clamp(min=floor), 0).float()
    return (inner @ segment.vectors) * (slope / len(sigma)) @ segment.vectors.T


def _products(left: Layers, right: Layers) -> Tensor:
    """Inner products of the gradients, checkpoints and examples flattened, ``(C n, C' n')``."""
    pairs = [(left[name], right[name]) for name in left]
    rows = pairs[0][0].inputs.flatten(0, 1).shape[0]
    found = torch.zeros(rows, pairs[0][1].inputs.flatten(0, 1).shape[0])
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        for one, other in pairs:
            inputs = one.inputs.flatten(0, 1)[part] @ other.inputs.flatten(0, 1).T
            found[part] += inputs.mul_(one.loss.flatten(0, 1)[part] @ other.loss.flatten(0, 1).T)
    return found


def _mean(products: Tensor, count: int) -> Tensor:
    """Mean over the queries' checkpoints, ``(Q, C n)``."""
    mean: Tensor = products.unflatten(0, (-1, count)).mean(0)
    return mean
