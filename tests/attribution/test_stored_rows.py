"""Scoring from rows as they are stored, and the storage of B."""

import numpy as np
import pytest
import torch
from problems import classification, two_stages

import source_proj as sp
from source_proj.bank.codecs import codec_names, find_codec

STORAGES = codec_names()
DIRECT = {
    "tracin": (sp.TracIn, {}),
    "graddot": (sp.GradDot, {}),
    "trak": (sp.Trak, {"ridge": 0.1}),
    "influence": (sp.InfluenceFunction, {}),
}
METHODS = {
    **DIRECT,
    "source": (sp.Source, {}),
    "source int8": (sp.Source, {"storage": "int8"}),
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

    def decoded(self, checkpoint):
        for block in original(self, checkpoint):
            rows = block.codec.decode(block.rows, block.scale)
            yield type(block)(block.start, block.stop, rows, None, block.d1, find_codec("float32"))

    monkeypatch.setattr(sp.StageBank, "iter_encoded", decoded)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", DIRECT)
def test_stored_rows_score_as_their_float32_copies(banks, name, storage, monkeypatch):
    problem, by_storage = banks
    method, options = DIRECT[name]
    one = method(by_storage[storage], model=problem.model, progress=False, **options)
    features = one.sketch(problem.queries)
    dtypes = {operand.rows.dtype for term in one._terms(one.banks[0], features[0]) for operand in term.train}
    assert dtypes == {find_codec(storage).dtype}
    direct = one.score(features)
    decoded_copy(monkeypatch)
    close(direct, one.score(features))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("queries", [1, 6])
def test_the_strongest_are_those_of_all_scores(staged, name, queries, monkeypatch):
    """Examples of a stage that a method does not attribute to score 0, and are found where 0 is among the best."""
    problem, bank = staged
    monkeypatch.setattr("source_proj.attribution.attributor._BLOCK_SCORES", 1)
    monkeypatch.setattr("source_proj.attribution.attributor._MIN_ROWS", 7)
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


@pytest.mark.parametrize("name", METHODS)
def test_ensembles_stream_what_they_score(tmp_path, name):
    problems = [classification(seed=0), classification(seed=1)]
    problems[1].train = problems[0].train
    both = [
        p.build(tmp_path / str(i), sp.Sketch(dim=16, seed=i), storage=storage)
        for i, (p, storage) in enumerate(zip(problems, ("int8", "float16"), strict=True))
    ]
    method, options = METHODS[name]
    one = method(both, model=problems[0].model, progress=False, **options)
    features = one.sketch(problems[0].queries)
    scores = np.asarray(one.score(features))
    hits = one.top_k(features, 5)
    np.testing.assert_array_equal(hits.indices, np.argsort(-scores, axis=1, kind="stable")[:, :5])
    if name != "trak":  # which averages kernels and weights separately
        singles = [method(bank, model=problems[0].model, progress=False, **options) for bank in both]
        mean = sum(np.asarray(s.score([f])) for s, f in zip(singles, features, strict=True)) / 2
        close(scores, mean)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_storage_of_b_is_stated_counted_and_bounded_in_error(banks, storage):
    problem, by_storage = banks
    bank = by_storage["float32"]
    exact = sp.Source(bank, model=problem.model, progress=False)
    features = exact.sketch(problem.queries)
    stored = sp.Source(bank, model=problem.model, progress=False, storage=storage)
    matrix, b = stored._of(bank).matrix(stored.codec), exact._of(bank).matrix(exact.codec).rows
    assert matrix.rows.dtype == find_codec(storage).dtype
    in_memory = matrix.rows.nbytes + (0 if matrix.scale is None else matrix.scale.nbytes)
    assert stored.nbytes() == in_memory
    assert f"B: 50 x 24 {storage}" in repr(stored)
    assert f"{in_memory} bytes" in repr(stored)
    # An entry of int8 errs by half a scale, one of float16 by 2^-11 of itself.
    largest = b.abs().amax(1, keepdim=True)
    entry = {"float32": 0 * b, "float16": b.abs() * 2.0**-11 + largest * 2.0**-39, "int8": largest.expand_as(b) / 254}
    query = exact._query(bank, features[0])
    bound = query.abs() @ entry[storage].T + 50 * torch.finfo(torch.float32).eps * (query.abs() @ b.abs().T)
    assert (np.abs(np.asarray(stored.score(features)) - np.asarray(exact.score(features))) <= bound.numpy()).all()


def test_each_storage_has_a_cache_entry_of_its_own(tmp_path):
    problem = classification()
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=20))
    made = {}
    for count, storage in enumerate(STORAGES, start=1):
        made[storage] = np.asarray(sp.Source(bank, model=problem.model, storage=storage).score(problem.queries))
        entries = [p.name for p in bank.fits.folder.iterdir() if p.name.startswith("source-")]
        assert len(entries) == count
    for storage in STORAGES:
        again = sp.Source(sp.open(tmp_path / "bank"), model=problem.model, storage=storage).score(problem.queries)
        np.testing.assert_array_equal(again, made[storage])


def test_an_unknown_storage_is_refused(banks):
    with pytest.raises(ValueError, match=r"storage must be one of .*, got 'int4'"):
        sp.Source(banks[1]["int8"], storage="int4")


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_storage_changes_scores_by_less_than_another_seed_does(tmp_path, storage):
    """Law 6, for B."""
    problem = classification(n=60)
    scores = {}
    for seed in (0, 1):
        bank = problem.build(tmp_path / str(seed), sp.Sketch(dim=24, seed=seed))
        for kind in ("float32", storage):
            method = sp.Source(bank, model=problem.model, progress=False, storage=kind)
            scores[seed, kind] = np.asarray(method.score(problem.queries))
    noise = np.linalg.norm(scores[0, "float32"] - scores[1, "float32"])
    for seed in (0, 1):
        assert np.linalg.norm(scores[seed, storage] - scores[seed, "float32"]) < noise
