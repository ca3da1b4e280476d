"""What study (l) chooses dampings by, on gradients whose signal and noise are known."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture
def damping(monkeypatch):
    for extra in ("sklearn", "pandas"):
        pytest.importorskip(extra)
    monkeypatch.syspath_prepend(str(PAPER))
    return importlib.import_module("_damping")


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_agreement_is_the_share_of_signal_in_the_mean(damping, share):
    """Of the mean of two measurements, signal + noise each: signal / (signal + noise / 2)."""
    signal, noise = share**0.5 * normal(4000, 96, seed=0), (2 * (1 - share)) ** 0.5 * normal(2, 4000, 96, seed=1)
    scales = torch.logspace(-6, 3, 96)  # coordinates differ in size, as eigendirections do
    found = damping.agreement((signal + noise[0]) * scales, (signal + noise[1]) * scales)
    # A band's correlation is known to 1/√(4000 · 4): five times that, and twice as much for what is made of it.
    assert (found - share).abs().max() <= 10 / (4000 * 4) ** 0.5


def test_held_out_losses_are_the_naive_ones(damping):
    rows, query = normal(2, 30, 8, seed=2) * torch.logspace(0, -2, 8), normal(5, 8, seed=3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).numpy()
    used, held = (rows.numpy()[:, part].reshape(-1, 8).astype(float) for part in (order[:15], order[15:]))
    h, other = used.T @ used / len(used), held.T @ held / len(held)
    for place, multiple in enumerate(damping.MULTIPLES):
        shifted = h + multiple * np.trace(h) / 8 * np.eye(8)
        inverse = np.linalg.inv(shifted)
        likelihood = np.linalg.slogdet(shifted)[1] + np.mean([g @ inverse @ g for g in held])
        solutions = query.double().numpy() @ inverse
        objective = sum(x @ other @ x - 2 * x @ q for x, q in zip(solutions, query.double().numpy(), strict=True))
        assert float(damping.held_out_likelihood(rows, query)[place]) == pytest.approx(likelihood, rel=1e-4)
        assert float(damping.held_out_objective(rows, query)[place]) == pytest.approx(objective, rel=1e-4)
