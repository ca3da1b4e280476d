"""The segments of a bank, fitted: their spectra, and the one matrix B that they collapse into.

The formulas are those of `source_proj.attribution.source.source`; here is what they need of the bank, not of
queries.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from source_proj.attribution.curvature import (
    Curvature,
    Damping,
    Spectrum,
    cross_operator,
    damping_value,
    decay_operator,
    response,
)
from source_proj.attribution.fits import FitCache, cached_cross_moment, cached_spectrum
from source_proj.attribution.operands import Operand, mean_gradients
from source_proj.attribution.source.query_propagator import QueryPropagator
from source_proj.bank import Bank
from source_proj.bank.quantize import Storage, encode, has_scale
from source_proj.trajectory import Segments

__all__ = ["FittedSegments", "Groups", "Segment", "stage_groups"]

Groups = list[list[list[int]]]
"""For each stage, for each segment of it, which checkpoints it averages."""


@dataclass(frozen=True)
class Segment:
    """One segment of training, as fitted.

    Attributes:
        stage: index of its stage.
        name: stage name and checkpoint steps, for people.
        checkpoints: which checkpoints of the stage are averaged.
        time: time scale s (learning rate integrated over the optimizer's steps, momentum and ``time_scale`` included).
        decay: weight decay λ.
        n: number of training examples of its stage.
        trace: tr(Ĥ).
        damping: what was added to the eigenvalues inside c.
        metric: the bank's metric that the segment's rows are in; 0 without a preconditioner.
    """

    stage: int
    name: str
    checkpoints: tuple[int, ...]
    time: float
    decay: float
    n: int
    trace: float
    damping: float
    metric: int = 0


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
        self._matrices: dict[Storage, Operand] = {}
        self._segments: tuple[Segment, ...] | None = None
        self._spectra: dict[tuple[int, tuple[int, ...]], Spectrum] = {}

    @property
    def width(self) -> int:
        """Columns of B: k for each metric."""
        return self.bank.sketch.dim * len(self.bank.metrics)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in order of training."""
        if self._segments is None:
            self._segments = tuple(self._fit())
        return self._segments

    @contextmanager
    def spectra_in_memory(self) -> Iterator[None]:
        """Let spectra be used twice, then let them go: k x k numbers for each segment."""
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

    def matrix(self, storage: Storage) -> Operand:
        """B, ``(N, k)``, ``(N, M·k)`` for M metrics, in its storage's type, with its scales; kept."""

        def compute() -> dict[str, np.ndarray]:
            with self.spectra_in_memory():
                return {name: values.numpy() for name, values in self._collapse(storage).items()}

        if storage not in self._matrices:
            settings = {
                "curvature": self._curvature,
                "damping": self._damping,
                "segments": self._groups,
                "time_scale": self._time_scale,
                "storage": storage,
            }
            arrays = FitCache(self.bank).get("source", settings, compute) if self._cache else compute()
            found = {name: torch.from_numpy(values).to(self._device or "cpu") for name, values in arrays.items()}
            self._matrices[storage] = Operand(0, self.bank.n_rows, found["B"], found.get("scale"))
        return self._matrices[storage]

    def operators(self, segments: Sequence[Segment]) -> list[dict[int, Tensor]]:
        """What makes a segment's mean gradients rows of B, for each of the given consecutive segments.

        By metric m, the ``(k, k)`` float32 matrix c_l(Ĥ_l) T_m, where Σ_m T_m û^(m) is the query's sketch in the
        segment's own metric, after the later segments. With one metric T is S_{l+1} ··· S_L.
        """
        operators: list[dict[int, Tensor]] = []
        after = QueryPropagator({segment.metric for segment in segments})
        for index in reversed(range(len(segments))):
            segment = segments[index]
            found = self.spectrum(segment)
            own = found.apply(response(segment.time, segment.decay, segment.damping))
            operators.append({m: t.float() for m, t in after.times(own, segment.metric).items()})
            earlier = {one.metric for one in segments[:index]}
            if earlier:
                kept = found.apply(decay_operator(segment.time, segment.decay)) if segment.metric in earlier else None
                crossed = {m: self._cross_operator(segment, m) for m in sorted(earlier - {segment.metric})}
                after.step(segment.metric, math.exp(-segment.time * segment.decay), kept, crossed)
        return operators[::-1]

    def _cross_operator(self, segment: Segment, metric: int) -> Tensor:
        """exp(-s λ) C_{l→m} h(Ĥ_l), ``(k, k)`` float64."""
        found = self.spectrum(segment)
        return self.cross_moment(segment, metric) @ found.apply(cross_operator(segment.time, segment.decay))

    def _collapse(self, storage: Storage) -> dict[str, Tensor]:
        """B and its scales, encoded block by block so that no float32 copy of another storage's B exists."""
        bank, dim = self.bank, self.bank.sketch.dim
        made = {"B": torch.empty(bank.n_rows, self.width, dtype=getattr(torch, storage))}
        if has_scale(storage):
            made["scale"] = torch.empty(bank.n_rows)
        operators = self.operators(self.segments)
        for stage in range(len(bank.stages)):
            own = [pair for pair in zip(self.segments, operators, strict=True) if pair[0].stage == stage]
            for parts in zip(*[self.mean_gradients(segment) for segment, _ in own], strict=True):
                block = parts[0].rows.new_zeros(len(parts[0].rows), self.width)
                for part, (segment, by_metric) in zip(parts, own, strict=True):
                    for metric, operator in by_metric.items():
                        columns = block[:, metric * dim : (metric + 1) * dim]
                        columns.add_(part.rows @ operator, alpha=-1 / segment.n)
                values, scale = encode(block, storage)
                made["B"][parts[0].start : parts[0].stop] = values.cpu()
                if scale is not None:
                    made["scale"][parts[0].start : parts[0].stop] = scale.cpu()
        return made

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
        if key not in self._spectra:
            self._spectra[key] = cached_spectrum(
                self.bank, stage, checkpoints, self._curvature, device=self._device, cache=self._cache
            )
        return self._spectra[key]


def stage_groups(bank: Bank, segments: Segments | Mapping[str, Segments] | None) -> Groups:
    """Which checkpoints make a segment, by the argument ``segments`` of :class:`Source`.

    Raises:
        ValueError: they are no ordered partition of a stage's checkpoints, name unknown stages, or join metrics.
    """
    names = [stage.name for stage in bank.stages]
    if isinstance(segments, Mapping):
        unknown = [name for name in segments if name not in names]
        if unknown:
            raise ValueError(f"segments name unknown stages {unknown}; the bank's stages are {names}")
        chosen = [segments.get(name) for name in names]
    elif segments is None or isinstance(segments, int):
        chosen = [segments] * len(names)
    elif len(names) == 1:
        chosen = [segments]
    else:
        raise ValueError(f"give segments a stage, as a mapping from the names {names}, not one list for all")
    return [
        [list(cut.checkpoints) for cut in stage.record.cut(segments)]
        for stage, segments in zip(bank.stages, chosen, strict=True)
    ]
