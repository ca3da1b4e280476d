"""The segments of a bank, fitted: their Hessians, and what these make of queries.

The formulas are those of `source_proj.attribution.source.source`; here is what they need of the bank, not of
queries.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from source_proj._io.executors import Executor
from source_proj._io.progress import Bar
from source_proj.attribution.curvature import Curvature, Damping, damping_value
from source_proj.attribution.fits import BlockFits, Fit
from source_proj.attribution.moments import takes_spectrum
from source_proj.attribution.operands import (
    HeldOperands,
    Operands,
    Picked,
    StageOperands,
    encoded_gradients,
    gradient_bytes,
    mean_gradients,
)
from source_proj.attribution.shards import Span, map_spans, row_spans
from source_proj.attribution.source.query_propagator import QueryPropagator, SpectralOperator
from source_proj.attribution.source.segments import Groups, Segment
from source_proj.attribution.spectral import (
    Hessian,
    Spectrum,
    cross_operator,
    decay_operator,
    effective_dimension,
    response,
)
from source_proj.bank import Bank, Decay
from source_proj.sketch.columns import Columns, blocks_of, default_blocks

__all__ = ["FittedSegments", "SegmentBlock", "walk_back"]


class SegmentOperators(Protocol):
    """What a query goes through in a segment."""

    def hessian(self, segment: Segment) -> Hessian:
        """Ĥ_l."""

    def cross_moment(self, segment: Segment, metric: int) -> Tensor:
        """C from a segment's metric to an earlier one, ``(k, k)`` float64."""

    def decay_of(self, segment: Segment, metric: int) -> Decay:
        """Which part of a sketch in an earlier metric a segment's weight decay acts on."""


