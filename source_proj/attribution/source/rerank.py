r"""Scores of a few training examples, corrected by inner products of whole gradients.

Write a segment's scores as -(1/N) <c(Ĥ) u, φ_z>, u the query's sketch as it comes to the segment. To first order, what
the sketch adds to the whole-space score is

    -(1/N) <c(Ĥ) δ, φ_z>,      <δ, φ_j> = <p, g_j> - <R p, φ_j> for every training example j,

with p = c(H) u / c(0), *what the training gradients leave unexplained of the query*: errors of <u, φ_j> and those of Ĥ
cancel to a large part, so that a correction of <u, φ_j> alone, however exact, makes scores worse (examples/speed/rerank
has the numbers). Of p, the sketch knows R p = c(Ĥ) u / c(0); of its place in the whole space, that it lies near the
span of the query's gradient and of those training gradients that matter most. So, for M of these (the candidates),

1. θ: R p ≈ θ₀ û + Σ_j θ_j φ_j by least squares in the sketch, and p = θ₀ q + Σ_j θ_j g_j in the whole space;
2. e_j = <p, g_j> - <R p, φ_j> for the candidates, g_j whole;
3. δ = Φᵀ (Φ Φᵀ)⁻¹ e, the shortest that explains them: sketch errors of two examples correlate as their gradients do,
   which makes it the best linear guess of the errors of all the others too.

Both inverses have a hundredth of their diagonal added. With an exact sketch e, and so the correction, is 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.attribution.full_gradients import FullRows, TrainingGradients, sketched_rows
from source_proj.attribution.operands import Picked, stage_start
from source_proj.attribution.source.fitted_segments import FittedSegments
from source_proj.attribution.source.segments import Segment
from source_proj.attribution.spectral import response
from source_proj.gradients import ParameterSpace, Refuted

__all__ = ["SketchedQuery", "segment_corrections"]

_RIDGE = 1e-2  # of the diagonal
_FOREIGN = 0.25  # of its size, what a row differs by from that in the bank only if it is another example's


class SketchedQuery(NamedTuple):
    """Queries as a segment meets them.

    Attributes:
        rows: R q̃ in the segment's metric, ``(Q, k)``.
        moved: c(Ĥ) u, ``(Q, k)``.
        whole: q̃ itself, ``(Q, d)`` float32.
    """

    rows: Tensor
    moved: Tensor
    whole: Tensor


def segment_corrections(
    fitted: FittedSegments, segment: Segment, queries: SketchedQuery, places: Tensor, gradients: TrainingGradients
) -> Tensor:
    """What is to be added to the segment's part of some scores, ``(Q, M)`` float64; 0 for examples of other stages.

    Args:
        fitted: the bank's segments.
        segment: one of them.
        queries: Q queries.
        places: M candidates of each query, ``(Q, M)`` int64 among the examples of all stages.
        gradients: reads their whole gradients; each is made twice at every checkpoint of the segment.

    Raises:
        MismatchError: the data are others than those of the bank.
    """
    start = stage_start(fitted.bank, segment.stage)
    own = (places >= start) & (places < start + segment.n)
    if not own.any():
        return torch.zeros(places.shape, dtype=torch.float64, device="cpu")
    candidates, index = torch.unique(places[own]), torch.zeros_like(places)
    index[own] = torch.searchsorted(candidates, places[own])
    chosen = Picked(fitted.rows(segment), candidates).between(0, len(candidates))
    banked = torch.cat([part.decoded(fitted.bank.sketch.dim) for part in chosen]).cpu()
    apply = response(segment.time, segment.decay, segment.damping)
    unexplained = queries.moved.double().cpu() / float(apply(torch.zeros(1, dtype=torch.float64, device="cpu")))
    whole = _WholeRows(fitted, segment, gradients, candidates)

    weights = torch.zeros(len(places), len(candidates), dtype=torch.float32, device="cpu")
    of_query = weights.new_zeros(len(places))
    sketched = torch.zeros(len(places), banked.shape[1], dtype=torch.float64, device="cpu")
    bases = [_Basis(banked[at], mask) for at, mask in zip(index, own, strict=True)]
    for q, basis in enumerate(bases):
        theta, sketched[q] = basis.nearest(queries.rows[q].double().cpu(), unexplained[q])
        of_query[q] = theta[0]
        weights[q].index_add_(0, index[q], theta[1:].float())
    products = whole.products(whole.combined(weights, banked) + of_query[:, None] * queries.whole.cpu())
    deltas = torch.stack(
        [basis.explaining(products[q, index[q]].double() - basis.rows @ sketched[q]) for q, basis in enumerate(bases)]
    )
    moved = fitted.hessian(segment).multiply(deltas.to(queries.moved.device), apply).double().cpu()
    return torch.stack([basis.rows @ row for basis, row in zip(bases, moved, strict=True)]) / -segment.n


class _Basis:
    """The candidates' rows of one query, ``(M, k)`` float64, zeros for those of other stages."""

    def __init__(self, rows: Tensor, mask: Tensor) -> None:
        self.rows = rows.double() * mask[:, None]

    def nearest(self, query: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the query ``(k,)`` and the rows that come nearest to a target, and where that is."""
        basis = torch.cat([query[None], self.rows])
        theta = _solved(basis, basis @ target)
        return theta, theta @ basis

    def explaining(self, errors: Tensor) -> Tensor:
        """The shortest vector ``(k,)`` whose products with the rows are the given ones, ``(M,)``."""
        return self.rows.T @ _solved(self.rows, errors)


def _solved(rows: Tensor, values: Tensor) -> Tensor:
    """(A Aᵀ + ε diag A Aᵀ)⁻¹ b; a row of zeros has no part in it."""
    gram = rows @ rows.T
    diagonal = gram.diagonal()
    diagonal += torch.where(diagonal > 0, _RIDGE * diagonal, 1.0)
    solution: Tensor = torch.linalg.solve(gram, values)
    return solution


class _WholeRows:
    """ḡ of the candidates of a segment, the mean over its checkpoints, in sums and products only."""

    def __init__(
        self, fitted: FittedSegments, segment: Segment, gradients: TrainingGradients, candidates: Tensor
    ) -> None:
        self._bank, self._segment = fitted.bank, segment
        self._gradients, self._candidates = gradients, candidates

    def combined(self, weights: Tensor, banked: Tensor) -> Tensor:
        """Σ_j w_j ḡ_j, ``(Q, d)``, of weights ``(Q, U)``; compares the gradients with the bank's rows ``(U, k)``."""
        space = ParameterSpace.from_spec(self._bank.space_spec)
        totals = torch.zeros(len(weights), space.size, dtype=torch.float32, device="cpu")
        sketches, codec = torch.zeros(banked.shape, dtype=torch.float32, device="cpu"), self._bank.settings.codec

        def add(part: FullRows) -> None:
            totals.addmm_(weights[:, part.start : part.stop], part.rows.cpu(), alpha=self._share)
            coded = codec.encode(sketched_rows(self._bank.sketch, space, part.rows).cpu())
            rows = codec.decode(*coded, banked.shape[1])
            sketches[part.start : part.stop].add_(rows, alpha=self._share)

        self._each(add, [totals, sketches])
        size = torch.maximum(sketches.norm(dim=1), banked.norm(dim=1))
        self._require((sketches - banked).norm(dim=1) <= _FOREIGN * size)
        return totals

    def products(self, points: Tensor) -> Tensor:
        """<p, ḡ_j>, ``(Q, U)``, with points ``(Q, d)``."""
        products = torch.zeros(len(points), len(self._candidates), dtype=torch.float32, device="cpu")

        def add(part: FullRows) -> None:
            products[:, part.start : part.stop].add_(points @ part.rows.cpu().T, alpha=self._share)

        self._each(add, [products])
        return products

    @property
    def _share(self) -> float:
        return 1 / len(self._segment.checkpoints)

    def _each(self, add: Callable[[FullRows], None], sums: Sequence[Tensor]) -> None:
        """Give all gradients, by checkpoints; from the start again where a batch refutes those before it."""
        try:
            self._pass(add)
        except Refuted:
            for total in sums:
                total.zero_()
            self._pass(add)

    def _pass(self, add: Callable[[FullRows], None]) -> None:
        for checkpoint in self._segment.checkpoints:
            for part in self._gradients.read(self._segment.stage, checkpoint, self._candidates):
                add(part)

    def _require(self, same: Tensor) -> None:
        if not same.all():
            stage = self._bank.stages[self._segment.stage]
            first = stage_start(self._bank, self._segment.stage)
            ids = [stage.ids[place - first] for place in self._candidates[~same].tolist()]
            raise MismatchError(
                f"the gradients of {len(ids)} training examples are not those of the bank {self._bank.path}, first of "
                f"id {ids[0]!r} of stage {stage.name!r}: give the data set (train=) and the model that it was built "
                "from"
            )
