"""SOURCE with Adam and its kin (laws 3 and 4), against dense matrices in the space of all parameters."""

import numpy as np
import pytest
import torch
from preconditioned import (
    ADAM,
    EVERY,
    LR,
    adam_run,
    adamw,
    dense_scores,
    dense_segment,
    loss,
    margin,
    per_example,
    second_moments,
    train,
)
from problems import Problem, _blobs
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution import moments


def source(problem, bank, **options):
    options = {"damping": None, "query_gradient": "final", "progress": False, **options}
    return sp.Source(bank, model=problem.model, **options)


def names_of(problem):
    return [name for name, _ in problem.model.named_parameters()]


def preconditioner(problem, checkpoints):
    """Mean of 1/(√v̂ + ε)."""
    moments = [second_moments(c, names_of(problem), ADAM["betas"][1]) for c in checkpoints]
    return torch.stack([1 / (v.sqrt() + ADAM["eps"]) for v in moments]).mean(0)


def query_gradients(problem):
    return per_example(problem.model, problem.trajectory.final.load(), margin, problem.queries)


def assert_equal_scores(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)


def factored(problem, checkpoints):
    """Of each matrix a ⊗ b, such that Σ P v of its rows and columns is kept: columns and rows in turn, five times."""
    p = preconditioner(problem, checkpoints)
    v = torch.stack([second_moments(c, names_of(problem), ADAM["betas"][1]) for c in checkpoints]).mean(0)
    parts, begin = [], 0
    for parameter in problem.model.parameters():
        own = slice(begin, begin + parameter.numel())
        begin = own.stop
        if parameter.ndim < 2:
            parts.append(p[own])
            continue
        matrix, weight = (x[own].view(parameter.shape).numpy() for x in (p, v))
        a = matrix.mean(1)
        for _ in range(5):
            b = (weight * matrix).sum(0) / (weight * a[:, None]).sum(0)
            a = (weight * matrix).sum(1) / (weight * b).sum(1)
        parts.append(torch.from_numpy(np.outer(a, b)).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("mode", ["shared", "per_segment", "factored", "factored_per_segment"])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_scores_equal_the_dense_formula(tmp_path, mode, segments):
    """Law 4: several metrics with R = I equal S = exp(-s (P H + λ)) and its integral in the full space."""
    problem = adam_run(preconditioner=mode, segments=segments)
    stage = problem.trajectory.stages[0]
    diagonal = factored if mode.startswith("factored") else preconditioner
    one_for_all = mode in ("shared", "factored")
    dense, before = [], 0
    for group in stage.segment_indices:
        p = diagonal(problem, stage.checkpoints if one_for_all else [stage.checkpoints[c] for c in group])
        dense.append(dense_segment(problem, stage, group, problem.train, 0, p, 0.3, before))
        before = stage.checkpoints[group[-1]].step
    bank = problem.build(tmp_path / "bank")
    assert len(bank.metrics) == (1 if one_for_all else segments)
    method = source(problem, bank)
    expected = dense_scores(dense, query_gradients(problem), len(problem.train))
    assert_equal_scores(method.score(problem.queries), expected)
    # Law 3d, and each segment's part alone.
    parts = method.by_segment(problem.queries)
    assert_equal_scores(parts.total(), expected)
    for index in range(segments):
        alone = dense_scores(dense[index:], query_gradients(problem), len(problem.train))
        assert_equal_scores(parts.values[index:].sum(0), alone)


def test_stages_of_different_optimizers_are_crossed(tmp_path):
    """SGD, then Adam twice, one of them on other data: three metrics, one of them the identity."""
    torch.manual_seed(1)
    sets = [_blobs(n) for n in (18, 24, 12)]
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    makers = [lambda: torch.optim.SGD(model.parameters(), lr=LR), lambda: adamw(model), lambda: adamw(model)]
    kinds = [sp.SGD(), sp.Adam(**ADAM), sp.Adam(**ADAM)]
    stages = [
        sp.Stage(name, train(model, make(), *data, 2), kind, preconditioner="shared")
        for name, make, data, kind in zip("abc", makers, sets, kinds, strict=True)
    ]
    data = {name: TensorDataset(*one) for name, one in zip("abc", sets, strict=True)}
    trajectory = sp.Trajectory.from_stages(stages)
    problem = Problem(model, sp.Classification(), trajectory, data, TensorDataset(*_blobs(5)))
    bank = problem.build(tmp_path / "bank")
    assert len(bank.metrics) == 3
    dense, start = [], 0
    for stage in stages:
        p = torch.ones(problem.size, dtype=torch.float64)
        if stage.name != "a":
            p = preconditioner(problem, stage.checkpoints)
        dense.append(dense_segment(problem, stage, [0, 1], data[stage.name], start, p, 0.0))
        start += len(data[stage.name])
    expected = dense_scores(dense, query_gradients(problem), bank.n_rows)
    assert np.abs(expected[:, :18]).max() > 0
    assert_equal_scores(source(problem, bank).score(problem.queries), expected)


def test_adam_with_the_identity_is_sgd(tmp_path):
    """Law 4: a second moment of 1 and ε = 0 give P = I, and then Adam's bank and scores are SGD's, bit for bit."""
    problem = adam_run()
    ones = []
    for c in problem.trajectory.stages[0].checkpoints:
        entries = {
            key: {"exp_avg_sq": torch.ones_like(entry["exp_avg_sq"])}
            for key, entry in c.optimizer_state["state"].items()
        }
        groups = c.optimizer_state["param_groups"]
        ones.append(sp.Checkpoint(c.load(), c.step, LR, {"state": entries, "param_groups": groups}))
    adam = sp.Adam(betas=(0.9, 0.0), eps=0.0, weight_decay=0.3)
    scores = {}
    for name, optimizer in {"adam": adam, "sgd": sp.SGD(weight_decay=0.3)}.items():
        problem.trajectory = sp.Trajectory(ones, optimizer, segments=2, preconditioner="per_segment")
        bank = problem.build(tmp_path / name)
        scores[name] = np.asarray(source(problem, bank).score(problem.queries))
    np.testing.assert_array_equal(scores["adam"], scores["sgd"])


@pytest.mark.parametrize(("exact", "by_factors"), [("shared", "factored"), ("per_segment", "factored_per_segment")])
def test_factors_of_a_preconditioner_of_rank_one_are_the_preconditioner(tmp_path, exact, by_factors):
    """Second moments that are outer products, and stay what they are but for their size: the two modes agree."""
    problem = adam_run()
    generator = torch.Generator().manual_seed(4)
    sides = [torch.randn(n, generator=generator).exp() for n in (4, 5, 3, 4)]
    means = [torch.outer(*sides[:2]), torch.ones(4), torch.outer(*sides[2:]), torch.ones(3)]
    states = []
    for number, c in enumerate(problem.trajectory.stages[0].checkpoints, start=1):
        entries = {key: {"exp_avg_sq": number * mean} for key, mean in enumerate(means)}
        groups = c.optimizer_state["param_groups"]
        states.append(sp.Checkpoint(c.load(), c.step, LR, {"state": entries, "param_groups": groups}))
    adam = sp.Adam(betas=(0.9, 0.0), eps=0.0, weight_decay=0.3)
    scores = {}
    for mode in (exact, by_factors):
        problem.trajectory = sp.Trajectory(states, adam, segments=2, preconditioner=mode)
        bank = problem.build(tmp_path / mode, sketch=sp.Sketch(32))
        scores[mode] = np.asarray(source(problem, bank).score(problem.queries))
    assert_equal_scores(scores[by_factors], scores[exact])


@pytest.mark.parametrize("curvature", ["gauss_newton", "sampled_fisher"])
def test_every_curvature_crosses(tmp_path, curvature):
    """The recursion by segment and the collapsed B agree, and a sketch of another kind is crossed as well."""
    problem = adam_run(preconditioner="per_segment", segments=3)
    for sketch in (None, sp.Sketch(dim=13, seed=3), sp.Sketch(dim=12, kind="kronecker")):
        bank = problem.build(tmp_path / f"bank{sketch and sketch.kind}", sketch=sketch, sampled_fisher=2)
        method = source(problem, bank, curvature=curvature, damping="noise", query_gradient="mean")
        scores = np.asarray(method.score(problem.queries))
        np.testing.assert_allclose(
            method.by_segment(problem.queries).total(), scores, atol=1e-5 * np.abs(scores).max(), rtol=1e-4
        )


def test_self_influence_is_the_score_of_the_own_loss(tmp_path):
    problem = adam_run(preconditioner="per_segment", segments=2)
    bank = problem.build(tmp_path / "bank")
    dense = []
    for group, before in zip([[0, 1], [2, 3]], (0, 2 * EVERY), strict=True):
        stage = problem.trajectory.stages[0]
        p = preconditioner(problem, [stage.checkpoints[c] for c in group])
        dense.append(dense_segment(problem, stage, group, problem.train, 0, p, 0.3, before))
    for kind, points in {"final": [3], "mean": [2, 3]}.items():
        states = [problem.trajectory.stages[0].checkpoints[c].load() for c in points]
        own = torch.stack([per_example(problem.model, state, loss, problem.train) for state in states]).mean(0)
        expected = np.diagonal(dense_scores(dense, -own, len(problem.train)))
        assert_equal_scores(source(problem, bank, query_gradient=kind).self_influence(), expected)


@pytest.mark.parametrize("mode", ["per_segment", "factored_per_segment"])
@pytest.mark.parametrize("dim", [16, 400])
def test_metrics_are_crossed_alike_by_spectra_and_by_factors(tmp_path, monkeypatch, mode, dim):
    """Self-influence multiplies whole matrices: of columns at the smaller k, of few rows' Gram matrix at the larger."""
    problem = adam_run(preconditioner=mode)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim, seed=1))
    options = {"model": problem.model, "progress": False, "cache": False}
    expected = sp.Source(bank, **options)
    scores, own = expected.score(problem.queries).to_numpy(), expected.self_influence()
    monkeypatch.setattr(moments, "_SMALL", 4)
    found = sp.Source(bank, **options)
    assert abs(found.score(problem.queries).to_numpy() - scores).max() <= 5e-5 * abs(scores).max()
    assert abs(found.self_influence() - own).max() <= 5e-5 * abs(own).max()


