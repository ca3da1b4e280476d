"""Law 3 of the design: what SOURCE becomes in special cases, with exact sketches."""

import numpy as np
import pytest
import torch
from problems import Problem, classification, regression, source
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp


def rescaled(problem: Problem, factor: float, **options) -> Problem:
    """The same checkpoints, as if the learning rate had been ``factor`` times as large and there was no decay."""
    checkpoints = [sp.Checkpoint(c.load(), c.step, lr=c.lr * factor) for c in problem.trajectory.stages[0].checkpoints]
    trajectory = sp.Trajectory(checkpoints, **options)
    return Problem(problem.model, problem.task, trajectory, problem.train, problem.queries)


def test_long_training_is_influence_functions_on_the_range(tmp_path):
    """Law 3a: one segment, λ = 0, s → ∞; what lies in the null space of H grows with s."""
    problem = regression()
    x, y = problem.train.tensors
    dead = Problem(  # the last feature never occurs in training, so H has a null space
        problem.model,
        problem.task,
        problem.trajectory,
        TensorDataset(x * torch.tensor([1, 1, 1, 0.0]), y),
        problem.queries,
    )  # fmt: skip
    endless = rescaled(dead, 1e6)
    bank = endless.build(tmp_path / "bank")
    options = {"curvature": "gauss_newton", "damping": None}
    scores = source(endless, bank, segments=1, **options).score(problem.queries)
    influence = sp.InfluenceFunction(bank, model=problem.model, average=True, progress=False, **options)
    np.testing.assert_allclose(scores, influence.score(problem.queries), rtol=1e-3, atol=1e-4 * np.abs(scores).max())
    assert float(np.abs(np.asarray(scores)).max()) > 0


def test_the_null_space_part_is_the_plain_gradient(tmp_path):
    """Law 3a, the rest: a gradient outside the range of H is weighted by s alone."""
    problem = regression()
    bank = problem.build(tmp_path / "bank")
    method = source(problem, bank, segments=1, curvature="gauss_newton", damping=None)
    spectrum = method._of(bank).hessian(method.segments[0])
    spectrum.values.zero_()  # as if the loss were flat
    s = method.segments[0].time
    fresh = source(problem, bank, segments=1, curvature="gauss_newton", damping=None, cache=False)._of(bank)
    (block,) = fresh.blocks
    operator = block.operators(fresh.segments)
    block.hessian = lambda _: spectrum
    torch.testing.assert_close(block.operators(fresh.segments)[0][0], s * torch.eye(4, dtype=torch.float64))
    assert not torch.allclose(operator[0][0], s * torch.eye(4, dtype=torch.float64))


def test_short_training_is_tracin(tmp_path):
    """Law 3b: one checkpoint, s → 0."""
    problem = classification(checkpoints=1, segments=1)
    gaps = []
    for factor in (1e-2, 1e-3):
        brief = rescaled(problem, factor)
        bank = brief.build(tmp_path / f"bank{factor}")
        scores = np.asarray(source(brief, bank, damping=None).score(problem.queries))
        tracin = np.asarray(sp.TracIn(bank, model=problem.model, progress=False).score(problem.queries))
        gaps.append(np.abs(scores - tracin).max() / np.abs(tracin).max())
    assert gaps[0] < 0.05
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.2)


def test_quadratic_loss_equals_unrolled_descent(tmp_path):
    """Law 3c: full-batch descent on least squares, g frozen at its mean, agrees to O(η)."""
    gaps = []
    for refine in (1, 4, 16):
        problem = regression()
        x, y = problem.train.tensors
        lr, steps = 0.04 / refine, 40 * refine
        weights = problem.trajectory.final.load()
        trajectory = sp.Trajectory([sp.Checkpoint(weights, steps, lr=lr)])
        frozen = Problem(problem.model, problem.task, trajectory, problem.train, problem.queries)
        bank = frozen.build(tmp_path / f"bank{refine}")
        scores = np.asarray(
            source(frozen, bank, curvature="gauss_newton", damping=None).score(problem.queries)
        )  # fmt: skip
        w = weights["weight"].double().T
        gradient = 2 * (x.double() @ w - y.double()) * x.double()  # (n, d), frozen
        hessian = 2 * x.double().T @ x.double() / len(x)
        moved = torch.zeros_like(gradient)
        for _ in range(steps):  # the derivative of descent's iterates in an example's weight
            moved = moved - lr * (moved @ hessian + gradient / len(x))
        qx, qy = (t.double() for t in problem.queries.tensors)
        unrolled = (2 * (qx @ w - qy) * qx) @ moved.T
        gaps.append(float(np.abs(scores - unrolled.numpy()).max() / unrolled.abs().max()))
    assert gaps[0] < 0.1
    assert gaps[1] < gaps[0] / 3
    assert gaps[2] < gaps[1] / 3


def test_more_segments_converge_to_unrolling_moving_gradients(tmp_path):
    """Law 3c, the rest: with gradients that move, the error falls as segments → steps."""
    torch.manual_seed(3)
    n, d, lr, steps = 20, 3, 0.02, 64
    x = torch.randn(n, d)
    y = x @ torch.randn(d, 1) + 0.1 * torch.randn(n, 1)
    model = nn.Linear(d, 1, bias=False)
    w = model.weight.detach().double().T.clone()
    hessian, moved, states = 2 * x.double().T @ x.double() / n, torch.zeros(n, d, dtype=torch.float64), []
    for _ in range(steps):
        gradient = 2 * (x.double() @ w - y.double()) * x.double()
        moved = moved - lr * (moved @ hessian + gradient / n)
        states.append({"weight": w.T.float().clone()})  # the weights at which the step's gradient is taken
        w = w - lr * gradient.mean(0)[:, None]
    queries = TensorDataset(torch.randn(4, d), torch.randn(4, 1))
    final = sp.Checkpoint({"weight": w.T.float()}, steps, lr=lr)
    qx, qy = (t.double() for t in queries.tensors)
    unrolled = ((2 * (qx @ w - qy) * qx) @ moved.T).numpy()
    checkpoints = [sp.Checkpoint(state, i + 1, lr=lr) for i, state in enumerate(states)]
    course = sp.Trajectory.from_stages([sp.Stage("train", checkpoints, sp.SGD(), final=final)])
    problem = Problem(model, sp.Regression("squared"), course, TensorDataset(x, y), queries)
    bank = problem.build(tmp_path / "bank")
    gaps = []
    for segments in (1, 4, 16, 64):
        cut = source(problem, bank, segments=segments, curvature="gauss_newton", damping=None, cache=False)
        gaps.append(np.abs(np.asarray(cut.score(queries)) - unrolled).max() / np.abs(unrolled).max())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[3] < gaps[0] / 10  # what is left is O(η): continuous time against steps
