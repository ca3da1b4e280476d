"""Law 3 of the design: SOURCE against its naive twin and its special cases, all with exact sketches."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from problems import Problem, classification, naive_source, regression, two_stages
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import source_proj as sp
from source_proj.attribution.fits import FitCache


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> tuple[Problem, sp.Bank]:
    problem = classification()
    return problem, problem.build(tmp_path_factory.mktemp("bank") / "bank", sampled_fisher=2)


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> tuple[Problem, sp.Bank]:
    problem = two_stages()
    return problem, problem.build(tmp_path_factory.mktemp("bank") / "bank")


def source(problem: Problem, bank: sp.Bank, **options) -> sp.Source:
    return sp.Source(bank, model=problem.model, progress=False, **options)


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


@pytest.mark.parametrize("curvature", ["empirical_fisher", "gauss_newton", "sampled_fisher"])
def test_dual_route_gives_the_same_scores(blobs, tmp_path, curvature):
    problem, _ = blobs
    small = Problem(
        problem.model, problem.task, problem.trajectory, Subset(problem.train, range(6)), problem.queries
    )  # fmt: skip
    bank = small.build(tmp_path / "bank", sampled_fisher=1)
    few = source(small, bank, curvature=curvature, segments=2, damping=0.01)
    assert all(few._of(bank).spectrum(s).values.numel() < bank.sketch.dim for s in few.segments)
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
    spectrum = method._of(bank).spectrum(method.segments[0])
    spectrum.values.zero_()  # as if the loss were flat
    s = method.segments[0].time
    fresh = source(problem, bank, segments=1, curvature="gauss_newton", damping=None, cache=False)._of(bank)
    operator = fresh.operators(fresh.segments)
    fresh.spectrum = lambda _: spectrum
    torch.testing.assert_close(fresh.operators(fresh.segments)[0][0], s * torch.eye(4))
    assert not torch.allclose(operator[0][0], s * torch.eye(4))


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
    gaps = []
    for segments in (1, 4, 16, 64):
        checkpoints = [sp.Checkpoint(state, i + 1, lr=lr) for i, state in enumerate(states)]
        stage = sp.Stage("train", checkpoints, sp.SGD(), segments=segments, final=final)
        problem = Problem(
            model, sp.Regression("squared"), sp.Trajectory.from_stages([stage]), TensorDataset(x, y), queries
        )
        bank = problem.build(tmp_path / f"bank{segments}")
        scores = source(problem, bank, curvature="gauss_newton", damping=None, cache=False).score(queries)
        gaps.append(np.abs(np.asarray(scores) - unrolled).max() / np.abs(unrolled).max())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[3] < gaps[0] / 10  # what is left is O(η): continuous time against steps


def test_permuting_rows_permutes_scores(blobs, tmp_path):
    problem, bank = blobs
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    x, y = problem.train.tensors
    shuffled = Problem(
        problem.model, problem.task, problem.trajectory, TensorDataset(x[order], y[order]), problem.queries
    )
    other = shuffled.build(tmp_path / "bank")
    scores = np.asarray(source(problem, bank).score(problem.queries))
    permuted = np.asarray(source(shuffled, other).score(problem.queries))
    np.testing.assert_allclose(permuted, scores[:, order], rtol=1e-4, atol=1e-5 * np.abs(scores).max())


@pytest.mark.parametrize("verb", ["top_k", "bottom_k"])
@pytest.mark.parametrize("height", [1, 7, 1000])
def test_streaming_equals_sorting_all(blobs, monkeypatch, verb, height):
    problem, bank = blobs
    monkeypatch.setattr("source_proj.attribution.attributor._MIN_ROWS", height)
    monkeypatch.setattr("source_proj.attribution.attributor._BLOCK_SCORES", 1)
    method = source(problem, bank)
    features = method.sketch(problem.queries)
    streamed, sorted_ = getattr(method, verb)(features, 5), getattr(method.score(features), verb)(5)
    np.testing.assert_array_equal(streamed.indices, sorted_.indices)
    np.testing.assert_allclose(streamed.scores, sorted_.scores, rtol=1e-5)
    assert streamed.ids == sorted_.ids
    with pytest.raises(ValueError, match=r"1\.\.40"):
        method.top_k(features, 41)


def test_self_influence_is_the_score_of_the_own_loss(blobs):
    problem, bank = blobs
    method = source(problem, bank)
    influence = method.self_influence()
    rows = torch.cat([b.rows * b.d1[:, None] for b in bank.stages[0].iter_rows(3)])  # ∇ℓ at the last checkpoint
    own = sp.QueryFeatures({bank.final_checkpoint().hash(): -rows}, list(range(40)), bank.sketch.spec())
    np.testing.assert_allclose(influence, np.diag(method.score(own)), rtol=1e-4, atol=1e-7)
    assert (influence > 0).mean() > 0.9


def test_self_influence_asks_with_mean_gradients_where_queries_do(blobs):
    """By the naive twin: the query is each example, its gradient minus the mean loss gradient."""
    problem, bank = blobs
    stage = bank.stages[0]
    rows = torch.stack([torch.cat([b.rows * b.d1[:, None] for b in stage.iter_rows(c)]) for c in range(4)])
    expected = np.diag(naive_source(bank, -rows.mean(0), [[[0, 1, 2, 3]]], 0.0))
    found = source(problem, bank, segments=1, query_gradient="mean").self_influence()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    assert not np.allclose(found, source(problem, bank, segments=1).self_influence(), rtol=0.01, atol=0)


def test_self_influence_of_an_early_stage_ends_with_it(staged, tmp_path):
    problem, bank = staged
    early = Problem(
        problem.model, problem.task, sp.Trajectory.from_stages(problem.trajectory.stages[:1]),
        {"pretrain": problem.train["pretrain"]}, problem.queries,
    )  # fmt: skip
    alone = source(early, early.build(tmp_path / "bank")).self_influence()
    np.testing.assert_allclose(source(problem, bank).self_influence()[:30], alone, rtol=1e-4, atol=1e-7)


def test_ensembles_average_final_scores(tmp_path):
    problems = [classification(seed=0), classification(seed=1)]
    banks = []
    for seed, problem in enumerate(problems):
        problem.train = problems[0].train
        banks.append(problem.build(tmp_path / str(seed), sp.Sketch(dim=16, seed=seed)))
    queries = problems[0].queries
    both = source(problems[0], banks)
    single = [np.asarray(source(p, b).score(queries)) for p, b in zip(problems, banks, strict=True)]
    np.testing.assert_allclose(both.score(queries), np.mean(single, axis=0), rtol=1e-4, atol=1e-6)
    parts = both.by_segment(queries).total()
    np.testing.assert_allclose(parts, np.mean(single, axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(both.top_k(queries, 3).indices, both.score(queries).top_k(3).indices)


def test_fit_is_cached_and_keyed_by_what_it_depends_on(blobs, tmp_path):
    problem, _ = blobs
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=20))
    first = source(problem, bank).score(problem.queries)
    cache = FitCache(bank)
    entries = {p.name for p in cache.folder.iterdir() if p.is_dir()}
    assert len([name for name in entries if name.startswith("source-")]) == 1
    again = source(problem, sp.open(tmp_path / "bank")).score(problem.queries)
    np.testing.assert_array_equal(again, first)
    assert {p.name for p in cache.folder.iterdir() if p.is_dir()} == entries
    for options in ({"damping": None}, {"segments": 1}, {"curvature": "gauss_newton"}, {"damping": 0.5}):
        other = source(problem, bank, **options).score(problem.queries)
        assert not np.allclose(other, first)
    assert len([p for p in cache.folder.iterdir() if p.name.startswith("source-")]) == 5


def test_appended_rows_are_scored(blobs, tmp_path):
    problem, _ = blobs
    bank = problem.build(tmp_path / "bank")
    method = source(problem, bank)
    before = method.score(problem.queries)
    more = classification(n=9, seed=5).train
    bank.append(problem.model, problem.task, more, batch_size=8, progress=False)
    after = method.score(problem.queries)
    assert after.shape == (before.shape[0], 49)
    whole = Problem(
        problem.model, problem.task, problem.trajectory, ConcatDataset([problem.train, more]), problem.queries
    )  # fmt: skip
    together = source(whole, whole.build(tmp_path / "whole")).score(problem.queries)
    np.testing.assert_allclose(after, together, rtol=1e-4, atol=1e-5 * np.abs(together.values).max())


def test_a_damaged_cache_entry_is_computed_anew(blobs, tmp_path):
    problem, _ = blobs
    bank = problem.build(tmp_path / "bank")
    first = np.asarray(source(problem, bank).score(problem.queries))
    (entry,) = (p for p in FitCache(bank).folder.iterdir() if p.name.startswith("source-"))
    chunk = next(p for p in (entry / "B").rglob("*") if p.is_file() and p.name != "zarr.json")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="damaged"):
        again = np.asarray(source(problem, bank).score(problem.queries))
    np.testing.assert_array_equal(again, first)


def test_the_model_comes_back_as_it_was(blobs):
    problem, bank = blobs
    problem.model.train()
    with torch.no_grad():
        for parameter in problem.model.parameters():
            parameter.zero_()
    source(problem, bank).score(problem.queries)
    assert problem.model.training
    assert all(not parameter.any() for parameter in problem.model.parameters())
    assert all(parameter.requires_grad for parameter in problem.model.parameters())


def test_refusals(blobs, staged, tmp_path):
    problem, bank = blobs
    other_problem, other = staged
    with pytest.raises(ValueError, match="pass model="):
        sp.Source(bank).score(problem.queries)
    with pytest.raises(ValueError, match="empty list of banks"):
        sp.Source([])
    with pytest.raises(sp.MismatchError, match="different training ids"):
        sp.Source([bank, other])
    with pytest.raises(sp.MismatchError, match=r"Regression|regression"):
        sp.Source(bank, task=sp.Regression())
    with pytest.raises(ValueError, match=r"stages are \['pretrain', 'finetune'\]"):
        sp.Source(other, segments={"later": 2})
    with pytest.raises(ValueError, match="as a mapping"):
        sp.Source(other, segments=[[0], [1]])
    with pytest.raises(sp.MismatchError):
        sp.Source(bank, model=other_problem.model, progress=False).score(problem.queries)
    features = source(other_problem, other).sketch(other_problem.queries)
    with pytest.raises(sp.MismatchError, match="sketch"):
        source(problem, bank).score(features)
    nan = TensorDataset(torch.full((2, 5), float("nan")), torch.zeros(2, dtype=torch.long))
    with pytest.raises(sp.GradientError, match=r"queries \[0, 1\]"):
        source(problem, bank).score(nan)
    with pytest.raises(ValueError, match=r"empty|no example"):
        source(problem, bank).score(TensorDataset(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)))


def test_fast_source_averages_parameters(tmp_path):
    problem = classification(segments=2)
    averaged = Problem(
        problem.model, problem.task, problem.trajectory.average_parameters(), problem.train, problem.queries
    )  # fmt: skip
    bank = averaged.build(tmp_path / "bank")
    assert bank.stages[0].n_checkpoints == 2
    assert bank.final_checkpoint().hash() == problem.trajectory.final.hash()
    scores = np.asarray(source(averaged, bank).score(problem.queries))
    full = np.asarray(source(problem, problem.build(tmp_path / "full")).score(problem.queries))
    assert np.corrcoef(scores.ravel(), full.ravel())[0, 1] > 0.95
