"""Studies (q) and (r) of the laboratory: which parameters to attribute through, and what each of them counts for."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from _bench import Bench
from torch import nn

import source_proj as sp
from source_proj.bank.build.agreement import agreement, with_sizes_kept
from source_proj.bank.build.data import BatchSource
from source_proj.evaluate import GroundTruth
from source_proj.gradients import ParameterSpace

__all__ = ["chosen_parameters", "weights_of_parameters"]

Lines = Iterator[tuple[str, list[np.ndarray], GroundTruth, list[np.ndarray]]]

POWERS = (1, 2, 3)  # of the agreement


def chosen_parameters(bench: Bench) -> Lines:
    """(q) Do embeddings, norms and biases belong into the sketch? Each line against all parameters at its k."""
    tables = _tables(bench)
    if not tables:
        raise ValueError(f"study (q) is for models with embeddings, and {bench.problem.title}'s has none")
    without = {f"without {name}": [f"!{name}.*"] for name in tables}
    neither = {"without embeddings": [f"!{name}.*" for name in tables]}
    weights = {"weights of linear layers alone": _linear_weights(bench)}
    for dim, choices in [(bench.dim, without | neither | weights), (4 * bench.dim, neither | weights)]:
        everything = _scores(bench, dim, "all", None)
        yield f"k = {dim:,}, all parameters", everything, bench.truth, everything
        for name, parameters in choices.items():
            yield f"k = {dim:,}, {name}", _scores(bench, dim, name, parameters), bench.truth, everything


def weights_of_parameters(bench: Bench) -> Lines:
    """(r) By what should gradients be multiplied on which checkpoints agree by ρ? Each line against 1."""
    tables, default = _tables(bench), bench.problem.task.parameter_weights != "none"
    for dim, powers in [(bench.dim, POWERS), (4 * bench.dim, (2,))][: 1 + default]:
        equal = _scores(bench, dim, "all", None)
        yield f"k = {dim:,}, 1", equal, bench.truth, equal
        for power in powers:
            found = _scores(bench, dim, f"agreement-{power}", None, power)
            yield f"k = {dim:,}, ρ^{power}", found, bench.truth, equal
        if tables and dim == bench.dim:
            left = _scores(bench, dim, "agreement-2-without", [f"!{name}.*" for name in tables], 2)
            yield f"k = {dim:,}, ρ^2 without embeddings", left, bench.truth, equal


def _tables(bench: Bench) -> list[str]:
    return [name for name, part in bench.problem.make_model().named_modules() if isinstance(part, nn.Embedding)]


def _linear_weights(bench: Bench) -> list[str]:
    modules = bench.problem.make_model().named_modules()
    return [f"{name}.weight" for name, part in modules if isinstance(part, nn.Linear)]


def _scores(
    bench: Bench, dim: int, name: str, parameters: Sequence[str] | None, power: float | None = None
) -> list[np.ndarray]:
    """Scores of each run, by the library's defaults, but for weights by a power of the agreement."""
    found = []
    for run, trajectory in enumerate(bench.trajectories):
        path = bench.folder / "laboratory" / f"{run}-{dim}-{name.replace(' ', '-')}"
        weights = "none" if power is None else _weights(bench, trajectory, parameters, power)
        sketch = sp.Sketch(dim, seed=run)
        bank = bench.build(trajectory, path, sketch, parameters=parameters, parameter_weights=weights)
        found.append(bench.by_default(bank))
    return found


def _weights(
    bench: Bench, trajectory: sp.Trajectory, parameters: Sequence[str] | None, power: float
) -> Mapping[str, float]:
    model, problem = bench.problem.make_model(), bench.problem
    space = ParameterSpace.from_model(model, parameters)
    sources = [BatchSource(data, 64) for data in problem.train_sets.values()]
    ids = [np.arange(source.n) for source in sources]
    agreed, sizes = agreement(model, problem.task, trajectory, sources, ids, space, None, None)
    weights = with_sizes_kept(agreed, sizes, power)
    return dict(zip(space.names, weights.tolist(), strict=True))
