"""EK-FAC SOURCE of the paper comparison against dense matrices and plain autograd."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ekfac_problems import dense, gradients, linears, loss_gradients, mlp_run, orthogonal_regression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))


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


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_ekfac_source_does_not_cover_is_refused():
    from _kronecker import ekfac_source

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
