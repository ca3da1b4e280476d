"""Every method of the comparison, with the settings it may choose from."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _problem import Problem

import source_proj as sp
from source_proj.attribution.curvature import default_curvature
from source_proj.attribution.queries import sketch_queries
from source_proj.attribution.query_models import QueryModels
from source_proj.evaluate import Candidate, GroundTruth

__all__ = ["DEFAULT", "Run", "candidates", "features_of"]

DEFAULT, TIMED = "SOURCE", "SOURCE, time of the retraining"
RIDGES = [0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0]  # for TRAK, added to the eigenvalues of ΦᵀΦ/N
_OWN_FEATURES = (sp.RepSim,)  # asked with the data itself: their features are no sketched gradients
DAMPINGS: list[Any] = [
    "noise",
    None,
    1e-5,
    1e-4,
    3e-4,
    1e-3,
    3e-3,
    1e-2,
    3e-2,
    1e-1,
    3e-1,
    1.0,
    3.0,
]  # for influence functions
MULTIPLES = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]  # of the noise tr(H)/k, for SOURCE
LARGE = [10.0, 30.0, 100.0, 300.0, 1000.0]  # in Adam's metric, where the Hessian is larger


class Run(NamedTuple):
    """One training run with one sketch seed.

    Attributes:
        trajectory: as recorded.
        bank: of all stages.
        even: the same with all parameters of equal weight, where that is not the default.
        larger: the same with four times the sketch, by default in as many bytes; None where the model is no larger.
        plain: as ``bank``, told as a run of SGD and with parameters of equal weight, as the rivals have it; ``bank``
            itself for SGD.
        metric: the same in the metric of the preconditioner; None for SGD.
        first: of the first stage alone, queried at the end of that stage; the same as ``plain`` for one stage.
        carried: of the first stage alone, queried at the final weights: the later stages are ignored.
        averaged: built at parameters averaged within segments (the paper's Fast-Source).
        smaller: like ``first``, with smaller sketches.
    """

    trajectory: sp.Trajectory
    bank: sp.Bank
    even: sp.Bank | None
    larger: sp.Bank | None
    plain: sp.Bank
    metric: sp.Bank | None
    first: sp.Bank
    carried: sp.Bank
    averaged: sp.Bank
    smaller: tuple[sp.Bank, ...]


def candidates(problem: Problem, runs: Sequence[Run], extra_truth: GroundTruth | None, folder: Path) -> list[Candidate]:
    """All methods; the first is SOURCE with its defaults. What takes hours is kept in the task's folder."""
    found = [*_source(problem, runs), *_influence(problem, runs), *_trak(problem, runs), *_plain(problem, runs)]
    if extra_truth is not None:
        masks, outcomes, unit = extra_truth.masks, extra_truth.outcomes, problem.task.unit
        count = outcomes.shape[0] * outcomes.shape[1]
        influence = [np.asarray(sp.empirical_influence(masks, outcomes, unit=unit))] * len(runs)
        found.append(Candidate("Empirical influence", f"{count} retrainings of its own", lambda: influence))
    if problem.kronecker:
        found += _kronecker(problem, runs)
    if problem.peers:
        found += _peers(problem, runs, folder)
    return found


def _made(
    problem: Problem, method: str, setting: str, banks: Sequence[sp.Bank], attributor: Callable[..., Any], *,
    ensemble: bool = False, calibrated: bool = True, **choices: Any,
) -> Candidate:  # fmt: skip
    model, columns = problem.make_model(), slice(0, problem.n)

    def score(*chosen: sp.Bank) -> np.ndarray:
        built = attributor(list(chosen), model=model, progress=False, **choices)
        asked = problem.queries if attributor in _OWN_FEATURES else [features_of(bank, problem) for bank in chosen]
        return np.asarray(built.score(asked))[:, columns]

    together = partial(score, *banks) if ensemble else None
    return Candidate(method, setting, lambda: [score(bank) for bank in banks], together, calibrated)


def features_of(bank: sp.Bank, problem: Problem) -> sp.QueryFeatures:
    """Sketched query gradients at every checkpoint that some method asks for, computed once a bank."""
    known: dict[str, sp.QueryFeatures] = problem.__dict__.setdefault("_features", {})
    if str(bank.path) not in known:
        points = [bank.checkpoint(s, c) for s, stage in enumerate(bank.stages) for c in range(stage.n_checkpoints)]
        distinct = {point.hash(): point for point in [*points, bank.final_checkpoint()]}
        known[str(bank.path)] = sketch_queries(
            bank, QueryModels(problem.make_model()), problem.task, problem.queries, checkpoints=list(distinct.values()),
            progress=False,
        )  # fmt: skip
    return known[str(bank.path)]


def _source(problem: Problem, runs: Sequence[Run]) -> list[Candidate]:
    whole = [run.bank for run in runs]
    # An exact sketch's default is the formula to the letter; it is asked for what others have by default.
    mean: dict[str, Any] = {"query_gradient": "mean"}
    found = [
        _made(problem, DEFAULT, "defaults", whole, sp.Source, **mean),
        # On half of the examples for as many epochs, a retraining takes half of the steps.
        _made(problem, TIMED, "time_scale=0.5", whole, sp.Source, time_scale=0.5, **mean),
        _made(problem, "SOURCE, query at the end", "defaults but that", whole, sp.Source, query_gradient="final"),
        *(
            _made(problem, "SOURCE, best damping", f"{times:g} tr(H)/k", whole, partial(_damped, times), **mean)
            for times in MULTIPLES
        ),
    ]
    even = [run.even for run in runs if run.even]
    if even:
        found.append(_made(problem, "SOURCE, equal weights", 'parameter_weights="none"', even, sp.Source, **mean))
    larger = [run.larger for run in runs if run.larger]
    if larger:
        setting = f"k={larger[0].sketch.dim}, {larger[0].storage}"
        # Undivided: what blocks cost is another question (LABORATORY.md, "Large sketches in blocks").
        found.append(_made(problem, "SOURCE, four times the sketch", setting, larger, sp.Source, blocks=1, **mean))
    if runs[0].metric is not None:  # trained with Adam
        ignored, inside = [run.plain for run in runs], [run.metric for run in runs if run.metric]
        found += [
            _made(problem, "SOURCE, ignoring Adam", "as if by SGD", ignored, sp.Source, **mean),
            _made(problem, "SOURCE, Adam's metric", 'preconditioner="shared"', inside, sp.Source, **mean),
        ]
    if len(_curvatures(whole)) > 1:  # what the defaults were before the laboratory
        plain: dict[str, Any] = {"curvature": "empirical_fisher"}
        found += [
            _made(problem, "SOURCE, empirical Fisher", "defaults but that", whole, sp.Source, **plain, **mean),
            _made(
                problem, "SOURCE, empirical Fisher, query at the end", "defaults but those", whole, sp.Source,
                query_gradient="final", **plain,
            ),
        ]  # fmt: skip
    shortest = min(len(stage.checkpoints) for stage in runs[0].trajectory.stages)
    more = min(3 if len(problem.train_sets) == 1 else 2, shortest)
    if more > 1 and problem.sizes.sketches == 1:  # a decomposition for every segment: not for each of several sketches
        found.append(
            _made(problem, "SOURCE, more segments", f"{more} a stage", whole, sp.Source, segments=more, **mean)
        )
    averaged = [run.averaged for run in runs]
    return [*found, _made(problem, "SOURCE, averaged parameters", "defaults", averaged, sp.Source, **mean)]


def _damped(times: float, banks: Sequence[sp.Bank], **choices: Any) -> sp.Source:
    """SOURCE, damped by so many times tr(Ĥ)/k; of several segments, by their mean."""
    source = sp.Source(banks, **choices)
    noise = [segment.trace / bank.sketch.dim for bank in banks for segment in source.segments]
    return source.replace(damping=times * float(np.mean(noise)))


def _influence(problem: Problem, runs: Sequence[Run]) -> list[Candidate]:
    averaged, final = "Influence functions, averaged", "Influence functions"
    contests = [
        (method, banks, place, DAMPINGS)
        for place, banks in _places(problem, runs)
        for method in (averaged, final)
    ]  # fmt: skip
    inside = [run.metric for run in runs if run.metric]
    if inside:  # trained with Adam
        contests.append((f"{averaged}, Adam's metric", inside, "", [*DAMPINGS, *LARGE]))
    if runs[0].even:
        contests.append((f"{averaged}, weights by agreement", [run.bank for run in runs], "", DAMPINGS))
    found = []
    for method, banks, place, dampings in contests:
        average = method != final
        choices: dict[str, Any] = {"average": average, "query_gradient": "mean" if average else "final"}
        for damping, curvature in itertools.product(dampings, _curvatures(banks)):
            setting = f"damping {'tr(H)/k' if damping == 'noise' else damping}{place}"
            setting += ", empirical Fisher" if curvature else ""
            choices |= {"damping": damping, "curvature": curvature}
            found.append(_made(problem, method, setting, banks, sp.InfluenceFunction, **choices))
    return found


def _curvatures(banks: Sequence[sp.Bank]) -> list[str | None]:
    """The default, and the empirical Fisher where that is another."""
    return [None, "empirical_fisher"] if default_curvature(banks) != "empirical_fisher" else [None]


def _trak(problem: Problem, runs: Sequence[Run]) -> list[Candidate]:
    by_place = _places(problem, runs)
    by_place += [("", [run.smaller[i] for run in runs]) for i in range(len(runs[0].smaller))]
    return [
        _made(
            problem, "TRAK", f"k={banks[0].sketch.dim}, ridge {ridge:g}{place}", banks, sp.Trak,
            ensemble=True, ridge=ridge,
        )
        for place, banks in by_place
        for ridge in RIDGES
    ]  # fmt: skip


def _plain(problem: Problem, runs: Sequence[Run]) -> list[Candidate]:
    """Methods without a Hessian."""
    whole = [run.plain for run in runs]
    found = [
        _made(problem, "TracIn", "all checkpoints", whole, sp.TracIn),
        _made(problem, "Hydra (fast)", "all checkpoints", whole, sp.Hydra),
    ]
    for place, banks in _places(problem, runs):
        setting = f"final checkpoint{place}"
        found.append(_made(problem, "GradDot", setting, banks, sp.GradDot))
        found.append(_made(problem, "GradCos", setting, banks, sp.GradCos, calibrated=False))
    sets: Any = problem.train_sets if len(problem.train_sets) > 1 else next(iter(problem.train_sets.values()))
    choices = {"train_set": sets, "layer": problem.layer}
    return [*found, _made(problem, "RepSim", "last hidden layer", whole, sp.RepSim, calibrated=False, **choices)]


def _places(problem: Problem, runs: Sequence[Run]) -> list[tuple[str, list[sp.Bank]]]:
    """Banks that methods of one optimum may use: after several stages, two readings compete."""
    if len(problem.train_sets) == 1:
        return [("", [run.plain for run in runs])]
    return [
        (", queries at the end", [run.carried for run in runs]),
        (", queries after stage one", [run.first for run in runs]),
    ]


def _kronecker(problem: Problem, runs: Sequence[Run]) -> list[Candidate]:
    """EK-FAC SOURCE, as the paper instantiates it."""
    import _kronecker as reference

    model = problem.make_model()

    def source(mean_query: bool) -> list[np.ndarray]:
        return [
            reference.ekfac_source(
                model, problem.task, _whole(trajectory), dict(problem.train_sets), problem.queries,
                mean_query=mean_query,
            )
            for trajectory in _distinct(runs)
        ]  # fmt: skip

    return [
        Candidate(name, "a segment a stage", partial(source, mean_query))
        for name, mean_query in [("EK-FAC SOURCE", False), ("EK-FAC SOURCE, mean query gradient", True)]
    ]


def _peers(problem: Problem, runs: Sequence[Run], folder: Path) -> list[Candidate]:
    """EK-FAC influence functions by kronfluence, where it is there."""
    import _kronfluence as reference

    if not reference.installed():
        print('EK-FAC influence functions are left out: they need pip install "source-proj[kronecker]"')
        return []
    (train_set,) = problem.train_sets.values()
    return reference.peers(
        problem.make_model, problem.task, _distinct(runs), train_set, problem.queries, folder=folder / "kronfluence"
    )


def _distinct(runs: Sequence[Run]) -> list[sp.Trajectory]:
    """The runs' trajectories, each once, however many sketches it has."""
    return list({id(run.trajectory): run.trajectory for run in runs}.values())


def _whole(trajectory: sp.Trajectory) -> sp.Trajectory:
    """The same run with one segment a stage."""
    return sp.Trajectory.from_stages([dataclasses.replace(stage, segments=1) for stage in trajectory.stages])
