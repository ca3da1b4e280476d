"""The laboratory's studies: each yields the variants of one choice inside SOURCE."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from _bench import Bench
from _captured import captured_rows
from _condensed import condensed_rows
from _damping import without_retraining
from _exact import ExactSource
from _members import cheap_members
from _parameters import chosen_parameters, weights_of_parameters
from _pipeline import retrainers
from _study import Recipe, Response, cross_scores, plain
from torch import Tensor

from source_proj.attribution.curvature import Curvature, default_curvature
from source_proj.attribution.fits import Fit, fitted_hessian
from source_proj.attribution.spectral import response
from source_proj.bank.codecs import find_codec
from source_proj.evaluate import GroundTruth
from source_proj.trajectory import PreconditionerMode

__all__ = ["FISHER", "REFERENCE", "ROW_BYTES", "STORAGES", "STUDIES"]

ROW_BYTES = (512, 1024, 2048, 4096)
STORAGES = ("float32", "int8", "int4", "int2", "int1")
_MOST_WORK = 3e12  # rows times k² of a sketch: minutes of a CPU for Ĥ
CURVATURES: tuple[Curvature, ...] = ("empirical_fisher", "gauss_newton")

REFERENCE = Recipe()
FISHER = Recipe("empirical_fisher")  # what two sketches can be crossed for
Variant = (
    tuple[str, list[np.ndarray]]
    | tuple[str, list[np.ndarray], GroundTruth]
    | tuple[str, list[np.ndarray], GroundTruth, list[np.ndarray]]
)
"""A name, the scores of each run, what judges them if not half-subsets, what to compare with if not the default."""


def sketch_dimension(bench: Bench) -> Iterator[Variant]:
    """(a) How much does the sketch cost?"""
    exact_fits = bench.size <= 20_000
    for damping, respond in [("damping tr(H)/k", plain()), ("no damping", plain(0.0))]:
        for dim in [512, 1024, 2048, 4096]:
            if dim < bench.size:
                yield f"k = {dim:,}, {damping}", bench.scores(Recipe(respond=respond), dim=dim)
    if exact_fits:
        for multiple in [0.0, 0.5, 1.0, 2.0]:
            # The same damping as a sketch of the bench's dimension has, in units of tr(H)/k.
            floor = _given_floor(bench, multiple)
            yield f"no sketch, damping {multiple:g} tr(H)/{bench.dim}", bench.scores(Recipe(respond=floor), dim=0)
    else:
        yield from _by_gram_matrices(bench)


def _by_gram_matrices(bench: Bench) -> Iterator[Variant]:
    """Against no sketch where the gradients themselves are too large to hold: two checkpoints of each stage."""
    count = min(len(stage.checkpoints) for stage in bench.trajectories[0].stages)
    used = (count // 2 - 1, count - 1)
    exact = _without_a_sketch(bench, used)
    for dim in [1024, 2048, 4096]:
        yield f"k = {dim:,}, damping tr(H)/k, 2 checkpoints", bench.scores(Recipe(checkpoints=used), dim=dim)
        yield f"no sketch, damping tr(H)/{dim:,}, 2 checkpoints", [one.scores(dim) for one in exact]
    yield "no sketch, no damping, 2 checkpoints", [one.scores(None) for one in exact]


def _without_a_sketch(bench: Bench, used: tuple[int, ...], segments: int = 1) -> list[ExactSource]:
    problem, sets = bench.problem, dict(bench.problem.train_sets)
    sets = sets if len(sets) > 1 else {bench.trajectories[0].stages[0].name: next(iter(sets.values()))}
    return [
        ExactSource(problem.make_model(), problem.task, run, sets, problem.queries, used, segments)
        for run in bench.trajectories
    ]


def _given_floor(bench: Bench, multiple: float) -> Response:
    bank = bench.bank(0)
    floors = [
        fitted_hessian(Fit(bank, i, range(stage.n_checkpoints), default_curvature([bank]))).trace / bench.dim
        for i, stage in enumerate(bank.stages)
    ]
    return lambda time, decay, _floor, _values: response(time, decay, multiple * floors[0])


def hessian(bench: Bench) -> Iterator[Variant]:
    """(b) Which curvature?"""
    for multiple in [1.0, 2.0]:
        respond = plain(multiple)
        yield f"empirical Fisher, {multiple:g} tr(H)/k", bench.scores(Recipe("empirical_fisher", respond=respond))
        if bench.bank(0).settings.second_derivative:
            yield f"Gauss-Newton, {multiple:g} tr(H)/k", bench.scores(Recipe("gauss_newton", respond=respond))
        for draws in [1, 4]:
            recipe = Recipe("sampled_fisher", respond=respond)
            yield f"sampled Fisher, {draws} per row, {multiple:g} tr(H)/k", bench.scores(recipe, fisher=draws)


def damping(bench: Bench) -> Iterator[Variant]:
    """(c) How much damping, of which shape, and where?"""
    for multiple in [0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 10.0, 30.0]:
        yield f"{multiple:g} tr(H)/k in c", bench.scores(Recipe(respond=plain(multiple)))
    for share in [0.05, 0.1, 0.15, 0.2, 0.3, 0.5]:
        yield f"{share:g} k degrees of freedom", bench.scores(Recipe(respond=_degrees(share)))
    for multiple in [0.3, 1.0, 3.0]:
        yield f"Wiener shrinkage, {multiple:g} tr(H)/k", bench.scores(Recipe(respond=_wiener(multiple)))
    for multiple in [0.3, 1.0]:
        yield f"floor: max(σ, {multiple:g} tr(H)/k)", bench.scores(Recipe(respond=_at_least(multiple)))
    yield "noise floor subtracted, then added as damping", bench.scores(Recipe(respond=_subtracted))
    if len(bench.trajectories[0].stages) > 1:
        for multiple in [0.3, 1.0]:
            yield f"{multiple:g} tr(H)/k in S too", bench.scores(Recipe(keep=multiple))
        yield "S with the noise floor subtracted", bench.scores(Recipe(keep=-1.0))


def _wiener(multiple: float) -> Response:
    """σ/(σ² + ρ²), the Wiener filter of an eigenvalue known up to ρ, in place of 1/σ."""

    def respond(time: float, decay: float, floor: float, _values: Tensor) -> Callable[[Tensor], Tensor]:
        rho = multiple * floor

        def function(sigma: Tensor) -> Tensor:
            x = sigma + decay
            effective = (x**2 + rho**2) / x.clamp(min=1e-12 * (rho + 1e-30))
            return -torch.expm1(-time * effective) / effective

        return function

    return respond


def _degrees(share: float) -> Response:
    """Damping ρ at which Σ σ/(σ+ρ) is a share of k: the sketch's own noise is that of so many directions."""

    def respond(time: float, decay: float, _floor: float, values: Tensor) -> Callable[[Tensor], Tensor]:
        low, high = 0.0, 1e3 * float(values.max())
        for _ in range(100):
            middle = (low + high) / 2 if low else high / 1e3
            if float((values / (values + middle)).sum()) > share * len(values):
                low = middle
            else:
                high = middle
        return response(time, decay, high)

    return respond


