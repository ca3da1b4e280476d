r"""How far a sketch's scores can be trusted, without scores that have no sketch.

Any half of the columns of R, times √2, is itself a sketch, of k/2 numbers; and the two halves err independently of each
other, as they share no column. So their scores of the same examples correlate by

    r = T / (T + V),    T the variance of the scores over examples, V that of the errors of k/2 numbers,

and as the errors of k numbers have half of V, what the whole sketch's scores correlate with those that have no sketch
(at the same damping) is, by Spearman and Brown's formula for a test made of two halves,

    √(2r / (1 + r)).

Halves are made of Ĥ, its moments and the rows that are there already: Ĥ₁ = 2 Ĥ[I, I] of the columns I, and of a sketch
that is taken as several blocks by halves of each. With fewer
factors of Ĥ than k/2 errors no longer halve where k doubles, and the estimate is too low.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from source_proj._errors import BankError
from source_proj.attribution.gram_hessian import GramHessian, gram_hessian
from source_proj.attribution.moments import decomposed
from source_proj.attribution.operands import Picked
from source_proj.attribution.source.fitted_segments import FittedSegments, SegmentBlock, walk_back
from source_proj.attribution.source.query_propagator import QueryPropagator
from source_proj.attribution.source.segments import Segment
from source_proj.attribution.spectral import DenseHessian, Hessian, Spectrum, ridge_inverse, shifted_factor
from source_proj.bank import Decay

__all__ = ["Fidelity", "estimated_fidelity"]

_EXAMPLES = 1024  # whose scores are correlated
_LEAST_EXAMPLES = 3  # two always correlate by 1 or -1
_WEAK, _GOOD = 0.7, 0.9  # correlations: where one is warned, and what the k that would do reaches
_LEAST = 0.1  # of correlations, below which an estimate says nothing of their size
_SPECTRAL = 1024  # columns up to which a half is decomposed


@dataclass(frozen=True)
class Fidelity:
    """What the scores of some queries are expected to keep of those without a sketch.

    Attributes:
        query_ids: Q ids.
        correlation: expected correlation over training examples with the scores that have no sketch, at the same
            damping, ``(Q,)`` float64; 1 for an exact sketch, 0 where a block is one number, which has no halves.
        leakage: λ ûᵀ(Ĥ + λ)⁻¹û / û² in the last segment, the share of the query outside the range of the sketched rows,
            ``(Q,)`` float64; λ is weight decay and damping.
        effective_dimension: tr Ĥ(Ĥ + λ)⁻¹ of the last segment, the mean over blocks.
        dim: k.
        size: number d of attributed parameters; an exact sketch has as many.
        blocks: how many blocks the sketch's columns were taken as.
    """

    query_ids: list[Any]
    correlation: np.ndarray
    leakage: np.ndarray
    effective_dimension: float
    dim: int
    size: int
    blocks: int = 1

    @property
    def sufficient_dim(self) -> int:
        """The k at which the median query's correlation would be .9, as errors fall with 1/k; a power of two, or d.

        It is k itself where that is reached already, the least that is known where halves hardly agree, and d where no
        projection to fewer numbers would do.
        """
        median = float(np.median(self.correlation))
        if median >= _GOOD:
            return self.dim
        ratio = (1 / max(median, _LEAST) ** 2 - 1) / (1 / _GOOD**2 - 1)
        return min(1 << math.ceil(math.log2(self.dim * ratio)), self.size)

    @property
    def warning(self) -> str | None:
        """What to say of a k that is too small; None where it isn't."""
        median = float(np.median(self.correlation))
        if median >= _WEAK:
            return None
        enough = self.sufficient_dim
        exact = ", kind='identity'" if enough == self.size else ""
        return (
            f"the sketch of {self.dim} numbers is too small for these queries: their scores correlate by about "
            f"{median:.2f} with those without a sketch at the same damping; build a bank with "
            f"Sketch(dim={enough}{exact}), or rerank"
        )

    def __repr__(self) -> str:
        low, median = float(self.correlation.min()), float(np.median(self.correlation))
        return (
            f"Fidelity({len(self.correlation)} queries: correlation with unsketched scores at the same damping about "
            f"{median:.2f}, at least {low:.2f}; "
            f"effective dimension {self.effective_dimension:.0f} of {self.dim // self.blocks}"
            f"{f' in each of {self.blocks} blocks' if self.blocks > 1 else ''}; "
            f"leakage {float(np.median(self.leakage)):.2f})"
        )


def estimated_fidelity(
    runs: Sequence[FittedSegments],
    queries: Sequence[Mapping[int, Tensor]],
    query_ids: Sequence[Any],
    apart: Tensor | None = None,
) -> Fidelity:
    """The fidelity of some queries' scores.

    Costs the factors of two halves of Ĥ for each segment, a fourth of a fit, and a read of the bank's rows.

    Args:
        runs: fitted segments, of each bank that scores are averaged over.
        queries: for each bank, the queries' sketches ``(Q, k)`` by metric.
        query_ids: Q ids.
        apart: training examples that are left out of the correlation, as they are queries.

    Raises:
        BankError: there are too few training examples to correlate over.
    """
    last, dim = runs[0].segments[-1], runs[0].bank.sketch.dim
    size = sum(math.prod(shape) for shape in runs[0].bank.space_spec["shapes"])
    ridge, rows = last.decay + last.damping, queries[0][last.metric].double()
    inverted = runs[0].hessian(last).multiply(rows, ridge_inverse(ridge, dim)).double().cpu()
    squares = (rows**2).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    leakage = (ridge * (inverted * rows.cpu()).sum(1) / squares.cpu()).clamp(0, 1)
    correlation = np.ones(len(query_ids))
    if not runs[0].bank.sketch.is_exact:
        halved = min(block.columns.width for run in runs for block in run.blocks) > 1
        correlation = _correlation(runs, queries, apart) if halved else np.zeros(len(query_ids))
    effective = runs[0].effective_dimension(last)
    return Fidelity(list(query_ids), correlation, leakage.numpy(), effective, dim, size, len(runs[0].blocks))


