"""Reranking by whole gradients: against a naive twin in float64, and against scores without a sketch."""

import numpy as np
import pytest
import torch
from preconditioned import adam_run
from problems import Problem, classification, regression, source, two_stages
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import source_proj as sp
from source_proj._errors import MismatchError

RIDGE = 0.01
RUNS = {
    "two segments": lambda: classification(24),
    "two stages": lambda: two_stages(16),
    "regression": lambda: regression(20),
    "a metric a segment": lambda: adam_run(preconditioner="per_segment", segments=2, n=24),
    "a shared metric": lambda: adam_run(preconditioner="shared", segments=2, n=24),
}
every_run = pytest.mark.parametrize("problem", [make() for make in RUNS.values()], ids=RUNS)


def whole_gradients(exact: sp.Bank, segment) -> torch.Tensor:
    """ḡ ``(n, d)`` float64 of a segment's stage, from a bank without a sketch."""
    stage = exact.stages[segment.stage]
    parts = [[block.rows.double() * block.d1[:, None] for block in stage.iter_rows(c)] for c in segment.checkpoints]
    return torch.stack([torch.cat(rows) for rows in parts]).mean(0)


def naive(problem: Problem, bank: sp.Bank, exact: sp.Bank, places: np.ndarray, **options) -> np.ndarray:
    """Corrected scores ``(Q, M)`` of some examples, as `source_proj.attribution.source.rerank` defines them."""
    method = source(problem, bank, query_gradient="mean", **options)
    unsketched = source(problem, exact, query_gradient="mean", **options)
    matrix = bank.sketch.matrix(0, problem.size).double()
    scores = np.take_along_axis(method.score(problem.queries).to_numpy().astype(float), places, axis=1)
    features, wholes = method.sketch(problem.queries)[0], unsketched.sketch(problem.queries)[0]
    moved = method._moved(method._of(bank), features)
    for segment, carried in zip(method.segments, moved, strict=True):
        start = sum(stage.n for stage in bank.stages[: segment.stage])
        gradients = whole_gradients(exact, segment)
        rows = gradients @ matrix.T
        factors = torch.cat([_factors(bank, segment, c) for c in segment.checkpoints])
        values, vectors = torch.linalg.eigh(factors.T @ factors / len(factors))
        x = values.clamp(min=0) + segment.decay + segment.damping
        response = (vectors * ((1 - torch.exp(-segment.time * x)) / x)) @ vectors.T
        rest = segment.decay + segment.damping
        at_zero = (1 - np.exp(-segment.time * rest)) / rest if rest else segment.time
        for q, query in enumerate(unsketched._query(exact, wholes, segment.metric).double()):
            own = [(m, place - start) for m, place in enumerate(places[q]) if start <= place < start + segment.n]
            if not own:
                continue
            inside = [place for _, place in own]
            basis = torch.cat([(matrix @ query)[None], rows[inside]])
            gram = basis @ basis.T
            theta = (
                torch.linalg.inv(gram + RIDGE * torch.diag(torch.diag(gram))) @ basis @ carried[q].double() / at_zero
            )
            point = theta[0] * query + theta[1:] @ gradients[inside]
            errors = gradients[inside] @ point - rows[inside] @ (theta @ basis)
            gram = rows[inside] @ rows[inside].T
            delta = rows[inside].T @ torch.linalg.inv(gram + RIDGE * torch.diag(torch.diag(gram))) @ errors
            for m, place in own:
                scores[q, m] -= float(rows[place] @ response @ delta) / segment.n
    return scores


def _factors(bank: sp.Bank, segment, checkpoint: int) -> torch.Tensor:
    stage = bank.stages[segment.stage]
    gauss_newton = bank.task_spec["name"] == "regression"
    return torch.cat(
        [
            block.rows.double() * (block.d2.sqrt() if gauss_newton else block.d1)[:, None]
            for block in stage.iter_rows(checkpoint)
        ]
    )