@pytest.mark.parametrize("maker", ["amsgrad", "rmsprop", "centered", "coupled", "named"])
def test_torch_optimizers(tmp_path, maker):
    """One step of torch's own optimizer, its state held fixed, moves the weights along P as we read it."""
    makers = {
        "amsgrad": (sp.Adam(**ADAM, amsgrad=True), lambda ps: torch.optim.AdamW(ps, lr=LR, amsgrad=True, **ADAM)),
        "rmsprop": (sp.RMSprop(0.9, momentum=0.5), lambda ps: torch.optim.RMSprop(ps, LR, 0.9, momentum=0.5)),
        "centered": (sp.RMSprop(0.9, centered=True), lambda ps: torch.optim.RMSprop(ps, LR, 0.9, centered=True)),
        "coupled": (
            sp.Adam(**ADAM, weight_decay=0.1, decoupled=False),
            lambda ps: torch.optim.Adam(ps, lr=LR, weight_decay=0.1, **ADAM),
        ),
        "named": (sp.Adam(**ADAM), lambda ps: torch.optim.AdamW(ps, lr=LR, **ADAM)),
    }
    described, make = makers[maker]
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    named = list(model.named_parameters())[::-1] if maker == "named" else None
    optimizer = make(named or model.parameters())
    x = torch.randn(8, 3, dtype=torch.float64)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    checkpoint = sp.Checkpoint(model.state_dict(), 20, LR, optimizer.state_dict())
    found = {name: one.preconditioner for name, one in sp.trajectory.moments(checkpoint, described, model)}
    assert set(found) == {"weight", "bias"}
    # The total displacement by a gradient of size δ that meets frozen second moments.
    for name, p in model.named_parameters():
        entry = optimizer.state[p]
        if "square_avg" in entry:
            mean = entry["grad_avg"] if maker == "centered" else torch.zeros_like(p)
            denominator = (entry["square_avg"] - mean**2).sqrt() + 1e-8
        else:
            second = entry["max_exp_avg_sq" if maker == "amsgrad" else "exp_avg_sq"]
            denominator = (second / (1 - ADAM["betas"][1] ** 20)).sqrt() + ADAM["eps"]
        torch.testing.assert_close(found[name], 1 / denominator, rtol=1e-12, atol=0)


