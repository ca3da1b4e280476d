"""Laws 6 and 7: what storage costs, and what retraining says."""

import numpy as np
import pytest
import torch
from problems import Problem, classification
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import source_proj as sp


def logistic_descent(x: Tensor, y: Tensor, weights: Tensor, lr: float, decay: float, steps: int) -> Tensor:
    """Full-batch descent on (1/N) Σ w_i ℓ_i + decay/2 ‖θ‖² from zero, for many weightings at once, in float64.

    weights: (M, N), ones but for the example that is left out; 1/N stays fixed. Returns θ, (M, d, 2).
    """
    theta = torch.zeros(len(weights), x.shape[1], 2, dtype=torch.float64)
    hot = nn.functional.one_hot(y, 2).double()
    for _ in range(steps):
        error = (torch.softmax(x @ theta, -1) - hot) * weights[..., None]
        theta = theta - lr * (x.T @ error / len(x) + decay * theta)
    return theta


def margin(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    logits = x @ theta
    rows = torch.arange(len(y))
    return logits[..., rows, y] - logits[..., rows, 1 - y]


@pytest.fixture(scope="module")
def convex(tmp_path_factory):
    """Bank, model and queries of a convex problem with N >= 50 d, and what leaving each example out changed, (Q, N)."""
    generator = torch.Generator().manual_seed(0)
    n, d, lr, decay, steps = 300, 3, 0.5, 1e-2, 400
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = (x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + torch.randn(n, generator=generator) > 0).long()
    qx = torch.randn(20, d, generator=generator, dtype=torch.float64)
    qy = torch.randint(2, (20,), generator=generator)

    full = torch.ones(1, n, dtype=torch.float64)
    marks = [steps // 4 * (i + 1) for i in range(4)]
    states = [logistic_descent(x, y, full, lr, decay, mark)[0].T.float() for mark in marks]
    model = nn.Linear(d, 2, bias=False)
    trajectory = sp.Trajectory(
        [sp.Checkpoint({"weight": state}, mark, lr=lr) for state, mark in zip(states, marks, strict=True)],
        optimizer=sp.SGD(weight_decay=decay),
        segments=1,
    )
    train, queries = TensorDataset(x.float(), y), TensorDataset(qx.float(), qy)
    problem = Problem(model, sp.Classification(), trajectory, train, queries)
    bank = problem.build(tmp_path_factory.mktemp("convex") / "bank", batch_size=100)
    left_out = 1 - torch.eye(n, dtype=torch.float64)
    before = margin(logistic_descent(x, y, full, lr, decay, steps), qx, qy)
    after = margin(logistic_descent(x, y, left_out, lr, decay, steps), qx, qy)
    return bank, model, queries, (after - before).T.numpy()


@pytest.mark.parametrize("curvature", ["gauss_newton", "empirical_fisher"])
def test_leave_one_out_of_a_convex_problem(convex, curvature):
    """Law 7: fixed 1/N; correlation above .99, slope 1 ± .05 (with the true curvature).

    The empirical Fisher is no Hessian: it must rank as well as it can (correlation above .9), its scale is its own.
    """
    bank, model, queries, actual = convex
    scores = sp.Source(bank, model=model, curvature=curvature, progress=False).score(queries)
    predicted = np.stack([scores.predict_removal([z]).values for z in range(actual.shape[1])], axis=1)
    correlation = np.corrcoef(predicted.ravel(), actual.ravel())[0, 1]
    slope = (predicted * actual).sum() / (predicted**2).sum()
    if curvature == "gauss_newton":
        assert correlation > 0.99
        assert slope == pytest.approx(1, abs=0.05)
    else:
        assert correlation > 0.9


def test_storage_changes_scores_less_than_the_sketch_does(tmp_path):
    """Law 6."""
    problem = classification(n=120)

    def scores(name: str, seed: int, kind: str) -> np.ndarray:
        bank = problem.build(tmp_path / name, sp.Sketch(dim=32, seed=seed), storage=kind)
        return np.asarray(sp.Source(bank, model=problem.model, progress=False).score(problem.queries))

    exact = [scores(f"exact{seed}", seed, "float32") for seed in range(3)]
    noise = np.mean([np.abs(exact[a] - exact[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
    for storage in ("int8", "float16"):
        stored = [scores(f"{storage}{seed}", seed, storage) for seed in range(3)]
        change = np.mean([np.abs(e - s).mean() for e, s in zip(exact, stored, strict=True)])
        assert 0 < change < noise / 4, storage