def walk_back(
    operators: SegmentOperators, segments: Sequence[Segment], query: QueryPropagator
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Carry a query back through consecutive segments, the last one first.

    Yields:
        Position of a segment, and c_l(Ĥ_l) of what :class:`QueryPropagator` carries in the segment's metric, as its
        ``through`` returns it.
    """
    for index in reversed(range(len(segments))):
        segment = segments[index]
        hessian = operators.hessian(segment)
        yield (
            index,
            query.through(
                SpectralOperator(hessian, response(segment.time, segment.decay, segment.damping)), segment.metric
            ),
        )
        earlier = {before.metric for before in segments[:index]}
        if earlier:
            kept = SpectralOperator(hessian, decay_operator(segment.time, segment.decay))
            crossed = {metric: _crossing(operators, segment, metric) for metric in sorted(earlier - {segment.metric})}
            query.step(segment.metric, kept if segment.metric in earlier else None, crossed)


def _crossing(operators: SegmentOperators, segment: Segment, metric: int) -> tuple[float, SpectralOperator]:
    """What a sketch in an earlier metric decays by in a segment, and what is added to it; see `cross_operator`."""
    decay_of, moment = operators.decay_of(segment, metric), operators.cross_moment(segment, metric)
    if decay_of == "own":
        moment = moment + segment.decay * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    cross = cross_operator(segment.time, segment.decay, coupled=decay_of != "all")
    decay = math.exp(-segment.time * segment.decay) if decay_of == "all" else 1.0
    return decay, SpectralOperator(operators.hessian(segment), cross, moment)


Block = tuple[int, int, Tensor]
"""First row and end of some rows, and what was computed of them."""


class FittedSegments:
    """One bank's segments, and what they make of queries.

    Args:
        bank: a finalized bank, as it is now.
        groups: which checkpoints make a segment.
        curvature: see :class:`Source`.
        damping: see :class:`Source`.
        blocks: how many blocks the sketch's columns are taken as; None for the default.
        time_scale: see :class:`Source`.
        device: where products are computed.
        cache: keep spectra beside the bank.
        executor: reads rows and computes with them; None for this process.
        limit: bytes of rows that may be held in memory here.
    """

    def __init__(
        self,
        bank: Bank,
        groups: Groups,
        *,
        curvature: Curvature,
        damping: Damping,
        blocks: int | None,
        time_scale: float,
        device: torch.device | str | None,
        cache: bool,
        executor: Executor | None,
        limit: int,
    ) -> None:
        self.bank = bank
        self._groups = groups
        self._curvature: Curvature = curvature
        self._damping: Damping = damping
        self._time_scale = time_scale
        self._device, self._cache, self.executor = device, cache, executor
        self._fitting = threading.RLock()  # a fit is made once, however many threads ask
        self._held = HeldOperands(limit)
        self._segments: tuple[Segment, ...] | None = None
        self._prepared = False
        self._fits: dict[tuple[int, tuple[int, ...]], BlockFits] = {}
        self._moments: dict[tuple[int, int, tuple[int, ...], int], Tensor] = {}
        count = blocks or default_blocks(bank.sketch, few_rows=all(fit.has_few_rows for fit in self._all_fits()))
        self.blocks = tuple(SegmentBlock(self, *own) for own in enumerate(blocks_of(bank.sketch.dim, count)))
        self._dimensions: dict[Segment, float] = {}
        self._operators: dict[int, list[dict[int, Tensor]]] = {}

    def __reduce__(self) -> "tuple[partial[FittedSegments], tuple[()]]":
        make = partial(
            FittedSegments, self.bank, self._groups, curvature=self._curvature, damping=self._damping,
            blocks=len(self.blocks), time_scale=self._time_scale, device=self._device, cache=self._cache,
            executor=self.executor, limit=self._held.limit,
        )  # fmt: skip
        return make, ()  # a copy, and another process, find what was computed in the bank

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
        """Ĥ_l, of all blocks."""
        return self._hessian(segment.stage, segment.checkpoints)

    def block_hessian(self, block: int, segment: Segment) -> Hessian:
        """Ĥ_l of a block."""
        with self._fitting:
            return self._fits_of(segment.stage, segment.checkpoints).hessian(block)

    def block_matrix(self, block: int, segment: Segment) -> Tensor:
        """Ĥ_l of a block itself, float32."""
        with self._fitting:
            return self._fits_of(segment.stage, segment.checkpoints).matrix(block)

    def block_moment(self, block: int, segment: Segment, metric: int) -> Tensor:
        """C of a block from a segment's metric to an earlier one, float64."""
        key = (block, segment.stage, segment.checkpoints, metric)
        with self._fitting:
            if key not in self._moments:
                self._moments[key] = self._fits_of(segment.stage, segment.checkpoints).cross_moment(block, metric)
            return self._moments[key]

    def decay_of(self, segment: Segment, metric: int) -> Decay:
        """Which part of a sketch in an earlier metric a segment's weight decay acts on."""
        return self.bank.metrics.decay_of(segment.metric, metric) if segment.decay else "all"

    def effective_dimension(self, segment: Segment) -> float:
        """Tr Ĥ(Ĥ + λ)⁻¹, λ the segment's weight decay and damping."""
        with self._fitting:
            if segment not in self._dimensions:
                self._dimensions[segment] = effective_dimension(self.hessian(segment), segment.decay + segment.damping)
            return self._dimensions[segment]

    def described_dimension(self, segment: Segment, before: str) -> str:
        """The effective dimension in words, after some others; nothing where it would have to be computed first."""
        if segment not in self._dimensions and not isinstance(self.block_hessian(0, segment), Spectrum):
            return ""
        width = self.blocks[0].columns.width
        each = "" if len(self.blocks) == 1 else f" in each of {len(self.blocks)} blocks"
        return f"{before}effective dimension {self.effective_dimension(segment):.0f} of {width}{each}"

    def rows(self, segment: Segment) -> Operands:
        """ḡ_l: one checkpoint's rows as they are banked, or the mean of several; from memory where they fit."""
        read = partial(encoded_gradients, checkpoints=segment.checkpoints, device=self._device)
        operands = StageOperands(self.bank, segment.stage, read)
        if self.executor is not None:
            return operands
        nbytes = gradient_bytes(self.bank, segment.stage, segment.checkpoints)
        return self._held.of((segment.stage, segment.checkpoints), nbytes, operands)

    def prepare(self) -> None:
        """Fit all that queries need, once."""
        with self._fitting:
            if not self._prepared:
                nothing = torch.zeros(0, self.bank.sketch.dim, dtype=torch.float32, device="cpu")
                self.moved({segment.metric: nothing for segment in self.segments})
                for fits in self._fits.values():
                    fits.forget()
                self._prepared = True

    def nbytes(self) -> int:
        """Bytes of the rows that queries are multiplied with."""
        return sum(gradient_bytes(self.bank, s.stage, s.checkpoints) for s in self.segments)

    def moved(self, queries: Mapping[int, Tensor], asked: int = 0) -> list[Tensor]:
        """c_l(Ĥ_l) S_{l+1} ··· S_L q̂ for each segment l, ``(Q, k)`` float32.

        Args:
            queries: by metric, each ``(Q, k)``.
            asked: how many queries these are some of. Of many, the matrices that they go through are made first.
        """
        placed = {metric: rows.to(self._device or "cpu") for metric, rows in queries.items()}
        by_block = [block.moved(placed, by_operators=self._pays_operators(asked)) for block in self.blocks]
        return [parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*by_block, strict=True)]

    def _pays_operators(self, asked: int) -> bool:
        """Whether so many queries are multiplied by matrices k' x k', and not each by solutions with a factor.

        A matrix takes 4 to 8 s at k' = 4,096 on one core, solutions .5 ms a query and degree of a polynomial, up to 16
        a segment. With eigenvectors, of small k', both are cheap. They stay in memory, where a quarter of it will do.
        """
        width, metrics = self.blocks[0].columns.width, {segment.metric for segment in self.segments}
        nbytes = torch.float64.itemsize * width * self.bank.sketch.dim * len(self.segments) * len(metrics)
        return 2 * asked >= width and not takes_spectrum(width) and 2 * nbytes <= self._held.limit

    def block_operators(self, block: int) -> list[dict[int, Tensor]]:
        """What any query goes through in a block, made once; see :meth:`SegmentBlock.operators`."""
        with self._fitting:
            if block not in self._operators:
                self._operators[block] = self.blocks[block].operators(self.segments)
            return self._operators[block]

    def add_self_influence(self, total: Tensor, *, mean: bool, runs: int, bar: Bar) -> None:
        """Add what each example did to its own loss to total ``(N,)``.

        Args:
            total: where the sum over several runs is gathered.
            mean: take an example's gradient as the mean over its stage's checkpoints, else at the last.
            runs: the number of runs that scores are averaged over.
            bar: counts the rows of each segment.
        """
        for index, stage in enumerate(self.bank.stages):
            own = [segment for segment in self.segments if segment.stage == index]
            queried = [stage.n_checkpoints - 1]
            if mean:
                queried = [c for c in range(stage.n_checkpoints) if stage.metric(c) == stage.metric(queried[0])]
            for segment, *operators in zip(own, *(block.operators(own) for block in self.blocks), strict=True):
                for number, metric in enumerate(operators[0]):
                    gradients = self._gradients(index, segment.checkpoints, segment.metric)
                    queries = self._gradients(index, queried, metric)
                    sent = [self._sent(by_metric[metric].float()) for by_metric in operators]
                    function = partial(_own_products, sent, gradients, queries)
                    for start, stop, part in self._map(function, index):
                        total[start:stop].add_(part.cpu(), alpha=1 / (segment.n * runs))
                        bar.update(0 if number else stop - start)

    def products(self, segment: Segment, queries: Tensor, rows: Tensor | None = None) -> Iterator[Block]:
        """Yield ``(start, stop, (Q, stop - start))``: inner products of queries and a segment's mean gradients.

        Args:
            segment: the segment.
            queries: ``(Q, k)``.
            rows: the training examples that are wanted, ascending, whose places are then counted; default: all.
        """
        if rows is not None:
            yield from _products(queries, Picked(self.rows(segment), rows), (0, len(rows)))
        else:
            yield from self._map(partial(_products, self._sent(queries), self.rows(segment)), segment.stage)

    def _gradients(self, stage: int, checkpoints: Sequence[int], metric: int) -> StageOperands:
        read = partial(mean_gradients, checkpoints=checkpoints, device=self._device, metric=metric)
        return StageOperands(self.bank, stage, read)

    def _map(self, function: Callable[[Span], list[Block]], stage: int) -> Iterator[Block]:
        """What a function makes of all spans of a stage's rows, in order."""
        for blocks in map_spans(self.executor, function, row_spans(self.bank, [stage])):
            yield from blocks

    def _sent(self, operand: Tensor) -> Tensor:
        """A matrix as it goes to the executor's workers, whatever device they have."""
        return operand if self.executor is None else operand.cpu()

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
            return self._fits_of(stage, checkpoints).whole()

    def _fits_of(self, stage: int, checkpoints: tuple[int, ...]) -> BlockFits:
        if (stage, checkpoints) not in self._fits:
            self._fits[stage, checkpoints] = BlockFits(self._fit_of(stage, checkpoints), len(self.blocks))
        return self._fits[stage, checkpoints]

    def _all_fits(self) -> Iterator[Fit]:
        for stage, groups in enumerate(self._groups):
            yield from (self._fit_of(stage, group) for group in groups)

    def _fit_of(self, stage: int, checkpoints: Sequence[int]) -> Fit:
        return Fit(self.bank, stage, checkpoints, self._curvature, self._device, self._cache, self.executor)