def _at_least(multiple: float) -> Response:
    def respond(time: float, decay: float, floor: float, _values: Tensor) -> Callable[[Tensor], Tensor]:
        def function(sigma: Tensor) -> Tensor:
            x = sigma.clamp(min=multiple * floor) + decay
            return -torch.expm1(-time * x) / x

        return function

    return respond


def _subtracted(time: float, decay: float, floor: float, _values: Tensor) -> Callable[[Tensor], Tensor]:
    def function(sigma: Tensor) -> Tensor:
        x = (sigma - floor).clamp(min=0) + decay + floor
        return -torch.expm1(-time * x) / x

    return function


def segments(bench: Bench) -> Iterator[Variant]:
    """(d) How many segments, and how many checkpoints?"""
    count = min(len(stage.checkpoints) for stage in bench.trajectories[0].stages)
    for number in sorted({1, 2, 3, count}):
        if number <= count:
            yield f"{number} segments a stage, {count} checkpoints", bench.scores(Recipe(segments=number))
    for number in range(1, count):
        last = tuple(range(-number, 0))
        yield f"last {number} checkpoints of each stage", bench.scores(Recipe(checkpoints=last))
    dense = bench.recorded_often()
    for number in [1, 2, 3, 4, 6, 12]:
        even = tuple(12 * (i + 1) // number - 1 for i in range(number))
        yield f"{number} checkpoints a stage, evenly", [bench.one(bank, Recipe(checkpoints=even)) for bank in dense]


def query_average(bench: Bench) -> Iterator[Variant]:
    """(e) Query gradients at the final weights, or averaged over checkpoints."""
    yield "final weights alone (the default before)", bench.scores(Recipe(query=0))
    for last in [2, 3, 4]:
        yield f"mean over the last {last}", bench.scores(Recipe(query=last))
    yield "mean over all of the last stage", bench.scores(REFERENCE)


def time_scale(bench: Bench) -> Iterator[Variant]:
    """(f) Time scale and weight decay."""
    for factor in [0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 3.0, 10.0]:
        yield f"time x {factor:g}", bench.scores(Recipe(time=factor))
    if len(bench.trajectories[0].stages) == 1:  # a stage that lasts for ever leaves nothing of the one before it
        yield "infinite time", bench.scores(Recipe(time=1e12))
    yield "without weight decay", bench.scores(Recipe(decay=0.0))
    yield "weight decay x 10", bench.scores(Recipe(decay=10.0))


def equal_bytes(bench: Bench) -> Iterator[Variant]:
    """(g) Many runs with small sketches, or few with large ones?"""
    half, quarter = bench.dim // 2, bench.dim // 4
    several = replace(bench, runs=4)
    whole = bench.scores(REFERENCE)
    yield f"1 run, k = {bench.dim:,}", whole
    yield (
        f"1 run, {2} sketches, k = {half:,}",
        [_mean(bench, run, half, [10 + run, 20 + run]) for run in range(bench.runs)],
    )
    yield (
        f"2 runs, k = {half:,}",
        [np.mean([several.one(several.bank(r, dim=half), REFERENCE) for r in (0, 1)], axis=0)],
    )
    yield (
        f"4 runs, k = {quarter:,}",
        [np.mean([several.one(several.bank(r, dim=quarter), REFERENCE) for r in range(4)], axis=0)],
    )


def _mean(bench: Bench, run: int, dim: int, seeds: list[int], recipe: Recipe = REFERENCE) -> np.ndarray:
    return np.asarray(np.mean([bench.one(bench.bank(run, dim=dim, seed=s), recipe) for s in seeds], axis=0))


def half_sketches(bench: Bench) -> Iterator[Variant]:
    """(h) Coefficients from one half-sketch, inner products from the other."""
    half = bench.dim // 2
    yield f"one sketch, k = {bench.dim:,}", bench.scores(FISHER)
    yield (
        "mean of two half-sketches",
        [_mean(bench, run, half, [10 + run, 20 + run], FISHER) for run in range(bench.runs)],
    )
    if len(bench.trajectories[0].stages) > 1:
        return
    for multiple in [0.5, 1.0]:
        crossed = []
        for run in range(bench.runs):
            pair = [bench.bank(run, dim=half, seed=seed + run) for seed in (10, 20)]
            crossed.append(cross_scores(pair[0], pair[1], [bench.features(one) for one in pair], multiple))
        yield f"two half-sketches crossed, {multiple:g} tr(H)/k", crossed


def sampling_ratio(bench: Bench) -> Iterator[Variant]:
    """(i) Does the time scale that predicts best follow the share of the examples that are kept?"""
    for share, retrainings in [(0.25, 8), (0.5, 8), (0.9, 40)]:  # removing little changes little beside the noise
        truth = GroundTruth.subsets(
            bench.folder / f"retrainings-{share}", bench.problem.n, len(bench.problem.queries), count=100,
            fraction=share, retrainings=retrainings, seed=5 * 10**6, settings=bench.problem.settings,
        )  # fmt: skip
        with retrainers(bench.problem) as executor:
            truth.fill(bench.problem.retrain, group=bench.problem.group, executor=executor)
        for curvature in CURVATURES:
            for factor in [0.1, 0.25, 0.5, 1.0]:
                recipe = Recipe(curvature, time=factor)
                yield f"{share:.0%} kept, {curvature.replace('_', ' ')}, time x {factor:g}", bench.scores(recipe), truth


def adam_metric(bench: Bench) -> Iterator[Variant]:
    """(j) What becomes of Adam's preconditioner, by segments and time; and of a sketch four times as large.

    Each line against the exact metric, shared by the stage.
    """
    cuts: list[tuple[PreconditionerMode, int]] = [
        ("shared", 1),
        ("factored", 1),
        ("scalar", 1),
        ("none", 1),
        ("shared", 3),
        ("per_segment", 3),
        ("factored_per_segment", 3),
    ]
    exact = bench.in_metric("shared", 1)
    for (metric, number), factor in product(cuts, [1.0, 0.5]):
        scores = bench.in_metric(metric, number, factor)
        yield f"{metric}, {number} segments, time x {factor:g}", scores, bench.truth, exact
    larger, rows = 4 * bench.dim, bench.problem.n * len(bench.trajectories[0].stages[0].checkpoints)
    if rows < larger:  # the rows' own Gram matrix is decomposed then: a matrix of the sketch's size would take too long
        for metric, number in cuts[:4]:
            yield (
                f"{metric}, 1 segments, k = {larger:,}",
                bench.in_metric(metric, number, dim=larger),
                bench.truth,
                exact,
            )


def sketch_kind(bench: Bench) -> Iterator[Variant]:
    """(k) Which map, at equal dimension? Two seeds for each run, against the sparse map at the same dimension."""
    for dim in (bench.dim // 2, 2 * bench.dim):
        sparse = _of_kind(bench, "sparse", dim)
        yield f"sparse, k = {dim:,}", sparse, bench.truth, sparse
        yield f"tensor, k = {dim:,}", _of_kind(bench, "tensor", dim), bench.truth, sparse
        if dim < bench.dim:
            yield f"kronecker, k = {dim:,}", _of_kind(bench, "kronecker", dim), bench.truth, sparse
        if dim < bench.dim and bench.size <= 150_000:  # dense signs cost their d k
            yield f"rademacher, k = {dim:,}", _of_kind(bench, "rademacher", dim), bench.truth, sparse


def bytes_a_row(bench: Bench) -> Iterator[Variant]:
    """(l) Numbers or bits, in as many bytes a row and checkpoint?"""
    rows = sum(bench.problem.n * len(stage.checkpoints) for stage in bench.trajectories[0].stages)
    for size in ROW_BYTES:
        for storage in STORAGES:
            dim = size * 4096 // find_codec(storage).row_bytes(4096)
            if 2 * dim < bench.size and rows * dim**2 < _MOST_WORK:
                yield f"{size:,} bytes, {storage}, k = {dim:,}", bench.in_storage(storage, dim)


def _of_kind(bench: Bench, kind: str, dim: int) -> list[np.ndarray]:
    return [
        bench.one(bench.bank(run, dim=dim, seed=seed + run, kind=kind), REFERENCE)
        for run in range(bench.runs)
        for seed in (0, 100)
    ]


def segments_without_a_sketch(bench: Bench) -> Iterator[Variant]:
    """(n) Do segments lose because a sketch lifts null directions of Ĥ? Each line against one segment of its kind."""
    count = min(len(stage.checkpoints) for stage in bench.trajectories[0].stages)
    # A Gram matrix of more rows takes too long to decompose.
    used = tuple(range(count)) if bench.problem.n * count <= 12_000 else (count // 2 - 1, count - 1)
    numbers = [number for number in (1, 2, 3, 6) if len(used) % number == 0]
    exact = [_without_a_sketch(bench, used, number) for number in numbers]
    for damping, name in [(None, "no damping"), (bench.dim, f"damping tr(H)/{bench.dim:,}")]:
        scores = [[source.scores(damping) for source in sources] for sources in exact]
        for number, cut in zip(numbers, scores, strict=True):
            yield f"no sketch, {name}, {number} segments", cut, bench.truth, scores[0]
    scores = [bench.scores(Recipe("empirical_fisher", segments=number, checkpoints=used)) for number in numbers]
    for number, cut in zip(numbers, scores, strict=True):
        yield f"k = {bench.dim:,}, damping tr(H)/k, {number} segments", cut, bench.truth, scores[0]


STUDIES: dict[str, Callable[[Bench], Iterator[Variant]]] = {
    "a": sketch_dimension,
    "b": hessian,
    "c": damping,
    "d": segments,
    "e": query_average,
    "f": time_scale,
    "g": equal_bytes,
    "h": half_sketches,
    "i": sampling_ratio,
    "j": adam_metric,
    "k": sketch_kind,
    "l": bytes_a_row,
    "m": without_retraining,
    "n": segments_without_a_sketch,
    "o": cheap_members,
    "p": captured_rows,
    "q": chosen_parameters,
    "r": weights_of_parameters,
    "s": condensed_rows,
}
