"""SOURCE taken apart: its scores for any function of the Hessian, any averaging, any part of the training run.

The library's ``Source`` holds what proved best; the laboratory needs the alternatives too. Everything here works on the
banks that the pipeline built, by the recursion of the library's own ``by_segment``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

import source_proj as sp
from source_proj.attribution.curvature import Curvature, default_curvature, noise_floor
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.fits import Fit, fitted_spectrum
from source_proj.attribution.operands import loss_gradients, mean_gradients
from source_proj.attribution.spectral import Spectrum, decay_operator, response
from source_proj.trajectory import split_segments

__all__ = [
    "Recipe",
    "Response",
    "Segment",
    "cross_scores",
    "drift",
    "fit_scores",
    "floor_of",
    "plain",
    "query_gradients",
    "segments_of",
]

Response = Callable[[float, float, float, Tensor], Callable[[Tensor], Tensor]]
"""Function of (time s, decay λ, noise floor tr(Ĥ)/k, Ĥ's eigenvalues) to the function that takes c's place."""


def plain(multiple: float = 1.0) -> Response:
    """The library's c, with ``multiple`` times the noise floor added to the eigenvalues."""
    return lambda time, decay, floor, _values: response(time, decay, multiple * floor)


@dataclass(frozen=True)
class Recipe:
    """One way to compute scores; the defaults are the library's.

    Attributes:
        curvature: which Hessian; None for the task's default.
        segments: number of segments a stage.
        checkpoints: which checkpoints of each stage are used (negative numbers count from the end); None: all.
        respond: c of a segment.
        keep: multiple of the noise floor added to the eigenvalues in S.
        time: factor on all time scales; infinity makes c an inverse.
        decay: factor on the weight decay.
        query: how many of the last stage's used checkpoints, from the last, the query's gradient is averaged over; None
            for all, 0 for the final weights alone.
    """

    curvature: Curvature | None = None
    segments: int = 1
    checkpoints: tuple[int, ...] | None = None
    respond: Response = field(default_factory=plain)
    keep: float = 0.0
    time: float = 1.0
    decay: float = 1.0
    query: int | None = None


@dataclass(frozen=True)
class Segment:
    """A segment of a stage, with its spectrum."""

    stage: int
    checkpoints: tuple[int, ...]
    time: float
    decay: float
    spectrum: Spectrum
    floor: float


def floor_of(bank: sp.Bank, spectrum: Spectrum) -> float:
    """The noise floor ρ = tr(Ĥ)/k."""
    return noise_floor(spectrum.trace, bank.sketch.dim, is_exact=bank.sketch.is_exact)


def fit_scores(bank: sp.Bank, features: QueryFeatures, recipe: Recipe, rows: int) -> np.ndarray:
    """Scores ``(Q, rows)`` of the first rows, those of the first stage."""
    segments = segments_of(bank, recipe)
    query = query_gradients(bank, features, recipe)
    values = torch.zeros(len(query), rows)
    for segment in reversed(segments):
        own = recipe.respond(
            recipe.time * segment.time, recipe.decay * segment.decay, segment.floor, segment.spectrum.values
        )
        if segment.stage == 0:
            carried = segment.spectrum.multiply(query, own).float()
            for operand in mean_gradients(bank, 0, segment.checkpoints, None):
                part = carried @ operand.rows.T
                values[:, operand.start : operand.stop].add_(part, alpha=-1 / bank.stages[0].n)
        kept = decay_operator(recipe.time * segment.time, recipe.decay * segment.decay)
        extra = recipe.keep * segment.floor
        query = segment.spectrum.multiply(query, partial(_shifted, kept, extra))
    return values.numpy()


def _shifted(function: Callable[[Tensor], Tensor], by: float, eigenvalues: Tensor) -> Tensor:
    return function(eigenvalues + by)


def drift(bank: sp.Bank) -> list[dict[str, object]]:
    """How far the run moves between the first and the second half of each stage's checkpoints.

    Returns a row a stage: "gradients", one minus the cosine of an example's two mean gradients, mean over the examples;
    "Hessians", one minus the cosine of the two matrices; "traces", the log-ratio of their traces.
    """
    rows: list[dict[str, object]] = []
    for index, stage in enumerate(bank.stages):
        half = stage.n_checkpoints // 2
        halves = [tuple(range(half)), tuple(range(half, stage.n_checkpoints))]
        cosines = [
            torch.nn.functional.cosine_similarity(first.rows, second.rows, dim=1)
            for first, second in zip(*(mean_gradients(bank, index, one, None) for one in halves), strict=True)
        ]
        first, second = (fitted_spectrum(Fit(bank, index, one, "empirical_fisher")) for one in halves)
        h_first, h_second = (one.apply(lambda x: x) for one in (first, second))
        cosine = float((h_first * h_second).sum() / (h_first.norm() * h_second.norm()))
        rows.append(
            {"stage": stage.name, "gradients": 1 - float(torch.cat(cosines).mean()), "Hessians": 1 - cosine,
             "traces": float(np.log(second.trace / first.trace))}
        )  # fmt: skip
    return rows


def query_gradients(bank: sp.Bank, features: QueryFeatures, recipe: Recipe) -> Tensor:
    """Gradients ``(Q, k)`` of the queries, averaged over the checkpoints that the recipe names."""
    if recipe.query == 0:
        return features.at(bank.final_checkpoint(), bank.metrics.hash(bank.stages[-1].metric(-1)))
    stage = len(bank.stages) - 1
    used = _used(bank, stage, recipe)
    taken = used if recipe.query is None else used[-recipe.query :]
    metric = bank.metrics.hash(bank.stages[stage].metric(-1))
    return torch.stack([features.at(bank.checkpoint(stage, c), metric) for c in taken]).mean(0)


def _used(bank: sp.Bank, stage: int, recipe: Recipe) -> list[int]:
    count = bank.stages[stage].n_checkpoints
    return sorted({c % count for c in recipe.checkpoints or range(count) if -count <= c < count})


def segments_of(bank: sp.Bank, recipe: Recipe) -> list[Segment]:
    """The segments that the recipe cuts a run into, first to last."""
    found = []
    for index, stage in enumerate(bank.stages):
        used = _used(bank, index, recipe)
        groups = split_segments(len(used), min(recipe.segments, len(used)))
        # Time goes by between checkpoints that are left out, too: it falls to the segment that ends next.
        integrals = [0.0, *stage.record.lr_integrals]
        (whole,) = stage.record.cut(1)
        factor = whole.time / integrals[-1]
        begin = 0.0
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            end = integrals[-1] if last else integrals[used[group[-1]] + 1]
            own = tuple(used[c] for c in group)
            spectrum = _spectrum(bank, index, own, recipe.curvature)
            found.append(Segment(index, own, factor * (end - begin), whole.decay, spectrum, floor_of(bank, spectrum)))
            begin = end
    return found


@lru_cache(maxsize=6)
def _spectrum(bank: sp.Bank, stage: int, checkpoints: tuple[int, ...], curvature: Curvature | None) -> Spectrum:
    return fitted_spectrum(Fit(bank, stage, checkpoints, curvature or default_curvature([bank])))


def cross_scores(first: sp.Bank, second: sp.Bank, features: Sequence[QueryFeatures], multiple: float) -> np.ndarray:
    """Scores of one segment from two sketches of one run, neither of whose noise meets itself.

    f(H) q = f(0) q + (1/N) Σ_i a_i (a_iᵀ h(H) q) with h(σ) = (f(σ) - f(0))/σ: the coefficients come from one sketch,
    the inner products of a_i and q with g(z) from the other, and both orders are averaged.
    """
    both = [_crossed(a, b, fa, fb, multiple) for a, b, fa, fb in
            [(first, second, features[0], features[1]), (second, first, features[1], features[0])]]  # fmt: skip
    return np.asarray(np.mean(both, axis=0))


def _crossed(a: sp.Bank, b: sp.Bank, fa: QueryFeatures, fb: QueryFeatures, multiple: float) -> np.ndarray:
    stage, (segment,) = a.stages[0], segments_of(a, Recipe("empirical_fisher"))  # of the a_i below
    function = plain(multiple)(segment.time, segment.decay, segment.floor, segment.spectrum.values)
    zero = function(torch.zeros(1, dtype=torch.float64))

    def slope(sigma: Tensor) -> Tensor:
        safe = sigma.clamp(min=1e-12 * float(sigma.max()))
        return (function(safe) - zero) / safe

    count = stage.n * stage.n_checkpoints
    inner = segment.spectrum.multiply(query_gradients(a, fa, Recipe()), slope).float()
    carried = float(zero) * query_gradients(b, fb, Recipe())
    for checkpoint in range(stage.n_checkpoints):
        for own, other in zip(
            loss_gradients(a, 0, checkpoint, None), loss_gradients(b, 0, checkpoint, None), strict=True
        ):
            carried += (inner @ own.rows.T) @ other.rows / count
    values = torch.zeros(len(carried), stage.n)
    for operand in mean_gradients(b, 0, range(stage.n_checkpoints), None):
        values[:, operand.start : operand.stop] = -(carried @ operand.rows.T) / stage.n
    return values.numpy()
