"""Study (q) of the laboratory: which parameters to attribute through."""

from collections.abc import Iterator, Sequence

import numpy as np
from _bench import Bench
from torch import nn

import source_proj as sp
from source_proj.evaluate import GroundTruth

__all__ = ["chosen_parameters"]


def chosen_parameters(bench: Bench) -> Iterator[tuple[str, list[np.ndarray], GroundTruth, list[np.ndarray]]]:
    """(q) Do embeddings, norms and biases belong into the sketch? Each line against all parameters at its k."""
    tables = [name for name, part in bench.problem.make_model().named_modules() if isinstance(part, nn.Embedding)]
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


def _linear_weights(bench: Bench) -> list[str]:
    modules = bench.problem.make_model().named_modules()
    return [f"{name}.weight" for name, part in modules if isinstance(part, nn.Linear)]


def _scores(bench: Bench, dim: int, name: str, parameters: Sequence[str] | None) -> list[np.ndarray]:
    """Scores of each run, by the library's defaults."""
    found = []
    for run, trajectory in enumerate(bench.trajectories):
        path = bench.folder / "laboratory" / f"{run}-{dim}-{name.replace(' ', '-')}"
        bank = bench.build(trajectory, path, sp.Sketch(dim, seed=run), parameters=parameters)
        found.append(bench.by_default(bank))
    return found
