"""Scoring from rows as they are stored, held in memory or read each time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import classification, two_stages

import source_proj as sp
from source_proj._io.printable import bytes_in_words
from source_proj.attribution.moments import mean_hessian
from source_proj.bank.codecs import codec_names, find_codec

STORAGES = codec_names()
DIRECT = {
    "tracin": (sp.TracIn, {}),
    "graddot": (sp.GradDot, {}),
    "trak": (sp.Trak, {"ridge": 0.1}),
    "influence": (sp.InfluenceFunction, {}),
    "datainf": (sp.DataInf, {}),
    "arnoldi": (sp.ArnoldiInfluence, {"rank": 5}),
}
METHODS = {
    **DIRECT,
    "source": (sp.Source, {}),
    "source, one segment": (sp.Source, {"segments": 1}),
    "source, not held": (sp.Source, {"memory": 1}),
    "hydra": (sp.Hydra, {}),
    "gradcos": (sp.GradCos, {}),
    "influence, averaged": (sp.InfluenceFunction, {"average": True}),
}


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    problem = classification(n=50)
    folder = tmp_path_factory.mktemp("banks")
    return problem, {
        storage: problem.build(folder / storage, sp.Sketch(dim=24, seed=3), storage=storage) for storage in STORAGES
    }


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    problem = two_stages()
    return problem, problem.build(tmp_path_factory.mktemp("bank") / "bank", storage="int8")


def close(found, expected):
    """Equal up to rounding of float32 sums of some dozens of terms."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def decoded_copy(monkeypatch):
    """Let banks hand out float32 copies where they would hand out rows as they are stored."""
    original = sp.StageBank.iter_encoded

    def decoded(self, checkpoint, *which):
        for block in original(self, checkpoint, *which):
            rows = block.codec.decode(block.rows, block.scale, 24)
            yield replace(block, rows=rows, scale=None, codec=find_codec("float32"))

    monkeypatch.setattr(sp.StageBank, "iter_encoded", decoded)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("curvature", ["empirical_fisher", "gauss_newton", "features"])
def test_hessians_of_stored_rows_are_those_of_decoded_ones(banks, curvature, storage):
    """To float32's rounding of a sum: n + 3 roundings of its terms' sizes."""
    stage = banks[1][storage].stages[0]
    blocks = [block for checkpoint in range(4) for block in stage.iter_rows(checkpoint)]
    weights = {
        "empirical_fisher": [block.d1.double() for block in blocks],
        "gauss_newton": [block.d2.double().sqrt() for block in blocks],
        "features": [torch.ones(len(block.rows), dtype=torch.float64) for block in blocks],
    }[curvature]
    factors = torch.cat([block.rows.double() * own[:, None] for block, own in zip(blocks, weights, strict=True)])
    hessian = mean_hessian(stage, range(4), 24, curvature)
    sizes = factors.abs().T @ factors.abs() / len(factors)
    error = (hessian - factors.T @ factors / len(factors)).abs()
    assert bool((error <= (len(factors) + 3) * torch.finfo(torch.float32).eps * sizes).all())
    assert torch.equal(hessian, hessian.T)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", DIRECT)
def test_stored_rows_score_as_their_float32_copies(banks, name, storage, monkeypatch):
    problem, by_storage = banks
    method, options = DIRECT[name]
    one = method(by_storage[storage], model=problem.model, progress=False, **options)
    features = one.sketch(problem.queries)
    dtypes = {operand.rows.dtype for term in one._terms(one.banks[0], features[0])
              for operand in term.train.between(0, one.n_rows)}  # fmt: skip
    assert dtypes == {find_codec(storage).dtype}
    direct = one.score(features)
    decoded_copy(monkeypatch)
    close(direct, one.score(features))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("queries", [1, 6])
