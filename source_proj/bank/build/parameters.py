"""Which parameters a bank attributes through, and what their gradients are multiplied by."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from source_proj._io.printable import printable
from source_proj.bank.bank import Bank
from source_proj.bank.build.agreement import LEAST_CHECKPOINTS, LEAST_EXAMPLES
from source_proj.bank.format import Settings
from source_proj.bank.store import Store
from source_proj.gradients import ParameterSpace, slow_parameters
from source_proj.sketch import Sketch, exact_sketch
from source_proj.task import Task
from source_proj.trajectory import Trajectory, trained_parameters

__all__ = [
    "AGREEMENT",
    "NONE",
    "ParameterWeights",
    "as_begun",
    "chosen_space",
    "in_words",
    "known_space",
    "spec_of",
    "weighting_of",
]

ParameterWeights = str | Mapping[str, float] | None

AGREEMENT, NONE = "agreement", "none"
_ROUNDING = 0.02  # of weights that two devices measure of the same data
_SHOWN = 3  # parameters of the smallest and of the largest weights


def chosen_space(
    model: nn.Module, trajectory: Trajectory, patterns: Sequence[str] | None, sketch: Sketch, announced: bool
) -> tuple[ParameterSpace, str]:
    """The attributed parameters, and in words which these are.

    Lines say where the default leaves some out, where layers without a rule make the build slow, and where a sketch is
    larger than what it is of.
    """
    if patterns is None:
        names, which = trained_parameters(trajectory, model)
        space = ParameterSpace.of_names(model, names)
    else:
        space, which = ParameterSpace.from_model(model, patterns), f"those that parameters={list(patterns)} names"
    sizes = [parameter.numel() for parameter in model.parameters()]
    choice = f"{len(space.names)} of {len(sizes)} parameters, {space.size} of {sum(sizes)} numbers: {which}"
    if announced and patterns is None and len(space.names) < len(sizes):
        tqdm.write(printable(f"attributing through {choice} (parameters=['*'] takes all)"), file=sys.stderr)
    if announced and (slow := slow_parameters(model, space)):
        tqdm.write(printable(slow), file=sys.stderr)
    if announced and sketch.dim > space.size:
        tqdm.write(
            f"the sketch's k = {sketch.dim:,} is more than the {space.size:,} numbers of a gradient: "
            f"{exact_sketch(space.size)}",
            file=sys.stderr,
        )
    return space, choice


def weighting_of(
    given: ParameterWeights, task: Task, sketch: Sketch, trajectory: Trajectory, sizes: Sequence[int]
) -> str | Mapping[str, float]:
    """What `parameter_weights` of a build means: "none", "agreement", or numbers by glob.

    Args:
        given: as it was given.
        task: says the default.
        sketch: rows that are not projected are the gradients themselves, unless weights are asked for.
        trajectory: the run.
        sizes: number of examples of each stage.

    Raises:
        ValueError: it is something else, or agreement is asked for of a run without two checkpoints in a stage.
    """
    counts = [len(stage.checkpoints) for stage in trajectory.stages]
    if given is None:
        enough = any(c >= LEAST_CHECKPOINTS and n >= LEAST_EXAMPLES for c, n in zip(counts, sizes, strict=True))
        return task.parameter_weights if enough and sketch.kind != "identity" else NONE
    if isinstance(given, Mapping):
        return given if given else NONE
    if given not in (AGREEMENT, NONE):
        raise ValueError(
            f"parameter_weights must be {AGREEMENT!r}, {NONE!r} or numbers by glob, as {{'embed.*': 0.5}}; "
            f"got {given!r}"
        )
    if given == AGREEMENT and max(counts) < 2:
        raise ValueError(
            "parameter_weights='agreement' compares the gradients of several checkpoints, and no stage of the "
            "trajectory has two: give more checkpoints, or parameter_weights='none'"
        )
    return given


def known_space(
    space: ParameterSpace, model: nn.Module, given: ParameterWeights, weighting: str | Mapping[str, float], store: Store
) -> ParameterSpace | None:
    """The attributed parameters with their weights; None where these are to be measured.

    What a bank that is there has measured is not measured again once it has rows, which are compared with the data. By
    default a bank without weights goes on without.

    Args:
        space: the parameters.
        model: what has them.
        given: `parameter_weights` as it was given.
        weighting: as `weighting_of` gives it.
        store: where the bank lies, or will.
    """
    if isinstance(weighting, Mapping):
        found = space.weighted(weighting, model)
        return space if set(found.weights or ()) == {1.0} else found
    if weighting == NONE:
        return space
    if not store.exists("zarr.json"):
        return None
    bank = Bank(store.folder or store.location())
    there = bank.space_spec
    if given is None and "weights" not in there:
        return space
    begun = any(part.committed(c) for part in bank.parts for c in range(part.n_checkpoints))
    if begun and there.get("weighted_by") == AGREEMENT and tuple(there["names"]) == space.names:
        return ParameterSpace.from_spec(there)
    return None


def spec_of(space: ParameterSpace, weighting: str | Mapping[str, float]) -> dict[str, Any]:
    """What a bank keeps of its parameters, and of where their weights are from."""
    spec = space.spec()
    return spec if space.weights is None else {**spec, "weighted_by": AGREEMENT if weighting == AGREEMENT else "given"}


def in_words(space: ParameterSpace, weighting: str | Mapping[str, float]) -> str:
    """The weights, the smallest and largest of them."""
    if space.weights is None:
        return ""
    by = "how well checkpoints agree on them" if weighting == AGREEMENT else "parameter_weights"
    order = sorted(zip(space.weights, space.names, strict=True))
    shown = order if len(order) <= 2 * _SHOWN else [*order[:_SHOWN], *order[-_SHOWN:]]
    numbers = ", ".join(f"{name} {weight:.3g}" for weight, name in shown)
    return f"gradients weighted by {by}: {numbers}"


def as_begun(settings: Settings, there: Settings) -> Settings:
    """The settings, with the weights that the bank has if they are the same.

    Those that were measured may be another process's, if it was first, and differ by rounding.
    """
    own, begun = settings.parameters, there.parameters
    if own["names"] != begun["names"] or not ("weights" in own and "weights" in begun):
        return settings
    measured = own["weighted_by"] == begun.get("weighted_by") == AGREEMENT
    same = np.allclose(own["weights"], begun["weights"], rtol=_ROUNDING if measured else 0, atol=0)
    return replace(settings, parameters=begun) if same else settings
