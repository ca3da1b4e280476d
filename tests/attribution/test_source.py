"""Law 3 of the design: SOURCE against its naive twin and its special cases, all with exact sketches."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from problems import Problem, classification, naive_source, regression, source
from torch import nn
from torch.utils.data import Subset

import source_proj as sp


@pytest.mark.parametrize("damping", [None, 0.0, 0.05, "noise"])
@pytest.mark.parametrize("segments", [1, 2, 4, [[0], [1, 2, 3]]])
def test_scores_equal_the_papers_recursion(blobs, segments, damping):
    problem, bank = blobs
    method = source(problem, bank, segments=segments, damping=damping)
    features = method.sketch(problem.queries)
    groups = segments if isinstance(segments, list) else [list(g) for g in np.array_split(range(4), segments)]
    rho = damping if isinstance(damping, float) else 0.0  # an exact sketch has no noise
    expected = naive_source(bank, features[0].at(bank.final_checkpoint()), [groups], rho)
    np.testing.assert_allclose(method.score(features), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_damping_is_the_trace_over_k(tmp_path, seed):
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=20, seed=seed))
    method = source(problem, bank, query_gradient="final")
    features = method.sketch(problem.queries)
    expected = naive_source(bank, features[0].at(bank.final_checkpoint()), [[[0, 1], [2, 3]]], None)
    np.testing.assert_allclose(method.score(features), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert all(segment.damping == pytest.approx(segment.trace / 20) for segment in method.segments)


def test_query_gradients_are_means_over_the_last_stages_checkpoints(staged):
    problem, bank = staged
    last = [bank.checkpoint(1, c) for c in range(bank.stages[1].n_checkpoints)]
    method = source(problem, bank, query_gradient="mean")
    features = method.sketch(problem.queries)
    assert set(features[0].rows) == {point.hash() for point in last}
    mean = torch.stack([features[0].at(point) for point in last]).mean(0)
    expected = naive_source(bank, mean, [[[0, 1]], [[0, 1], [2]]], 0.0)
    scores = method.score(features)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(method.by_segment(features).total(), scores, rtol=1e-4, atol=1e-5 * np.abs(scores).max())
    final = source(problem, bank, query_gradient="final").score(problem.queries)
    assert not np.allclose(final, scores, rtol=0.01, atol=0)
    # Features of the final weights alone do not do for the mean.
    with pytest.raises(sp.MismatchError, match="compute them with the method's own"):
        method.score(source(problem, bank, query_gradient="final").sketch(problem.queries))


@pytest.mark.parametrize("method", [sp.Source, partial(sp.InfluenceFunction, average=True)])
@pytest.mark.parametrize(("sketch", "default"), [(sp.Sketch(dim=20), "mean"), (None, "final")])
def test_query_gradients_are_means_by_default_unless_the_sketch_is_exact(tmp_path, sketch, default, method):
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sketch) if sketch is not None else problem.build(tmp_path / "bank")
    assert bank.sketch.is_exact == (default == "final")
    options = {"model": problem.model, "progress": False}
    scores = {
        kind: np.asarray(method(bank, query_gradient=kind, **options).score(problem.queries))
        for kind in (None, "mean", "final")
    }
    np.testing.assert_array_equal(scores[None], scores[default])
    assert not np.allclose(scores["mean"], scores["final"], rtol=0.01, atol=0)


def test_time_scale_multiplies_the_learning_rates(blobs, tmp_path):
    """As if the run had gone at half the rate, and never the fit of another time scale from the cache."""
    problem, bank = blobs
    (stage,) = problem.trajectory.stages
    slow = replace(stage, lr_schedule=[0.5 * rate for rate in rates_of(stage)])
    halved = Problem(problem.model, problem.task, sp.Trajectory.from_stages([slow]), problem.train, problem.queries)
    expected = source(halved, halved.build(tmp_path / "bank")).score(problem.queries)
    found = source(problem, bank, time_scale=0.5).score(problem.queries)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(np.asarray(expected)).max())
    assert not np.allclose(found, source(problem, bank).score(problem.queries), rtol=0.01, atol=0)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="time_scale must be a number > 0"):
            source(problem, bank, time_scale=bad)


def rates_of(stage):
    """One learning rate for each update."""
    if stage.lr_schedule is None:
        return [stage.checkpoints[0].lr] * stage.checkpoints[-1].step
    if callable(stage.lr_schedule):
        return [stage.lr_schedule(step) for step in range(stage.checkpoints[-1].step)]
    return list(stage.lr_schedule)


@pytest.mark.parametrize("method", [sp.Source, sp.InfluenceFunction])
def test_an_unknown_query_gradient_is_refused(blobs, method):
    with pytest.raises(ValueError, match="query_gradient must be 'mean', 'final' or None, got 'last'"):
        method(blobs[1], query_gradient="last")


def test_stages_equal_the_papers_recursion(staged):
    problem, bank = staged
    method = source(problem, bank)
    features = method.sketch(problem.queries)
    expected = naive_source(bank, features[0].at(bank.final_checkpoint()), [[[0, 1]], [[0, 1], [2]]], 0.0)
    scores = method.score(features)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert scores.train_ids[0] == ("pretrain", 0)
    assert scores.train_ids[-1] == ("finetune", 14)
    assert scores.stage_sizes == (30, 15)


@pytest.mark.parametrize("which", ["blobs", "staged"])
def test_scores_from_b_equal_the_segments_sum(which, request):
    problem, bank = request.getfixturevalue(which)
    method = source(problem, bank)
    parts, scores = method.by_segment(problem.queries), method.score(problem.queries)
    assert parts.values.shape == (len(method.segments), *scores.shape)
    np.testing.assert_allclose(parts.total(), scores, rtol=1e-4, atol=1e-5 * np.abs(scores.values).max())


def test_an_example_has_part_only_in_its_own_stage(staged):
    problem, bank = staged
    parts = source(problem, bank).by_segment(problem.queries).values
    assert not parts[0, :, 30:].any()
    assert not parts[1:, :, :30].any()
    assert parts[0, :, :30].any()
    assert parts[1, :, 30:].any()


@pytest.mark.parametrize("method", [sp.Source, sp.InfluenceFunction])
@pytest.mark.parametrize(("problem", "named"), [(regression, "gauss_newton"), (classification, "empirical_fisher")])
def test_the_default_curvature_is_the_tasks(tmp_path, method, problem, named):
    known = problem()
    bank = known.build(tmp_path / "bank", sketch=sp.Sketch(dim=16))
    options = {"model": known.model, "progress": False}
    default, same, other = (
        method(bank, **options, **choice).score(known.queries).to_numpy()
        for choice in (
            {},
            {"curvature": named},
            {"curvature": {"gauss_newton", "empirical_fisher"}.difference({named}).pop()},
        )
    )
    np.testing.assert_array_equal(default, same)
    assert not np.allclose(default, other, rtol=1e-3)


@pytest.mark.parametrize("method", [sp.Source, sp.InfluenceFunction])
@pytest.mark.parametrize(("draws", "named"), [(0, "empirical_fisher"), (1, "sampled_fisher"), (None, "sampled_fisher")])
def test_a_language_models_curvature_is_of_sampled_labels_where_it_has_them(tmp_path, method, draws, named):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    tokens = torch.randint(7, (9, 5))
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=5, lr=0.1)])
    data = [{"input": row, "labels": row} for row in tokens]
    bank = sp.build(
        model, sp.CausalLM(), run, data, tmp_path / "bank", sketch=sp.Sketch(16), sampled_fisher=draws, progress=False
    )
    default, chosen = (
        method(bank, model=model, progress=False, **choice).score(data[:2]).to_numpy()
        for choice in ({}, {"curvature": named})
    )
    np.testing.assert_array_equal(default, chosen)
    assert method(bank, model=model, progress=False).curvature == named


@pytest.mark.parametrize("curvature", ["empirical_fisher", "gauss_newton", "sampled_fisher"])
def test_dual_route_gives_the_same_scores(blobs, tmp_path, curvature):
    problem, _ = blobs
    small = Problem(
        problem.model, problem.task, problem.trajectory, Subset(problem.train, range(6)), problem.queries
    )  # fmt: skip
    bank = small.build(tmp_path / "bank", sampled_fisher=1)
    few = source(small, bank, curvature=curvature, segments=2, damping=0.01)
    assert all(few._of(bank).hessian(s).values.numel() < bank.sketch.dim for s in few.segments)
    scores = few.score(problem.queries)
    dense = np.zeros(scores.shape)
    rows = [torch.cat([b.rows for b in bank.stages[0].iter_rows(c)]).double() for c in range(4)]
    d1 = [torch.cat([b.d1 for b in bank.stages[0].iter_rows(c)]).double() for c in range(4)]
    weights = {
        "empirical_fisher": d1,
        "gauss_newton": [torch.cat([b.d2 for b in bank.stages[0].iter_rows(c)]).double().sqrt() for c in range(4)],
    }
    eye, carried = torch.eye(bank.sketch.dim, dtype=torch.float64), few.sketch(problem.queries)[0]
    query = carried.at(bank.final_checkpoint()).double()
    for segment in reversed(few.segments):
        if curvature == "sampled_fisher":
            a = [
                torch.cat([b.rows for b in bank.stages[0].iter_rows(c, "sampled_fisher")]).double()
                for c in segment.checkpoints
            ]
        else:
            a = [rows[c] * weights[curvature][c][:, None] for c in segment.checkpoints]
        hessian = sum(one.T @ one for one in a) / (6 * len(a))
        damped = hessian + (segment.decay + 0.01) * eye
        c = torch.linalg.solve(damped, eye - torch.matrix_exp(-segment.time * damped))
        mean = sum(rows[i] * d1[i][:, None] for i in segment.checkpoints) / len(a)
        dense -= (query @ c @ mean.T).numpy() / 6
        query = query @ torch.matrix_exp(-segment.time * (hessian + segment.decay * eye))
    np.testing.assert_allclose(scores, dense, rtol=1e-4, atol=1e-5 * np.abs(dense).max())