def test_the_strongest_are_those_of_all_scores(staged, name, queries, monkeypatch):
    """Examples of a stage that a method does not attribute to score 0, and are found where 0 is among the best."""
    problem, bank = staged
    monkeypatch.setattr("source_proj.attribution.products._BLOCK_SCORES", 1)
    monkeypatch.setattr("source_proj.attribution.products._MIN_ROWS", 7)
    method, options = METHODS[name]
    one = method(bank, model=problem.model, progress=False, **options)
    features = one.sketch(torch.utils.data.Subset(problem.queries, range(queries)))
    scores = np.asarray(one.score(features))
    for k in (1, 20, bank.n_rows):
        for verb, keys in ((one.top_k, -scores), (one.bottom_k, scores)):
            hits = verb(features, k)
            order = np.argsort(keys, axis=1, kind="stable")[:, :k]  # equal scores: the lower row
            np.testing.assert_array_equal(hits.indices, order)
            close(hits.scores, np.take_along_axis(scores, order, axis=1))
            assert hits.ids == [[bank.ids[i] for i in row] for row in order]


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Two runs on one training set, and their banks."""
    problems, folder = [classification(seed=0), classification(seed=1)], tmp_path_factory.mktemp("ensemble")
    problems[1].train = problems[0].train
    return problems[0], [
        problem.build(folder / str(i), sp.Sketch(dim=16, seed=i), storage=storage)
        for i, (problem, storage) in enumerate(zip(problems, ("int8", "float16"), strict=True))
    ]


@pytest.mark.parametrize("name", METHODS)
def test_ensembles_stream_what_they_score(ensemble, name):
    problem, both = ensemble
    method, options = METHODS[name]
    one = method(both, model=problem.model, progress=False, **options)
    features = one.sketch(problem.queries)
    scores = np.asarray(one.score(features))
    hits = one.top_k(features, 5)
    np.testing.assert_array_equal(hits.indices, np.argsort(-scores, axis=1, kind="stable")[:, :5])
    if name != "trak":  # which averages kernels and weights separately
        singles = [method(bank, model=problem.model, progress=False, **options) for bank in both]
        mean = sum(np.asarray(s.score([f])) for s, f in zip(singles, features, strict=True)) / 2
        close(scores, mean)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("segments", [1, 4])
def test_rows_in_memory_score_as_rows_read_each_time(banks, storage, segments):
    """To the bit; one checkpoint's rows are counted as they are banked, the mean of several as float32."""
    problem, by_storage = banks
    options = {"model": problem.model, "progress": False, "segments": segments}
    held = sp.Source(by_storage[storage], memory="1MB", **options)
    codec = find_codec("float32" if segments == 1 else storage)
    assert held.nbytes() == segments * codec.nbytes(50, 24)
    read = sp.Source(by_storage[storage], memory=2 * held.nbytes() // segments - 2, **options)
    features = held.sketch(problem.queries)
    assert "held in memory" in repr(held)
    assert "read from the bank each time" in repr(read)
    assert f"{bytes_in_words(held.nbytes())} of rows" in repr(held)
    for _ in range(2):
        scores = [method.score(features).to_numpy() for method in (held, read)]
        np.testing.assert_array_equal(*scores)
        np.testing.assert_array_equal(held.top_k(features, 7).indices, read.top_k(features, 7).indices)


def test_held_rows_are_read_once_and_others_each_time(banks, monkeypatch):
    problem, by_storage = banks
    reads = []
    original = sp.StageBank.iter_encoded

    def counted(self, checkpoint, *which):
        reads.append(checkpoint)
        return original(self, checkpoint, *which)

    monkeypatch.setattr(sp.StageBank, "iter_encoded", counted)
    for memory, expected in (("1MB", [0, 1, 2, 3]), (64, [0, 1, 2, 3] * 3)):
        method = sp.Source(by_storage["int8"], model=problem.model, progress=False, segments=4, memory=memory)
        features = method.sketch(problem.queries)
        method.fit()
        reads.clear()
        for _ in range(3):
            method.top_k(features, 2)
        assert reads == expected


@pytest.mark.parametrize("memory", ["4 XB", "GB", "-1GB", "", "0B", 0, -5, "1e3GB", "٤GB"])
def test_what_is_no_memory_is_refused(banks, memory):
    with pytest.raises(ValueError, match="memory must be"):
        sp.Source(banks[1]["int8"], memory=memory)


@pytest.mark.parametrize("memory", [1.5, True, [1]])
def test_memory_is_a_number_of_bytes_or_a_text(banks, memory):
    with pytest.raises(TypeError, match="memory must be bytes"):
        sp.Source(banks[1]["int8"], memory=memory)


@pytest.fixture(scope="module")
def of_seeds(tmp_path_factory):
    """Scores by banks of a storage, for two seeds of the sketch."""
    problem, folder = classification(n=60), tmp_path_factory.mktemp("seeds")

    def scores(storage):
        found = []
        for seed in (0, 1):
            bank = problem.build(folder / f"{storage}{seed}", sp.Sketch(dim=24, seed=seed), storage=storage)
            found.append(sp.Source(bank, model=problem.model, progress=False).score(problem.queries).to_numpy())
        return found

    return scores, scores("float32")


@pytest.mark.parametrize("storage", [name for name in STORAGES if name != "float32"])
def test_storage_changes_scores_by_less_than_another_seed_does(of_seeds, storage):
    """Law 6."""
    scores, (first, second) = of_seeds
    noise = np.linalg.norm(first - second)
    for stored, exact in zip(scores(storage), (first, second), strict=True):
        assert 0 < np.linalg.norm(stored - exact) < noise
