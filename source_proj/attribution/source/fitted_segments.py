"""The segments of a bank, fitted: their spectra, and the one matrix B that they collapse into.

The formulas are those of `source_proj.attribution.source.source`; here is what they need of the bank, not of
queries.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from source_proj.attribution.curvature import Curvature, Damping, damping_value
from source_proj.attribution.fits import cached_cross_moment, cached_spectrum
from source_proj.attribution.operands import Operand, mean_gradients
from source_proj.attribution.source.query_propagator import QueryPropagator, SpectralOperator
from source_proj.attribution.source.segments import Groups, Segment
from source_proj.attribution.spectral import Spectrum, cross_operator, decay_operator, response
from source_proj.bank import Bank
from source_proj.bank.codecs import Codec

__all__ = ["FittedSegments"]


class FittedSegments:
    """One bank's segments, and what they make of its mean gradients.

    Args:
        bank: a finalized bank, as it is now.
        groups: which checkpoints make a segment.
        curvature: see :class:`Source`.
        damping: see :class:`Source`.
        time_scale: see :class:`Source`.
        device: where products are computed.
        cache: keep spectra and B beside the bank.
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
    ) -> None:
        self.bank = bank
        self._groups = groups
        self._curvature: Curvature = curvature
        self._damping: Damping = damping
        self._time_scale = time_scale
        self._device, self._cache = device, cache
        self._fitting = threading.RLock()  # a fit is made once, however many threads ask
        self._matrices: dict[str, Operand] = {}
        self._segments: tuple[Segment, ...] | None = None
        self._spectra: dict[tuple[int, tuple[int, ...]], Spectrum] = {}

    @property
    def width(self) -> int:
        """Columns of B: k for each metric."""
        return self.bank.sketch.dim * len(self.bank.metrics)

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

    @contextmanager
    def spectra_in_memory(self) -> Iterator[None]:
        """Let spectra be used twice, then free them: k x k numbers for each segment."""
        try:
            yield
        finally:
            self._spectra.clear()

    def spectrum(self, segment: Segment) -> Spectrum:
        """Of Ĥ_l."""
        return self._spectrum(segment.stage, segment.checkpoints)

    def cross_moment(self, segment: Segment, metric: int) -> Tensor:
        """C from a segment's metric to an earlier one, ``(k, k)`` float64."""
        return cached_cross_moment(
            self.bank,
            segment.stage,
            segment.checkpoints,
            metric,
            self._curvature,
            device=self._device,
            cache=self._cache,
        )

    def mean_gradients(self, segment: Segment) -> Iterator[Operand]:
        """ḡ_l of the examples of a segment's stage, block by block."""
        return mean_gradients(self.bank, segment.stage, segment.checkpoints, self._device)

    def matrix(self, codec: Codec) -> Operand:
        """B, ``(N, k)``, ``(N, M·k)`` for M metrics, encoded; kept."""

        def compute() -> dict[str, np.ndarray]:
            with self.spectra_in_memory():
                return {name: values.numpy() for name, values in self._collapse(codec).items()}

        with self._fitting:
            if codec.name not in self._matrices:
                settings = {
                    "curvature": self._curvature,
                    "damping": self._damping,
                    "segments": self._groups,
                    "time_scale": self._time_scale,
                    "storage": codec.name,
                }
                arrays = self.bank.fits.get("source", settings, compute) if self._cache else compute()
                tensors = {name: torch.from_numpy(values).to(self._device or "cpu") for name, values in arrays.items()}
                self._matrices[codec.name] = Operand(
                    0, self.bank.n_rows, tensors["B"], tensors.get("scale"), codec=codec
                )
            return self._matrices[codec.name]

    def operators(self, segments: Sequence[Segment]) -> list[dict[int, Tensor]]:
        """What makes a segment's mean gradients rows of B, for each of the given consecutive segments.

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
            spectrum = self.spectrum(segment)
            yield (
                index,
                query.through(
                    SpectralOperator(spectrum, response(segment.time, segment.decay, segment.damping)), segment.metric
                ),
            )
            earlier = {before.metric for before in segments[:index]}
            if earlier:
                kept = SpectralOperator(spectrum, decay_operator(segment.time, segment.decay))
                cross = cross_operator(segment.time, segment.decay)
                crossed = {
                    metric: SpectralOperator(spectrum, cross, self.cross_moment(segment, metric))
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

    def _collapse(self, codec: Codec) -> dict[str, Tensor]:
        """B and its scales, encoded block by block so that no float32 copy of another codec's B exists."""
        bank, dim = self.bank, self.bank.sketch.dim
        matrix = codec.empty(bank.n_rows, self.width)
        operators = self.operators(self.segments)
        for stage in range(len(bank.stages)):
            own = [pair for pair in zip(self.segments, operators, strict=True) if pair[0].stage == stage]
            for parts in zip(*[self.mean_gradients(segment) for segment, _ in own], strict=True):
                block = parts[0].rows.new_zeros(len(parts[0].rows), self.width)
                for part, (segment, by_metric) in zip(parts, own, strict=True):
                    for metric, operator in by_metric.items():
                        columns = block[:, metric * dim : (metric + 1) * dim]
                        columns.add_(part.rows @ operator, alpha=-1 / segment.n)
                encoded = codec.encode(block)
                matrix.codes[parts[0].start : parts[0].stop] = encoded.codes.cpu()
                if matrix.scale is not None and encoded.scale is not None:
                    matrix.scale[parts[0].start : parts[0].stop] = encoded.scale.cpu()
        return {"B": matrix.codes} if matrix.scale is None else {"B": matrix.codes, "scale": matrix.scale}

    def _fit(self) -> Iterator[Segment]:
        sketch = self.bank.sketch
        for index, (stage, groups) in enumerate(zip(self.bank.stages, self._groups, strict=True)):
            steps = stage.record.steps
            for cut in stage.record.cut(groups):
                time, trace = self._time_scale * cut.time, self._spectrum(index, cut.checkpoints).trace
                damping = damping_value(self._damping, trace, sketch.dim, is_exact=sketch.is_exact)
                name = f"{stage.name}: steps {', '.join(str(steps[c]) for c in cut.checkpoints)}"
                yield Segment(index, name, cut.checkpoints, time, cut.decay, stage.n, trace, damping, cut.metric)

    def _spectrum(self, stage: int, checkpoints: tuple[int, ...]) -> Spectrum:
        key = (stage, checkpoints)
        spectrum = self._spectra.get(key)  # another thread may free them at any time
        if spectrum is None:
            spectrum = cached_spectrum(
                self.bank, stage, checkpoints, self._curvature, device=self._device, cache=self._cache
            )
            self._spectra[key] = spectrum
        return spectrum