class SegmentBlock:
    """The segments of a block of the sketch's columns, a sketch of its own.

    Attributes:
        columns: the block.
    """

    def __init__(self, whole: FittedSegments, index: int, columns: Columns) -> None:
        self._whole, self._index, self.columns = whole, index, columns

    def hessian(self, segment: Segment) -> Hessian:
        """Ĥ_l of the block."""
        return self._whole.block_hessian(self._index, segment)

    def matrix(self, segment: Segment) -> Tensor:
        """Ĥ_l of the block itself, float32."""
        return self._whole.block_matrix(self._index, segment)

    def cross_moment(self, segment: Segment, metric: int) -> Tensor:
        """C of the block from a segment's metric to an earlier one, float64."""
        return self._whole.block_moment(self._index, segment, metric)

    def decay_of(self, segment: Segment, metric: int) -> Decay:
        """As of all."""
        return self._whole.decay_of(segment, metric)

    def moved(self, queries: Mapping[int, Tensor], *, by_operators: bool) -> list[Tensor]:
        """c_l(Ĥ_l) S_{l+1} ··· S_L q̂ for each segment l, ``(Q, k')`` float32, of whole queries by metric."""
        own = {metric: rows[:, self.columns.slice] for metric, rows in queries.items()}
        if by_operators:
            return [
                torch.stack([own[m].to(matrix) @ matrix.T for m, matrix in matrices.items()]).sum(0).float()
                for matrices in self._whole.block_operators(self._index)
            ]
        by_segment = [carried for _, carried in walk_back(self, self._whole.segments, QueryPropagator.of(own))]
        return [rows.float() for (rows,) in (carried.values() for carried in reversed(by_segment))]

    def operators(self, segments: Sequence[Segment]) -> list[dict[int, Tensor]]:
        """What any query would go through, for each of the given consecutive segments.

        By metric m, the ``(k', k')`` matrix c_l(Ĥ_l) T_m, where Σ_m T_m û^(m) is the query's sketch in the
        segment's own metric, after the later segments. With one metric T is S_{l+1} ··· S_L.
        """
        identity = QueryPropagator.identity({segment.metric for segment in segments})
        return [matrices for _, matrices in walk_back(self, segments, identity)][::-1]


def _own_products(operators: Sequence[Tensor], gradients: Operands, queries: Operands, span: Span) -> list[Block]:
    """ḡ(z) · operator · ∇m(z) of each example z of a span, of an operator in diagonal blocks."""
    widths = [len(operator) for operator in operators]
    found = []
    for own, query in zip(gradients.between(*span), queries.between(*span), strict=True):
        parts = zip(own.rows.split(widths, 1), operators, query.rows.split(widths, 1), strict=True)
        products = [((rows @ operator.to(rows.device)) * other).sum(1) for rows, operator, other in parts]
        found.append((own.start, own.stop, torch.stack(products).sum(0)))
    return found


def _products(queries: Tensor, operands: Operands, span: Span) -> list[Block]:
    return [
        (its.start, its.stop, its.codec.multiply(queries.to(its.rows.device), its.rows, its.scale))
        for its in operands.between(*span)
    ]
