"""Rows against one autograd pass per example, for models that hypothesis puts together.

A hundred in every run. Thousands, by one command:

    DIFFERENTIAL_EXAMPLES=5000 python -m pytest tests/differential/test_random_models.py
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import BARE, STEPS, RandomModel, make_batch, value
from torch import Tensor, nn

from source_proj.gradients import ParameterSpace, Refuted, gradient_engine
from source_proj.gradients.batches import take
from source_proj.sketch import Sketch

EXAMPLES = int(os.environ.get("DIFFERENTIAL_EXAMPLES", "0"))
HOOKED = """
    attention broadcast by_time capacity channels checkpointed conv1d_of_transformers convolution detached embedded
    flattened image in_place normalised plain positions repeated reused tied unused
"""
OFTEN = ["plain", "flattened", "embedded", "attention"]  # served by hooks: what is wrong elsewhere shows beside them


def plain_rows(model: nn.Module, space: ParameterSpace, batch: Any, size: int) -> Tensor:
    """The naive twin: one backward pass per example."""
    parameters = space.parameters(model)
    rows = []
    for b in range(size):
        gradients = torch.autograd.grad(
            value(model, take(batch, [b], size))[0], list(parameters.values()), allow_unused=True
        )
        pairs = zip(parameters.values(), gradients, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
    return torch.stack(rows)


def engine_rows(model: nn.Module, space: ParameterSpace, batches: list[tuple[Any, int]]) -> Tensor:
    """As the bank and the queries take them: all batches of a scope again where a proof fails."""
    engine = gradient_engine(model, space, Sketch(kind="identity", dim=space.size))
    engine.begin(1)
    for _ in range(2):
        try:
            return torch.cat([engine.sketch(value, batch, size)[1] for batch, size in batches])
        except Refuted:
            continue
    raise AssertionError("the general path was refuted")


@settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    steps=st.lists(st.one_of(st.sampled_from(sorted(STEPS)), st.sampled_from(OFTEN)), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    gradients=st.lists(st.sampled_from(["all", "all", "some", "none"]), min_size=3, max_size=3),
    frozen=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_rows_equal_one_backward_pass_per_example(
    steps: list[str], sizes: list[int], gradients: list[str], frozen: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = RandomModel(steps).eval()
    space = ParameterSpace.from_model(model, ["!tokens.*", "!*.0.*"] if frozen and len(steps) > 1 else None)
    batches = [(make_batch(size, which), size) for size, which in zip(sizes, gradients, strict=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a batching rule
        got = engine_rows(model, space, batches)
    expected = torch.cat([plain_rows(model, space, batch, size) for batch, size in batches])
    error = (got - expected).norm(dim=1)
    assert (error <= 1e-5 * expected.norm(dim=1)).all(), error / expected.norm(dim=1)


@pytest.mark.parametrize("name", HOOKED.split())
def test_hooks_serve_what_they_can(name: str) -> None:
    """Else the comparison above would be one of the general path with itself."""
    torch.manual_seed(0)
    model = RandomModel([name]).eval()
    engine = gradient_engine(model, ParameterSpace.from_model(model), Sketch(16), "hooks")
    for size in (4, 1, 3):
        engine.sketch(value, make_batch(size, "all"))
    assert engine.proof.summary()["general"] == {}


@pytest.mark.parametrize("name", BARE.split())
def test_bare_parameters_are_followed(name: str) -> None:
    """Likewise."""
    torch.manual_seed(0)
    model = RandomModel(["plain", name]).eval()
    engine = gradient_engine(model, ParameterSpace.from_model(model), Sketch(16))
    for size in (4, 1, 3):
        engine.sketch(value, make_batch(size, "all"))
    assert "followed by themselves" in engine.reason
    assert engine.proof.summary()["general"] == {}


@pytest.mark.parametrize("name", sorted(STEPS))
def test_each_step_by_itself_and_behind_a_layer(name: str) -> None:
    """Equal lengths first, then ragged ones, then no gradient at all."""
    for steps in ([name], ["plain", name, "flattened"]):
        torch.manual_seed(0)
        model = RandomModel(steps).eval()
        space = ParameterSpace.from_model(model)
        batches = [(make_batch(size, which), size) for size, which in ((2, "none"), (4, "all"), (3, "all"), (1, "all"))]
        for some in (0, 1):
            batches[some][0]["inputs"]["mask"][:] = torch.arange(6) < 4
            batches[some][0]["inputs"]["flag"][:] = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = engine_rows(model, space, batches)
        expected = torch.cat([plain_rows(model, space, batch, size) for batch, size in batches])
        error = (got - expected).norm(dim=1)
        assert (error <= 1e-5 * expected.norm(dim=1)).all(), (steps, error / expected.norm(dim=1))
