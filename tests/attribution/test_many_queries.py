"""Of many queries the matrices that they go through are made first: the same scores as of one query alone."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from preconditioned import adam_run
from problems import classification
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution import moments, streaming
from source_proj.attribution.series import shortest_series
from source_proj.attribution.spectral import cross_operator, decay_operator, response, ridge_inverse

FUNCTIONS = {
    "inverse": lambda time, damping: ridge_inverse(damping, 1),
    "response": lambda time, damping: response(time, 0.01, damping),
    "decay": lambda time, damping: decay_operator(time, 0.01),
    "cross": lambda time, damping: cross_operator(time, 0.01),
}


@settings(max_examples=40)
@example(kind="cross", dim=384, seed=0, slope=2.0, scale=1.0, reach=45.0)
@given(
    kind=st.sampled_from(sorted(FUNCTIONS)),
    dim=st.sampled_from([1, 2, 24, 384, 400]),
    seed=st.integers(0, 2**16),
    slope=st.floats(0, 3),
    scale=st.floats(1e-3, 1e3),
    reach=st.floats(1e-3, 1e3),
)
def test_the_matrix_of_a_series_is_the_function_of_eigenvalues(kind, dim, seed, slope, scale, reach):
    """For any spectrum, time and size, in one panel of the product and in two; relative to what f is at most."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    values = scale * torch.arange(1, dim + 1, dtype=torch.float64) ** -slope
    damping, time = float(values.mean()), reach / float(values.mean())
    function = FUNCTIONS[kind](time, damping)
    largest = float(function(torch.zeros(1, dtype=torch.float64)).abs())
    assume(largest > 1e-100)  # of weight decay over a long time nothing is left
    series = shortest_series(function, float(values.norm()))
    shifted = (vectors * (values + series.shift)) @ vectors.T
    found = series.matrix(torch.linalg.cholesky(shifted))
    expected = (vectors * function(values)) @ vectors.T
    assert float(torch.linalg.matrix_norm(found - expected, 2)) <= 1e-5 * largest
    assert torch.equal(found, found.T)


def queries(count):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator))


@pytest.fixture
def large(monkeypatch):
    """Every k counts as one whose eigenvectors are not computed."""
    monkeypatch.setattr(moments, "_SMALL", 4)


def made(source):
    return bool(source._of(source.banks[0])._operators)


@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("segments", [1, 3])
def test_many_queries_have_the_scores_of_one_at_a_time(tmp_path, large, n, blocks, segments):
    """Of Cholesky factors and of the Gram matrices of few rows."""
    problem = classification(n=n)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    source = sp.Source(bank, model=problem.model, segments=segments, blocks=blocks, progress=False)
    features = source.sketch(queries(30))
    many = source.score(features).to_numpy()
    assert made(source)
    few = sp.Source(bank, model=problem.model, segments=segments, blocks=blocks, progress=False)
    alone = np.concatenate([few.score(alone_of(features, place)).to_numpy() for place in range(30)])
    assert not made(few)
    np.testing.assert_allclose(many, alone, rtol=0, atol=5e-5 * abs(alone).max())


def alone_of(features, place):
    """One of some queries, as if it had been asked alone."""
    return [dataclasses.replace(one, whole=0) for one in features.only([place])]


@pytest.mark.parametrize("mode", ["per_segment", "factored_per_segment", "shared"])
def test_many_queries_cross_metrics_as_one_does(tmp_path, large, mode):
    problem = adam_run(preconditioner=mode)
    bank = problem.build(tmp_path / "bank", sp.Sketch(16, seed=1))
    source, few = (sp.Source(bank, model=problem.model, progress=False) for _ in range(2))
    features = source.sketch(queries(8))
    many = source.score(features).to_numpy()
    assert made(source)
    alone = np.concatenate([few.score(alone_of(features, place)).to_numpy() for place in range(8)])
    assert not made(few)
    np.testing.assert_allclose(many, alone, rtol=0, atol=5e-5 * abs(alone).max())


@pytest.mark.parametrize("given_as", ["data", "features"])
def test_a_streams_blocks_are_asked_together(tmp_path, large, monkeypatch, given_as):
    """However few queries a block has: what counts is how many there are."""
    monkeypatch.setattr(streaming, "_MOST_QUERIES", 2)
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    streamed, held = (sp.Source(bank, model=problem.model, batch_size=2, segments=2, progress=False) for _ in range(2))
    asked = queries(30) if given_as == "data" else streamed.sketch(queries(30))
    scores = streamed.score(asked, out=tmp_path / "scores.zarr")
    assert made(streamed)
    np.testing.assert_allclose(scores.values, held.score(queries(30)).values, rtol=1e-4, atol=1e-7)
    hits = streamed.top_k(asked, 3, out=tmp_path / "hits.zarr")
    assert [hit.id for hit in hits[7]] == [hit.id for hit in held.top_k(queries(30), 3)[7]]


def test_operators_stay_within_the_memory_that_is_given(tmp_path, large):
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    options = {"model": problem.model, "segments": 2, "progress": False}
    nbytes = 2 * 8 * 40**2  # of two segments
    tight, roomy = (sp.Source(bank, **options, memory=4 * nbytes - extra) for extra in (1, 0))
    scores = [source.score(queries(30)).to_numpy() for source in (tight, roomy)]
    assert (made(tight), made(roomy)) == (False, True)
    np.testing.assert_allclose(*scores, rtol=0, atol=5e-5 * abs(scores[0]).max())
