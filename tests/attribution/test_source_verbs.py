"""The verbs of Source: streaming, self-influence, ensembles, fits and what is refused."""

import numpy as np
import pytest
import torch
from problems import Problem, classification, naive_source, source
from torch.utils.data import ConcatDataset, TensorDataset

import source_proj as sp


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
    monkeypatch.setattr("source_proj.attribution.products._MIN_ROWS", height)
    monkeypatch.setattr("source_proj.attribution.products._BLOCK_SCORES", 1)
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
    cache = bank.fits
    entries = {p.name for p in cache.folder.iterdir() if p.is_dir()}
    assert sorted(name.split("-")[0] for name in entries) == ["spectrum", "spectrum"]  # one a segment
    again = source(problem, sp.open(tmp_path / "bank")).score(problem.queries)
    np.testing.assert_array_equal(again, first)
    assert {p.name for p in cache.folder.iterdir() if p.is_dir()} == entries
    for options in ({"damping": None}, {"segments": 1}, {"curvature": "gauss_newton"}, {"damping": 0.5}):
        other = source(problem, bank, **options).score(problem.queries)
        assert not np.allclose(other, first)
    # Another damping needs no other spectrum; one segment needs one, and another curvature two.
    assert len([p for p in cache.folder.iterdir() if p.name.startswith("spectrum-")]) == 5


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
    entry = next(p for p in bank.fits.folder.iterdir() if p.name.startswith("spectrum-"))
    chunk = next(p for p in (entry / "vectors").rglob("*") if p.is_file() and p.name != "zarr.json")
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


@pytest.mark.parametrize("k", [3.0, "3", None, [3]])
def test_a_number_of_examples_that_is_none_is_refused(blobs, k):
    problem, bank = blobs
    method = source(problem, bank)
    for ask in (lambda: method.top_k(problem.queries, k), lambda: method.score(problem.queries).top_k(k)):
        with pytest.raises(TypeError, match="k must be an integer, the number of training examples wanted, got"):
            ask()


@pytest.mark.parametrize("k", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_of_numpy_and_torch_are_numbers(blobs, k):
    problem, bank = blobs
    method = source(problem, bank)
    assert method.top_k(problem.queries, k).ids == method.score(problem.queries).top_k(3).ids


@pytest.mark.parametrize("k", [0, -1, 41, True])
def test_a_number_out_of_range_is_refused(blobs, k):
    problem, bank = blobs
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.40"):
        source(problem, bank).top_k(problem.queries, k)


def test_queries_of_another_width_are_refused_by_name(blobs):
    problem, bank = blobs
    narrow = TensorDataset(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    asked = source(problem, bank)
    asked.score(problem.queries)  # the model that is kept open has been looked at then
    rep_sim = sp.RepSim(bank, model=problem.model, train_set=problem.train)
    for method, queries in [(asked, narrow), (source(problem, bank), narrow), (rep_sim, narrow), (asked, narrow[:][0])]:
        with pytest.raises(sp.MismatchError, match=r"Sequential cannot take the first example .*as in training"):
            method.score(queries)