def test_torch_moves_the_weights_as_described():
    """A gradient that vanishes after one step, second moments held by huge ones before: its whole displacement."""
    for described, make in [
        (
            sp.Adam(betas=(0.5, 1 - 1e-12), eps=0.0),
            lambda ps: torch.optim.Adam(ps, lr=LR, betas=(0.5, 1 - 1e-12), eps=0.0),
        ),
        (
            sp.RMSprop(1 - 1e-12, momentum=0.5, eps=0.0),
            lambda ps: torch.optim.RMSprop(ps, LR, 1 - 1e-12, 0.0, momentum=0.5),
        ),
    ]:
        weights = {}
        for perturbation in (0.0, 1.0):
            p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
            optimizer = make([p])
            for step in range(200):
                p.grad = torch.full_like(p, {0: 1.0, 100: perturbation * 1e-6}.get(step, 0.0))
                entry = optimizer.state[p]
                if entry:
                    key = "exp_avg_sq" if "exp_avg_sq" in entry else "square_avg"
                    scale = (1 - described.betas[1] ** (step + 1)) if isinstance(described, sp.Adam) else 1.0
                    entry[key].fill_(4.0 * scale)
                optimizer.step()
            weights[perturbation] = float(p.detach())
        expected = -LR * described.time_factor * 1e-6 / 2
        assert weights[1.0] - weights[0.0] == pytest.approx(expected, rel=1e-3)


