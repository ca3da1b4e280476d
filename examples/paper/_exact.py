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
class _Stage:
    """A stage's training gradients, and the spectrum of their Gram matrix over n: that of H, but for zeros."""

    layers: Layers
    n: int
    time: float
    decay: float
    values: Tensor
    vectors: Tensor


class ExactSource:
    """SOURCE with one segment a stage, the empirical Fisher and mean query gradients, at some of the checkpoints.

    Args:
        model: of linear layers alone.
        task: the task.
        trajectory: the run.
        data: training set of each stage.
        queries: the queries.
        checkpoints: which of each stage's are used, negative ones from the last; time goes by between them as well.
    """

    def __init__(
        self, model: nn.Module, task: sp.Task, trajectory: sp.Trajectory, data: Mapping[str, Any], queries: Any,
        checkpoints: Sequence[int],
    ) -> None:  # fmt: skip
        self._stages = []
        for stage in trajectory.stages:
            used = [stage.checkpoints[c] for c in checkpoints]
            layers = rows_of(model, task, used, data[stage.name], training=True)
            first = next(iter(layers.values())).inputs
            gram = _products(layers, layers).div_(first.shape[0] * first.shape[1])
            # Eigenvalues are right to float32 rounding of the largest one, which damping and finite time hide.
            values, vectors = torch.linalg.eigh(gram)
            (whole,) = stage.describe().cut(1)
            self._stages.append(_Stage(layers, first.shape[1], whole.time, whole.decay, values.clamp_(min=0), vectors))
        asked = rows_of(model, task, [trajectory.stages[-1].checkpoints[c] for c in checkpoints], queries)
        self._count = next(iter(asked.values())).inputs.shape[1]  # Q
        self._queries = [_mean(_products(asked, stage.layers), self._count) for stage in self._stages]  # ∇m·a
        self._between = [
            _products(later.layers, earlier.layers)
            for earlier, later in zip(self._stages, self._stages[1:], strict=False)
        ]
        if len(self._stages) > 2:
            raise ValueError(f"two stages at most, got {len(self._stages)}")

    def scores(self, damping: float | None) -> np.ndarray:
        """Scores ``(Q, N)`` of the first stage's examples; in c, tr(H)/``damping`` is added to H: None for nothing."""
        inner = self._queries[0]  # of what reaches the first stage's end with its gradients, (Q, C N)
        if len(self._stages) == 2:
            last = self._stages[1]
            kept = decay_operator(last.time, last.decay)
            inner = float(kept(torch.zeros(1))) * inner + _coefficients(self._queries[1], last, kept) @ self._between[0]
        first = self._stages[0]
        ridge = 0.0 if damping is None else float(first.values.sum()) / damping
        respond = response(first.time, first.decay, ridge)
        # The Gram matrix of the first stage with itself is V diag(n σ) Vᵀ.
        own = (inner @ first.vectors) * respond(first.values.double()).float() @ first.vectors.T
        scores: np.ndarray = (-own.unflatten(1, (-1, first.n)).mean(1) / first.n).numpy()
        return scores


def _coefficients(inner: Tensor, stage: _Stage, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Z with f(H) q = f(0) q + Z a, for the inner products of q with the stage's gradients a."""
    sigma = stage.values.double()
    at_zero = function(torch.zeros(1, dtype=torch.float64))
    floor = torch.finfo(torch.float32).eps * float(sigma.max())
    slope = torch.where(sigma > floor, (function(sigma) - at_zero) / sigma.clamp(min=floor), 0).float()
    return (inner @ stage.vectors) * (slope / len(sigma)) @ stage.vectors.T


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
