"""The EK-FAC references of the paper comparison against dense matrices and plain autograd."""

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp
from source_proj.gradients import ParameterSpace, gradient_engine

PAPER = Path(__file__).parents[2] / "examples" / "paper"
needs_kronfluence = pytest.mark.skipif(
    importlib.util.find_spec("kronfluence") is None, reason='needs the extra: pip install "source-proj[kronecker]"'
)


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))


# Problems ------------------------------------------------------------------------------------------------------------


def mlp_run(*, bias=True, inplace=False):
    """A classifier in two stages: the first in two segments of two checkpoints, the second in one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.ReLU(inplace=inplace), nn.Linear(5, 3))

    def data(n):
        return TensorDataset(torch.randn(n, 4), torch.arange(n) % 3)

    def checkpoints(n, lr):
        states = [{k: v + 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(n)]
        return [sp.Checkpoint(state, 10 * (i + 1), lr=lr) for i, state in enumerate(states)]

    optimizer = sp.SGD(momentum=0.5, weight_decay=0.02)
    stages = [
        sp.Stage("first", checkpoints(4, 0.1), optimizer, segments=2),
        sp.Stage("second", checkpoints(2, 0.05), optimizer),
    ]
    return model, sp.Trajectory.from_stages(stages), {"first": data(11), "second": data(6)}, data(5)


def orthogonal_regression(n=40, d=3):
    """Least squares whose inputs are multiples of d orthogonal directions: EK-FAC's basis is then the Fisher's own."""
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    which = torch.arange(n) % d
    x = basis[which] * (torch.rand(n, 1) + 0.5) * (1 + which[:, None])
    data = TensorDataset(x, torch.randn(n, 1))
    return nn.Linear(d, 1, bias=False), data, TensorDataset(torch.randn(4, d), torch.randn(4, 1)), basis


# Naive twins ---------------------------------------------------------------------------------------------------------


def gradients(model, checkpoint, function, data):
    """Per-example gradients as rows in float64, each layer's ``[W | b]`` one after another in row-major order."""
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, sp.Sketch(space.size, "identity"), method="general")
    with checkpoint.applied_to(model):
        rows = engine.sketch(function, list(data.tensors))[1]
    parts = dict(zip(space.names, rows.split([model.get_parameter(n).numel() for n in space.names], 1), strict=True))
    layers = []
    for name, layer in linears(model):
        prefix = f"{name}." if name else ""
        weight = parts[f"{prefix}weight"].unflatten(1, tuple(layer.weight.shape))
        bias = [] if layer.bias is None else [parts[f"{prefix}bias"][..., None]]
        layers.append(torch.cat([weight, *bias], 2).flatten(1))
    return torch.cat(layers, 1).double()


