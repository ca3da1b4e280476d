"""In any precision, scores of a whole run are those in double precision, or there are none."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.evaluate import ExactUnrolling

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-6),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-6),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
}
N = 8


def run_of(seed, powers, optimizer):
    """A linear model, whose inputs' columns, and so the gradients, have sizes of 10 to these powers; None for zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.0 if power is None else 10.0**power for power in powers])
    x = torch.randn(N, len(powers), generator=generator) * sizes
    y = torch.randn(N, 1, generator=generator)
    torch.manual_seed(seed)
    model = nn.Linear(len(powers), 1)
    data = TensorDataset(x, y)
    steps = [torch.randperm(N, generator=generator)[:4].tolist() for _ in range(5)]

    def scores(dtype):
        run = ExactUnrolling(
            copy.deepcopy(model).to(dtype), sp.Regression("squared"), data, steps, optimizer, progress=False
        )
        return np.asarray(run.score(data), dtype=np.float64)

    return scores


@pytest.mark.parametrize("name", OPTIMIZERS)
@example(seed=0, powers=[0, -25])  # squares vanish in float32
@example(seed=0, powers=[0, -20])  # and nearly so
@example(seed=0, powers=[0, None])
@given(
    seed=st.integers(0, 2**20),
    powers=st.lists(st.one_of(st.none(), st.integers(-36, 1)), min_size=1, max_size=4),
)
def test_single_precision_gives_the_scores_of_double_or_none(name, seed, powers):
    scores = run_of(seed, powers, OPTIMIZERS[name])
    expected = scores(torch.float64)
    try:
        got = scores(torch.float32)
    except sp.GradientError as error:
        assert "not finite in float32" in str(error)  # noqa: PT017
        assert any(power is not None and power < -15 for power in powers)
        return
    assert np.linalg.norm(got - expected) <= 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam"])
def test_a_square_that_vanishes_is_refused_with_the_remedy(name):
    with pytest.raises(sp.GradientError, match=r"not finite in float32: .*squares of small gradients vanish.*double"):
        run_of(0, [0, -25], OPTIMIZERS[name])(torch.float32)
    assert np.isfinite(run_of(0, [0, -25], OPTIMIZERS[name])(torch.float64)).all()