def test_scalar_metric_scales_the_time(tmp_path):
    """One number a checkpoint, Σ P v̂ / Σ v̂, in place of P: rows are plain gradients, and weights decay as they did."""
    problem = adam_run(preconditioner="scalar")
    stage = problem.trajectory.stages[0]
    dense, before = [], 0.0
    for group in stage.segment_indices:
        time, begin = 0.0, before
        for c in group:
            v = second_moments(stage.checkpoints[c], names_of(problem), ADAM["betas"][1])
            p = 1 / (v.sqrt() + ADAM["eps"])
            time += LR * EVERY * float((p * v).sum() / v.sum())
            before = stage.checkpoints[c].step
        plain = LR * (before - begin)
        p = torch.ones(problem.size, dtype=torch.float64)
        segment = dense_segment(problem, stage, group, problem.train, 0, p, 0.3 * plain / time, begin)
        segment.time = time
        dense.append(segment)
    bank = problem.build(tmp_path / "bank")
    assert len(bank.metrics) == 1
    assert not (bank.path / "metrics").exists()
    expected = dense_scores(dense, query_gradients(problem), len(problem.train))
    assert_equal_scores(source(problem, bank).score(problem.queries), expected)


def test_no_metric_needs_no_state(tmp_path):
    problem = adam_run()
    bare = [sp.Checkpoint(c.load(), c.step, LR) for c in problem.trajectory.stages[0].checkpoints]
    for optimizer, name in ((sp.Adam(weight_decay=0.3), "adam"), (sp.SGD(weight_decay=0.3), "sgd")):
        problem.trajectory = sp.Trajectory(bare, optimizer, segments=2, preconditioner="none")
        scores = source(problem, problem.build(tmp_path / name)).score(problem.queries)
        if name == "adam":
            expected = np.asarray(scores)
    np.testing.assert_array_equal(np.asarray(scores), expected)
    problem.trajectory = sp.Trajectory(bare, sp.Adam(), segments=2)
    with pytest.raises(sp.MismatchError, match=r"has no optimizer_state.*Recorder.*preconditioner='none'"):
        problem.build(tmp_path / "refused")


