"""The segments of a bank, fitted: their Hessians, and what these make of queries.

The formulas are those of `source_proj.attribution.source.source`; here is what they need of the bank, not of
queries.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from source_proj.attribution.curvature import Curvature, Damping, damping_value
from source_proj.attribution.fits import Fit, fitted_cross_moment, fitted_hessian
from source_proj.attribution.operands import HeldOperands, Operand, encoded_gradients, gradient_bytes, mean_gradients
from source_proj.attribution.source.query_propagator import QueryPropagator, SpectralOperator
from source_proj.attribution.source.segments import Groups, Segment
from source_proj.attribution.spectral import Hessian, cross_operator, decay_operator, response
from source_proj.bank import Bank

__all__ = ["FittedSegments"]


class FittedSegments:
    """One bank's segments, and what they make of queries.

    Args:
        bank: a finalized bank, as it is now.
        groups: which checkpoints make a segment.
        curvature: see :class:`Source`.
        damping: see :class:`Source`.
        time_scale: see :class:`Source`.
        device: where products are computed.
        cache: keep spectra beside the bank.
        limit: bytes of rows that may be held in memory.
    """

    def __init__(
        self,
        bank: Bank,
        groups: Groups,
        *,
        curvature: Curvature,
        damping: Damping,
        time_scale: float,
        device: torch.device | str | None,
        cache: bool,
        limit: int,
    ) -> None:
        self.bank = bank
        self._groups = groups
        self._curvature: Curvature = curvature
        self._damping: Damping = damping
        self._time_scale = time_scale
        self._device, self._cache = device, cache
        self._fitting = threading.RLock()  # a fit is made once, however many threads ask
        self._held = HeldOperands(limit)
        self._segments: tuple[Segment, ...] | None = None
        self._prepared = False
        self._hessians: dict[tuple[int, tuple[int, ...]], Hessian] = {}
        self._moments: dict[tuple[int, tuple[int, ...], int], Tensor] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether the segments are known already."""
        return self._segments is not None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in order of training."""
        with self._fitting:
            if self._segments is None:
                self._segments = tuple(self._fit())
            return self._segments

    def hessian(self, segment: Segment) -> Hessian:
        """Ĥ_l."""
        return self._hessian(segment.stage, segment.checkpoints)

    def cross_moment(self, segment: Segment, metric: int) -> Tensor:
        """C from a segment's metric to an earlier one, ``(k, k)`` float64."""
        key = (segment.stage, segment.checkpoints, metric)
        with self._fitting:
            if key not in self._moments:
                self._moments[key] = fitted_cross_moment(self._fit_of(*key[:2]), metric)
            return self._moments[key]

    def mean_gradients(self, segment: Segment) -> Iterator[Operand]:
        """ḡ_l of the examples of a segment's stage, block by block."""
        return mean_gradients(self.bank, segment.stage, segment.checkpoints, self._device)

    def rows(self, segment: Segment) -> Iterator[Operand]:
        """ḡ_l: one checkpoint's rows as they are banked, or the mean of several; from memory where they fit."""
        return self._held.stream(
            (segment.stage, segment.checkpoints),
            gradient_bytes(self.bank, segment.stage, segment.checkpoints),
            lambda: encoded_gradients(self.bank, segment.stage, segment.checkpoints, self._device),
        )

    def prepare(self) -> None:
        """Fit all that queries need, once."""
        with self._fitting:
            if not self._prepared:
                nothing = torch.zeros(0, self.bank.sketch.dim)
                self.moved({segment.metric: nothing for segment in self.segments})
                self._prepared = True

    def nbytes(self) -> int:
        """Bytes of the rows that queries are multiplied with."""
        return sum(gradient_bytes(self.bank, s.stage, s.checkpoints) for s in self.segments)

    def moved(self, queries: Mapping[int, Tensor]) -> list[Tensor]:
        """c_l(Ĥ_l) S_{l+1} ··· S_L q̂ for each segment l, ``(Q, k)`` float32, of queries by metric."""
        placed = {metric: rows.to(self._device or "cpu") for metric, rows in queries.items()}
        by_segment = [carried for _, carried in self.walk_back(self.segments, QueryPropagator.of(placed))]
        return [rows.float() for (rows,) in (carried.values() for carried in reversed(by_segment))]

    def operators(self, segments: Sequence[Segment]) -> list[dict[int, Tensor]]:
        """What any query would go through, for each of the given consecutive segments.

        By metric m, the ``(k, k)`` float32 matrix c_l(Ĥ_l) T_m, where Σ_m T_m û^(m) is the query's sketch in the
        segment's own metric, after the later segments. With one metric T is S_{l+1} ··· S_L.
        """
        identity = QueryPropagator.identity({segment.metric for segment in segments})
        by_metric = [matrices for _, matrices in self.walk_back(segments, identity)]
        return [{m: matrix.float() for m, matrix in matrices.items()} for matrices in reversed(by_metric)]

    def walk_back(self, segments: Sequence[Segment], query: QueryPropagator) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """Carry a query back through consecutive segments, the last one first.

        Yields:
            Position of a segment, and c_l(Ĥ_l) of what :class:`QueryPropagator` carries in the segment's metric, as its
            ``through`` returns it.
        """
        for index in reversed(range(len(segments))):
            segment = segments[index]
            hessian = self.hessian(segment)
            yield (
                index,
                query.through(
                    SpectralOperator(hessian, response(segment.time, segment.decay, segment.damping)), segment.metric
                ),
            )
            earlier = {before.metric for before in segments[:index]}
            if earlier:
                kept = SpectralOperator(hessian, decay_operator(segment.time, segment.decay))
                cross = cross_operator(segment.time, segment.decay)
                crossed = {
                    metric: SpectralOperator(hessian, cross, self.cross_moment(segment, metric))
                    for metric in sorted(earlier - {segment.metric})
                }
                query.step(
                    segment.metric,
                    math.exp(-segment.time * segment.decay),
                    kept if segment.metric in earlier else None,
                    crossed,
                )

    def add_self_influence(self, total: Tensor, *, mean: bool, runs: int) -> None:
        """Add what each example did to its own loss to total ``(N,)``.

        Args:
            total: where the sum over several runs is gathered.
            mean: take an example's gradient as the mean over its stage's checkpoints, else at the last.
            runs: the number of runs that scores are averaged over.
        """
        for index, stage in enumerate(self.bank.stages):
            own = [segment for segment in self.segments if segment.stage == index]
            queried = [stage.n_checkpoints - 1]
            if mean:
                queried = [c for c in range(stage.n_checkpoints) if stage.metric(c) == stage.metric(queried[0])]
            for segment, operators in zip(own, self.operators(own), strict=True):
                for metric, operator in operators.items():
                    queries = mean_gradients(self.bank, index, queried, self._device, metric)
                    for gradient, query in zip(self.mean_gradients(segment), queries, strict=True):
                        part = ((gradient.rows @ operator) * query.rows).sum(1).cpu()
                        total[gradient.start : gradient.stop].add_(part, alpha=1 / (segment.n * runs))

    def _fit(self) -> Iterator[Segment]:
        sketch = self.bank.sketch
        for index, (stage, groups) in enumerate(zip(self.bank.stages, self._groups, strict=True)):
            steps = stage.record.steps
            for cut in stage.record.cut(groups):
                time, trace = self._time_scale * cut.time, self._hessian(index, cut.checkpoints).trace
                damping = damping_value(self._damping, trace, sketch.dim, is_exact=sketch.is_exact)
                name = f"{stage.name}: steps {', '.join(str(steps[c]) for c in cut.checkpoints)}"
                yield Segment(index, name, cut.checkpoints, time, cut.decay, stage.n, trace, damping, cut.metric)

    def _hessian(self, stage: int, checkpoints: tuple[int, ...]) -> Hessian:
        with self._fitting:
            if (stage, checkpoints) not in self._hessians:
                self._hessians[stage, checkpoints] = fitted_hessian(self._fit_of(stage, checkpoints))
            return self._hessians[stage, checkpoints]

    def _fit_of(self, stage: int, checkpoints: Sequence[int]) -> Fit:
        return Fit(self.bank, stage, checkpoints, self._curvature, self._device, self._cache)