def _correlation(
    runs: Sequence[FittedSegments], queries: Sequence[Mapping[int, Tensor]], apart: Tensor | None
) -> np.ndarray:
    n = runs[0].bank.n_rows
    examples = torch.linspace(0, n - 1, min(n, _EXAMPLES), dtype=torch.float64, device="cpu").long().unique()
    if apart is not None:
        examples = examples[~torch.isin(examples, apart)]
    if len(examples) < _LEAST_EXAMPLES:
        raise BankError(
            f"the fidelity of scores is their correlation over training examples, and of the {n} in "
            f"{runs[0].bank.path} there are {len(examples)} to correlate over: at least {_LEAST_EXAMPLES} are needed, "
            "and some dozens for a number to rely on; a bank of so few needs no sketch, as by Sketch(kind='identity')"
        )
    shape = len(next(iter(queries[0].values()))), len(examples)
    scores = [torch.zeros(shape, dtype=torch.float64, device="cpu") for _ in range(2)]
    for fitted, sketches in zip(runs, queries, strict=True):
        dim, halves_of = fitted.bank.sketch.dim, _halved(fitted, sketches)
        for index, segment in enumerate(fitted.segments):
            for operand in Picked(fitted.rows(segment), examples).between(0, len(examples)):
                rows = operand.decoded(dim).double().cpu()
                for (columns, carried), total in zip(halves_of, scores, strict=True):
                    part = math.sqrt(2) * rows[:, columns]
                    total[:, operand.start : operand.stop] -= carried[index] @ part.T / segment.n
    first, second = (total - total.mean(1, keepdim=True) for total in scores)
    products = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1)).clamp(min=1e-300)
    halves = products.clamp(min=0)
    correlation: np.ndarray = (2 * halves / (1 + halves)).sqrt().numpy()
    return correlation


def _halved(fitted: FittedSegments, sketches: Mapping[int, Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Two halves of each block: their columns, and queries as each segment meets them there, ``(Q, k/2)`` float64."""
    columns: list[list[Tensor]] = [[], []]
    carried: list[list[list[Tensor]]] = [[], []]
    for block in fitted.blocks:
        for half, own, moved in zip(_halves(block.columns.width), columns, carried, strict=True):
            own.append(block.columns.start + half)
            moved.append(_half_moved(fitted, block, half, sketches))
    return [
        (torch.cat(own), [torch.cat(parts, dim=1) for parts in zip(*moved, strict=True)])
        for own, moved in zip(columns, carried, strict=True)
    ]


def _halves(dim: int) -> list[Tensor]:
    """Two sets of dim // 2 columns that share none."""
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(0), device="cpu")
    return [order[: dim // 2].sort().values, order[dim // 2 : dim // 2 * 2].sort().values]


def _half_moved(
    fitted: FittedSegments, block: SegmentBlock, half: Tensor, sketches: Mapping[int, Tensor]
) -> list[Tensor]:
    """Queries as each segment meets them, in half a block: ``(Q, k'/2)`` float64."""
    columns = block.columns.start + half
    halves = {metric: math.sqrt(2) * rows[:, columns].double() for metric, rows in sketches.items()}
    walked = walk_back(_Half(block, half), fitted.segments, QueryPropagator.of(halves))
    return [rows.double().cpu() for (rows,) in (carried.values() for _, carried in walked)][::-1]


class _Half:
    """The segments of some of a block's columns."""

    def __init__(self, whole: SegmentBlock, columns: Tensor) -> None:
        self._whole, self._columns = whole, columns

    def hessian(self, segment: Segment) -> Hessian:
        """2 Ĥ of the columns."""
        whole = self._whole.hessian(segment)
        if isinstance(whole, Spectrum):
            factor = math.sqrt(2) * whole.vectors[self._columns.to(whole.vectors.device)] * whole.values.sqrt()
            return _of_factor(factor.cpu())
        if isinstance(whole, GramHessian):
            return gram_hessian(math.sqrt(2) * whole.rows()[:, self._columns.to(whole.rows().device)].cpu())
        matrix = 2 * self._whole.matrix(segment).cpu()[self._columns][:, self._columns].double()
        if len(matrix) <= _SPECTRAL:
            return decomposed(matrix)

        norm = float(torch.linalg.matrix_norm(matrix))
        shifted = cache(partial(shifted_factor, matrix))
        return DenseHessian(len(matrix), float(matrix.trace()), norm, shifted, lambda: decomposed(matrix))

    def cross_moment(self, segment: Segment, metric: int) -> Tensor:
        """2 C of the columns."""
        return 2 * self._whole.cross_moment(segment, metric).cpu()[self._columns][:, self._columns]

    def decay_of(self, segment: Segment, metric: int) -> Decay:
        """That of the whole block."""
        return self._whole.decay_of(segment, metric)


def _of_factor(factor: Tensor) -> Spectrum:
    """The spectrum of A Aᵀ, of A ``(k/2, r)``."""
    if factor.shape[1] >= len(factor):
        return decomposed(factor @ factor.T)
    vectors, roots, _ = torch.linalg.svd(factor, full_matrices=False)
    return Spectrum(roots**2, vectors)