def test_clipping_shortens_the_time_and_not_the_decay(tmp_path):
    factors = [0.5] * (2 * EVERY) + [1.0] * (2 * EVERY)
    problem = adam_run(clip_factors=factors, preconditioner="shared")
    bank = problem.build(tmp_path / "bank")
    clipped = source(problem, bank).segments
    assert [one.time for one in clipped] == pytest.approx([LR * EVERY, LR * 2 * EVERY])
    assert [one.decay * one.time for one in clipped] == pytest.approx([0.3 * LR * 2 * EVERY] * 2)
    with pytest.raises(ValueError, match=r"'train' gives 1.5 for update 0: must be finite and at least 0 and at"):
        adam_run(clip_factors=lambda _: 1.5)


def test_other_methods_are_in_the_checkpoints_metrics(tmp_path):
    """Each of their inner products is ∇mᵀ P g."""
    problem = adam_run(preconditioner="per_segment", segments=2, weight_decay=0.0)
    bank = problem.build(tmp_path / "bank")
    stage, n = problem.trajectory.stages[0], len(problem.train)
    p = [preconditioner(problem, stage.checkpoints[:2])] * 2 + [preconditioner(problem, stage.checkpoints[2:])] * 2
    g = [per_example(problem.model, c.load(), loss, problem.train) for c in stage.checkpoints]
    m = [per_example(problem.model, c.load(), margin, problem.queries) for c in stage.checkpoints]
    o = per_example(problem.model, stage.checkpoints[3].load(), margin, problem.train)
    products = [(m[c] * p[c]) @ g[c].T for c in range(4)]
    final = [(m[3] * p[c]) @ g[c].T for c in range(4)]
    time = LR * EVERY
    root, metric = p[3].sqrt(), g[3] * p[3].sqrt()
    hessian = metric.T @ metric / n
    inverse = torch.linalg.inv(hessian + 0.7 * torch.eye(problem.size))
    ridge = 0.1 * hessian.trace() / problem.size
    inverses = [torch.linalg.inv(torch.outer(a, a) + ridge * torch.eye(problem.size)) for a in metric]
    kernel = torch.linalg.inv((o * root).T @ (o * root) / n + 0.3 * torch.eye(problem.size))
    d1 = -(g[3].norm(dim=1) / o.norm(dim=1))  # ℓ' = -(1 - p), and g = ℓ' ∇o
    expected = {
        sp.TracIn: ({}, -time * sum(products) / n),
        sp.Hydra: ({}, -time * sum(final) / n),
        sp.GradDot: ({}, -products[3] / n),
        sp.GradCos: ({}, -nn.functional.normalize(m[3] * root) @ nn.functional.normalize(metric).T),
        sp.InfluenceFunction: ({"damping": 0.7}, -((m[3] * root) @ inverse @ metric.T) / n),
        sp.ArnoldiInfluence: (
            {"damping": 0.7, "rank": problem.size},
            -((m[3] * root) @ inverse @ metric.T) / n,
        ),
        sp.DataInf: ({}, -((m[3] * root) @ (sum(inverses) / n) @ metric.T) / n),
        sp.Trak: ({"ridge": 0.3}, ((m[3] * root) @ kernel @ (o * root).T) * -d1 / n),
    }
    for method, (options, scores) in expected.items():
        found = method(bank, model=problem.model, progress=False, **options).score(problem.queries)
        assert_equal_scores(found, scores.numpy())


def test_segments_across_metrics_are_refused(tmp_path):
    problem = adam_run(preconditioner="per_segment", segments=2)
    bank = problem.build(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"joins checkpoints whose rows are in different metrics, \[0, 1\]"):
        source(problem, bank, segments=1)
    assert len(source(problem, bank, segments=[[0], [1], [2, 3]]).segments) == 3
