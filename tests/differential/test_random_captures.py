"""Rows captured while training against one autograd pass per example, for models that hypothesis puts together."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from random_models import BARE, STEPS, RandomModel, make_batch, value
from test_random_models import HOOKED, plain_rows
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

import source_proj as sp
from source_proj.gradients import ParameterSpace

EXAMPLES = int(os.environ.get("DIFFERENTIAL_EXAMPLES", "0"))
CAPTURED = sorted({*HOOKED.split(), *BARE.split()} - {"checkpointed"})
OFTEN = [*CAPTURED, "plain", "flattened", "embedded", "attention"]


def captured_and_plain(steps: list[str], sizes: list[int], gradients: list[str], seed: int) -> tuple[Tensor, Tensor]:
    """Rows (N, d) of a run that hardly moves, each example seen once, and those of a backward pass for each.

    Raises:
        GradientError: the model is refused.
    """
    torch.manual_seed(seed)
    model = RandomModel(steps).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | _SpectralNorm):
            module.eval()  # as capture asks for of the one, and each pass changes the other
    space = ParameterSpace.from_model(model)
    batches = [make_batch(size, which) for size, which in zip(sizes, gradients, strict=False)]
    expected = torch.cat([plain_rows(model, space, batch, len(batch["labels"])) for batch in batches])
    optimizer, n = torch.optim.SGD(model.parameters(), lr=1e-12), sum(sizes)
    sketch = sp.Sketch(space.size, "identity")
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of examples without a gradient
        recorder = sp.Recorder(
            model, optimizer, Path(folder) / "run", capture=sketch, task=sp.Classification(), examples=n
        )
        try:
            for ids, batch in zip(torch.arange(n).split(sizes), batches, strict=True):
                optimizer.zero_grad()
                value(model, batch).mean().backward()
                optimizer.step()
                recorder.step(ids=ids)
            bank = recorder.bank(storage="float32")
        finally:
            recorder.close()
        rows = torch.cat([part.rows * part.d1[:, None] for part in bank.stages[0].iter_rows(0)])
    return rows, expected


def assert_same(rows: Tensor, expected: Tensor) -> None:
    error = (rows - expected).norm(dim=1)
    scale = expected.norm(dim=1) + 1e-3 * expected.norm()  # of steps of other sizes, weighed alike
    assert (error <= 2e-5 * scale).all(), error / scale


@settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    steps=st.lists(st.one_of(st.sampled_from(sorted(STEPS)), st.sampled_from(OFTEN)), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    gradients=st.lists(st.sampled_from(["all", "some"]), min_size=3, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_rows_are_their_examples_or_the_model_is_refused(
    steps: list[str], sizes: list[int], gradients: list[str], seed: int
) -> None:
    try:
        rows, expected = captured_and_plain(steps, sizes, gradients, seed)
    except sp.GradientError as error:
        event("refused")
        said = ("parameters=", "after training", "do not sum to the gradient")  # the last by the law, at a later step
        assert any(words in str(error) for words in said), error  # noqa: PT017
        return
    event("captured")
    assert_same(rows, expected)


@pytest.mark.parametrize("name", CAPTURED)
def test_these_are_captured(name: str) -> None:
    """Else the comparison above might be of nothing."""
    for steps in ([name], ["plain", name, "flattened"]):
        assert_same(*captured_and_plain(steps, [4, 1, 3, 3], ["all", "some", "some", "all"], seed=1))