def linears(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def loss_gradients(model, task, checkpoint, data):
    with checkpoint.applied_to(model), torch.no_grad():
        d1 = task.loss_derivatives(task.output(model, list(data.tensors)), list(data.tensors))[0]
    return gradients(model, checkpoint, task.output, data) * d1[:, None]


def dense(factors):
    """Block-diagonal H of a list of layers' factors."""
    blocks = []
    for one in factors:
        q = torch.kron(one.outputs, one.inputs).double()
        blocks.append((q * one.values.flatten()) @ q.T)
    return torch.block_diag(*blocks)


def dense_source(model, task, run, train, queries, hessians, damping, mean_query=False):
    """Eq. 16 to 23 of arXiv 2405.12186 with the given matrices, one a segment."""
    n = len(train["first"])
    points = run.stages[-1].checkpoints if mean_query else [run.final]
    carried = sum(gradients(model, point, task.measurement, queries) for point in points) / len(points)
    scores = torch.zeros(len(carried), n, dtype=torch.float64)
    segments = [(stage, group) for stage in run.stages for group in stage.segment_indices]
    for (stage, group), hessian in zip(reversed(segments), reversed(hessians), strict=True):
        ends = [0.0, *(stage.lr_integrals[g[-1]] for g in stage.segment_indices)]
        begin, end = list(pairwise(ends))[stage.segment_indices.index(group)]
        time, decay = (end - begin) * stage.optimizer.time_factor, stage.optimizer.weight_decay
        eye = torch.eye(len(hessian), dtype=torch.float64)
        if stage.name == "first":
            g = sum(loss_gradients(model, task, stage.checkpoints[c], train["first"]) for c in group) / len(group)
            x = hessian + (decay + damping) * eye
            scores -= carried @ torch.linalg.solve(x, eye - torch.matrix_exp(-time * x)) @ g.T / n
        carried = carried @ torch.matrix_exp(-time * (hessian + decay * eye))
    return scores.numpy()


# Factors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_factors_are_those_of_per_example_gradients(bias, inplace):
    """Q diagonalise the mean covariances, and Λ is the diagonal of the layer's Fisher in their basis."""
    from _kronecker import Factors, rows_of

    model, run, train, _ = mlp_run(bias=bias, inplace=inplace)
    task, points = sp.Classification(), run.stages[0].checkpoints[:2]
    rows = rows_of(model, task, points, train["first"], batch_size=4, training=True)
    g = torch.stack([loss_gradients(model, task, one, train["first"]) for one in points])  # (C, n, d)
    start = 0
    for (name, _), one in zip(linears(model), rows.values(), strict=True):
        assert list(rows) == [layer for layer, _ in linears(model)]
        rank_one = torch.einsum("czo,czi->czoi", one.loss, one.inputs).flatten(2).double()
        own = g[..., start : start + rank_one.shape[2]]
        torch.testing.assert_close(rank_one, own, rtol=1e-4, atol=1e-6, msg=name)
        factors = Factors.of(one)
        for q, vectors in ((factors.inputs, one.inputs), (factors.outputs, one.fisher)):
            covariance = q.T @ torch.einsum("czi,czj->ij", vectors, vectors) @ q
            off = covariance - covariance.diag().diag()
            assert off.abs().max() < 1e-5 * covariance.abs().max()
        basis = torch.kron(factors.outputs, factors.inputs).double()
        fisher = torch.einsum("czd,cze->de", own, own) / (2 * len(train["first"]))
        expected = (basis.T @ fisher @ basis).diag().reshape(factors.values.shape)
        torch.testing.assert_close(factors.values, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
        start += rank_one.shape[2]
    assert start == g.shape[2]


def test_sampled_labels_follow_the_model_and_the_seed():
    """Squared error, ℓ'' = E[s²] = 2: Λ is twice the inputs' covariance.

    A direction has 1,000 of the draws; s² / 2 is χ² with variance 2; E[r⁴] / E[r²]² = 1.29 for lengths r ~ U(½, 1½).
    """
    from _kronecker import Factors, rows_of

    model, data, _, _ = orthogonal_regression(n=3000)
    checkpoint = sp.Checkpoint(model.state_dict(), 1)

    def values(seed):
        rows = rows_of(model, sp.Regression(), [checkpoint], data, fisher="sampled", seed=seed, training=True)[""]
        factors = Factors.of(rows)
        return factors.values, torch.linalg.eigvalsh(rows.inputs[0].T @ rows.inputs[0]) / len(data), rows

    found, expected, rows = values(0)
    torch.testing.assert_close(found[0], 2 * expected.double(), rtol=5 * (2 * 1.29 / 1000) ** 0.5, atol=0)
    torch.testing.assert_close(values(0)[0], found, rtol=0, atol=0)
    assert not torch.equal(values(1)[0], found)
    assert not torch.equal(rows.fisher, rows.loss)


# SOURCE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("mean_query", [False, True])
def test_ekfac_source_is_the_dense_recursion_on_its_factors(damping, fisher, mean_query):
    from _kronecker import Factors, ekfac_source, rows_of

    model, run, train, queries = mlp_run()
    task = sp.Classification()
    segments = [(stage, group) for stage in run.stages for group in stage.segment_indices]
    hessians = []
    for index, (stage, group) in enumerate(segments):
        rows = rows_of(
            model, task, [stage.checkpoints[c] for c in group], train[stage.name], fisher=fisher, seed=7 + index,
            training=True,
        )  # fmt: skip
        hessians.append(dense([Factors.of(one) for one in rows.values()]))
    expected = dense_source(model, task, run, train, queries, hessians, damping or 0.0, mean_query)
    options = {"damping": damping, "fisher": fisher, "mean_query": mean_query}
    scores = ekfac_source(model, task, run, train, queries, seed=7, **options)
    assert scores.shape == (5, 11)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_ekfac_source_does_not_depend_on_batches(monkeypatch):
    import _kronecker

    model, run, train, queries = mlp_run()
    task = sp.Classification()
    whole = _kronecker.ekfac_source(model, task, run, train, queries, fisher="empirical")
    monkeypatch.setattr(_kronecker, "_BLOCK", 50)
    loader = DataLoader(queries, batch_size=2)
    parts = _kronecker.ekfac_source(model, task, run, train, loader, fisher="empirical", batch_size=3)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("stages", "segments", "dim"), [(1, 1, None), (1, 1, 20), (2, 1, 20), (1, 2, None), (2, 2, None)]
)
def test_source_by_gram_matrices_is_source_without_a_sketch(tmp_path, stages, segments, dim):
    """Inner products of gradients are all that SOURCE needs: against a bank of the gradients themselves."""
    from _exact import ExactSource

    model, run, train, queries = mlp_run()
    rates = [0.05] * run.stages[0].checkpoints[1].step
    course = sp.Trajectory.from_stages(
        [
            replace(stage, checkpoints=stage.checkpoints[:2], segments=segments, lr_schedule=rates)
            for stage in run.stages[:stages]
        ]
    )
    data = {stage.name: train[stage.name] for stage in course.stages}
    size = sum(parameter.numel() for parameter in model.parameters())
    bank = sp.build(
        model, sp.Classification(), course, data, tmp_path / "bank", sketch=sp.Sketch(size, "identity"),
        storage="float32", progress=False,
    )  # fmt: skip
    options = {"model": model, "query_gradient": "mean", "progress": False}
    trace = sp.Source(bank, **options).segments[0].trace
    damping = 0.0 if dim is None else trace / dim
    expected = sp.Source(bank, damping=damping, **options).score(queries).to_numpy()[:, : len(data["first"])]
    scores = ExactSource(model, sp.Classification(), course, data, queries, [0, 1], segments).scores(dim)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("measurement", ["squared", "absolute"])
def test_ekfac_source_is_source_where_the_eigenbasis_is_exact(tmp_path, measurement):
    """One linear output on orthogonal directions: Kronecker eigenbasis and corrected eigenvalues are the Fisher's."""
    from _kronecker import ekfac_source

    model, data, queries, _ = orthogonal_regression()
    task = sp.Regression(measurement)
    states = [{"weight": model.weight.detach() + 0.1 * torch.randn(1, 3)} for _ in range(4)]
    points = [sp.Checkpoint(state, 10 * (i + 1), lr=0.02) for i, state in enumerate(states)]
    run = sp.Trajectory(points, optimizer=sp.SGD(weight_decay=0.1), segments=2)
    bank = sp.build(
        model, task, run, data, tmp_path / "bank", sketch=sp.Sketch(3, "identity"), storage="float32", progress=False
    )
    expected = sp.Source(bank, model=model, curvature="empirical_fisher", damping=0.05, progress=False).score(queries)
    scores = ekfac_source(model, task, run, data, queries, damping=0.05, fisher="empirical")
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


# Influence functions -------------------------------------------------------------------------------------------------


def dense_influence(model, task, checkpoint, train, queries, inverse):
    g = loss_gradients(model, task, checkpoint, train)
    return -(gradients(model, checkpoint, task.measurement, queries) @ inverse @ g.T / len(train)).numpy()


@needs_kronfluence
@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_ekfac_influence_is_the_dense_inverse_on_our_factors(damping, bias):
    from _kronecker import Factors, ekfac_influence, rows_of

    model, run, train, queries = mlp_run(bias=bias)
    task, data = sp.Classification(), train["first"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = rows_of(model, task, [run.final], data, training=True)
    factors = [Factors.of(one) for one in rows.values()]
    ridge = [float(one.values.mean()) / 10 if damping is None else damping + 0.02 for one in factors]
    damped = [Factors(f.outputs, f.inputs, 1 / (f.values + r)) for f, r in zip(factors, ridge, strict=True)]
    expected = dense_influence(model, task, run.final, data, queries, dense(damped))
    other, scores = ekfac_influence(
        model, task, run.final.load(), data, queries, weight_decay=0.02, dampings=[0.7, damping], fisher="empirical",
        batch_size=4,
    )  # fmt: skip
    assert not np.allclose(other, scores, rtol=1e-2, atol=0)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]


@needs_kronfluence
def test_ekfac_influence_is_exact_where_the_eigenbasis_is():
    from _kronecker import ekfac_influence

    model, data, queries, _ = orthogonal_regression()
    task, checkpoint = sp.Regression("absolute"), sp.Checkpoint(model.state_dict(), 1)
    g = loss_gradients(model, task, checkpoint, data)
    inverse = torch.linalg.inv(g.T @ g / len(data) + 0.3 * torch.eye(3))
    expected = dense_influence(model, task, checkpoint, data, queries, inverse)
    (scores,) = ekfac_influence(
        model, task, model.state_dict(), data, queries, weight_decay=0.1, dampings=[0.2], fisher="empirical"
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@needs_kronfluence
def test_ekfac_influence_samples_labels_by_its_seed():
    from _kronecker import ekfac_influence

    model, run, train, queries = mlp_run()
    given = (model, sp.Classification(), run.final.load(), train["first"], queries)
    first, again, other = (ekfac_influence(*given, dampings=[0.1], seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, ekfac_influence(*given, dampings=[0.1], fisher="empirical")[0])


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_ekfac_does_not_cover_is_refused(monkeypatch):
    from _kronecker import ekfac_influence, ekfac_source

    model, run, train, queries = mlp_run()
    task = sp.Classification()
    with pytest.raises(ValueError, match=r"nn\.Linear layers alone.*1\.weight"):
        ekfac_source(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), task, run, train, queries)
    with pytest.raises(ValueError, match="fisher must be one of"):
        ekfac_source(model, task, run, train, queries, fisher="true")
    with pytest.raises(ValueError, match="damping must be"):
        ekfac_source(model, task, run, train, queries, damping=-1.0)
    with pytest.raises(ValueError, match=r"stages \['first', 'second'\]"):
        ekfac_source(model, task, run, {"first": train["first"]}, queries)
    tokens = TensorDataset(torch.randn(5, 2, 4), torch.arange(5) % 3)
    with pytest.raises(ValueError, match=r"layer '0' is called twice, or with an input of shape \(5, 2, 4\)"):
        ekfac_source(model, task, run, train, tokens)
    monkeypatch.setitem(sys.modules, "kronfluence.analyzer", None)
    with pytest.raises(ImportError, match=r"source-proj\[kronecker\]"):
        ekfac_influence(model, task, run.final.load(), train["first"], queries)