def sketched(problem: Problem, folder, seed: int = 3, **options) -> sp.Bank:
    return problem.build(folder, sketch=sp.Sketch(max(3, problem.size // 2), "sparse", seed=seed), **options)


@every_run
def test_corrected_scores_are_those_of_the_definition(tmp_path, problem):
    bank, exact = sketched(problem, tmp_path / "bank"), problem.build(tmp_path / "exact")
    method, k, count = source(problem, bank, query_gradient="mean"), 3, 9
    for verb, sign in (("top_k", 1), ("bottom_k", -1)):
        hits = getattr(method, verb)(problem.queries, k, rerank=count)
        own = sign * method.score(problem.queries).to_numpy()
        order = np.argsort(-own, axis=1, kind="stable")
        candidates, others = order[:, :5], order[:, -4:]  # half of them, and the other end
        expected = naive(problem, bank, exact, np.concatenate([candidates, others], axis=1))[:, :5]
        best = np.argsort(-sign * expected, axis=1)[:, :k]
        scale = np.abs(own).max()
        np.testing.assert_allclose(hits.scores, np.take_along_axis(expected, best, axis=1), atol=2e-4 * scale)
        ranks = np.array([[list(candidates[q]).index(place) for place in row] for q, row in enumerate(hits.indices)])
        np.testing.assert_allclose(hits.scores, np.take_along_axis(expected, ranks, axis=1), atol=2e-4 * scale)
        np.testing.assert_array_equal(hits.reranked.recall, (ranks < k).mean(axis=1))
        assert hits.ids == [[bank.ids[place] for place in row] for row in hits.indices]


@every_run
def test_without_a_sketch_nothing_is_corrected(tmp_path, problem):
    method = source(problem, problem.build(tmp_path / "exact"))
    own, hits = method.top_k(problem.queries, 4), method.top_k(problem.queries, 4, rerank=8)
    np.testing.assert_allclose(hits.scores, own.scores, rtol=1e-4, atol=1e-5 * np.abs(own.scores).max())
    assert hits.reranked.recall.min() == 1
    assert own.reranked is None


def test_corrected_scores_are_nearer_to_those_without_a_sketch(tmp_path):
    """In the mean over sketches; and by far where the time is short, so that a plain inner product is all there is."""
    problem = classification(30, segments=1)
    exact = problem.build(tmp_path / "exact")
    errors = {(name, scale): 0.0 for name in ("own", "corrected") for scale in (1.0, 1e-6)}
    for seed in range(3):
        bank = sketched(problem, tmp_path / f"{seed}", seed=seed)
        for scale in (1.0, 1e-6):
            options = {"damping": 0.05, "time_scale": scale, "query_gradient": "mean"}
            scores = source(problem, exact, **options).score(problem.queries).to_numpy()
            for name, rerank in (("own", None), ("corrected", 16)):
                hits = source(problem, bank, **options).top_k(problem.queries, 8, rerank=rerank)
                errors[name, scale] += ((hits.scores - np.take_along_axis(scores, hits.indices, axis=1)) ** 2).sum()
    assert errors["corrected", 1.0] < 0.5 * errors["own", 1.0]
    assert errors["corrected", 1e-6] < 0.02 * errors["own", 1e-6]


def test_helpful_and_harmful_follow_the_task(tmp_path):
    problem = regression(20)
    method = source(problem, sketched(problem, tmp_path / "bank"))
    asked = {"k": 3, "rerank": 20}
    for verb, same in (("helpful", "bottom_k"), ("harmful", "top_k")):  # the squared error is better the lower
        np.testing.assert_array_equal(
            getattr(method, verb)(problem.queries, **asked).indices,
            getattr(method, same)(problem.queries, **asked).indices,
        )


def test_equal_scores_are_ordered_by_place(tmp_path):
    problem = classification(12)
    twice = [tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in problem.train.tensors]
    problem = Problem(problem.model, problem.task, problem.trajectory, TensorDataset(*twice), problem.queries)
    hits = source(problem, sketched(problem, tmp_path / "bank", batch_size=12)).top_k(problem.queries, 4, rerank=24)
    np.testing.assert_array_equal(hits.indices[:, 1::2], hits.indices[:, ::2] + 12)


def test_what_it_took_is_said(tmp_path):
    problem = classification(24, segments=2)
    bank = sketched(problem, tmp_path / "bank")
    hits = source(problem, bank).top_k(problem.queries, 2, rerank=24)
    assert hits.reranked.candidates == 24
    assert hits.reranked.passes == 2 * 24 * 4  # twice each, at 4 checkpoints; the queries of a block share them
    assert "recall of the bank's own list" in str(hits)
    assert len(hits[1:3].reranked.recall) == 2
    small = source(problem, bank, memory=4 * problem.size * 2 * 2 * 3).top_k(problem.queries, 2, rerank=24)
    assert small.reranked.passes == 3 * hits.reranked.passes  # three blocks of at most 3 of the 7 queries
    np.testing.assert_allclose(small.scores, hits.scores, rtol=1e-4)


def test_runs_are_averaged(tmp_path):
    problem = classification(20)
    banks = [sketched(problem, tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    count = 20
    both = source(problem, banks).top_k(problem.queries, count, rerank=count)
    each = [source(problem, bank).top_k(problem.queries, count, rerank=count) for bank in banks]
    dense = np.zeros((2, len(problem.queries), count))
    for values, hits in zip(dense, each, strict=True):
        np.put_along_axis(values, hits.indices, hits.scores, axis=1)
    np.testing.assert_allclose(
        both.scores, np.take_along_axis(dense.mean(0), both.indices, axis=1), atol=1e-5 * np.abs(dense).max()
    )


def test_data_are_given_or_known(tmp_path):
    problem = two_stages(16)
    built = sketched(problem, tmp_path / "bank")
    expected = source(problem, built).top_k(problem.queries, 3, rerank=6)
    bank = sp.open(tmp_path / "bank")
    method = source(problem, bank)
    with pytest.raises(ValueError, match="pass train="):
        method.top_k(problem.queries, 3, rerank=6)
    loaders = {name: DataLoader(data, batch_size=5) for name, data in problem.train.items()}
    hits = method.top_k(problem.queries, 3, rerank=6, train=loaders)
    np.testing.assert_allclose(hits.scores, expected.scores, rtol=1e-4)
    with pytest.raises(MismatchError, match="pretrain"):
        method.top_k(problem.queries, 3, rerank=6, train={"finetune": problem.train["finetune"]})
    with pytest.raises(MismatchError, match=r"\[24\] examples by stage"):
        method.top_k(problem.queries, 3, rerank=6, train=ConcatDataset(problem.train.values()))
    swapped = {name: Subset(data, range(len(data) - 1, -1, -1)) for name, data in problem.train.items()}
    with pytest.raises(MismatchError, match="are not those of the bank"):
        method.top_k(problem.queries, 3, rerank=6, train=swapped)


@pytest.mark.parametrize("storage", ["int8", "int2", "int1", "float16"])
def test_banks_of_every_codec_know_their_own_data(tmp_path, storage):
    problem = classification(20)
    bank = sketched(problem, tmp_path / "bank", storage=storage)
    assert source(problem, bank).top_k(problem.queries, 3, rerank=20).reranked.candidates == 20


def test_what_cannot_be_reranked_is_refused(tmp_path):
    problem = classification(20)
    bank = sketched(problem, tmp_path / "bank")
    method = source(problem, bank)
    with pytest.raises(ValueError, match=r"rerank=2 is fewer than the k=3 examples .* give at least k"):
        method.top_k(problem.queries, 3, rerank=2)
    with pytest.raises(ValueError, match=r"rerank must lie in 1\.\.20"):
        method.helpful(problem.queries, 3, rerank=21)
    with pytest.raises(ValueError, match="give them as data"):
        method.top_k(method.sketch(problem.queries), 3, rerank=6)
    with pytest.raises(ValueError, match="pass model="):
        sp.Source(bank).top_k(problem.queries, 3, rerank=6)
    with pytest.raises(ValueError, match="leave out= or rerank="):
        method.top_k(problem.queries, 3, tmp_path / "hits.zarr", rerank=6)
    with pytest.raises(ValueError, match="leave train= out"):
        method.top_k(problem.queries, 3, train=problem.train)
