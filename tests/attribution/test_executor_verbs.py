"""Any executor gives the bits of one process, whatever the order of completion and whichever workers are lost."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from lossy_executor import LossyExecutor
from preconditioned import adam_run
from problems import classification, two_stages

import source_proj as sp
from source_proj.attribution import products, shards

METHODS = {
    "source": (sp.Source, {"cache": False}),
    "source in 4 segments": (sp.Source, {"cache": False, "segments": 4}),
    "source by the sampled Fisher": (sp.Source, {"cache": False, "curvature": "sampled_fisher"}),
    "influence": (sp.InfluenceFunction, {"cache": False, "average": True}),
    "arnoldi": (sp.ArnoldiInfluence, {"cache": False, "rank": 3}),
    "datainf": (sp.DataInf, {}),
    "trak": (sp.Trak, {"cache": False}),
    "tracin": (sp.TracIn, {}),
    "hydra": (sp.Hydra, {}),
    "dot": (sp.GradDot, {}),
    "cos": (sp.GradCos, {}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Banks of many shards: one stage, two of them, in int8, and two runs in shards of other sizes."""
    folder = tmp_path_factory.mktemp("banks")
    problem, staged, preconditioned = classification(), two_stages(), adam_run(preconditioner="per_segment")
    options = {"sketch": sp.Sketch(24), "batch_size": 3}
    one = problem.build(folder / "one", **options, shard_rows=6, storage="int8", sampled_fisher=1)
    other = problem.build(folder / "other", sketch=sp.Sketch(24, seed=1), batch_size=5, shard_rows=5)
    return {
        "one": (problem, one),
        "staged": (staged, staged.build(folder / "staged", **options, shard_rows=6)),
        "preconditioned": (
            preconditioned,
            preconditioned.build(folder / "preconditioned", **options, shard_rows=3),
        ),
        "ensemble": (problem, [one, other]),
    }


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Few groups, of several shards each, and blocks that end within them."""
    monkeypatch.setattr(shards, "_GROUPS", 4)
    monkeypatch.setattr(products, "_MIN_ROWS", 7)
    monkeypatch.setattr(products, "_BLOCK_SCORES", 1)


def answers(method, features):
    """Everything that a method is asked, as arrays."""
    scores = {"score": method.score(features).to_numpy()}
    for verb in ("top_k", "bottom_k"):
        hits = getattr(method, verb)(features, 5)
        scores |= {f"{verb} rows": hits.indices, f"{verb} scores": hits.scores}
    if isinstance(method, sp.Source):
        scores |= {"self": method.self_influence().values, "segments": method.by_segment(features).values}
    return scores


def assert_same_bits(found, expected):
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].tobytes() == values.tobytes(), name


CASES = [
    *(("one", name) for name in METHODS),
    *((run, name) for run in ("staged", "preconditioned", "ensemble") for name in ("source", "hydra", "trak")),
]


@pytest.mark.parametrize(("run", "name"), CASES)
def test_the_bits_are_those_of_one_process(runs, run, name):
    problem, bank = runs[run]
    method, options = METHODS[name]
    alone = method(bank, model=problem.model, progress=False, **options)
    features = alone.sketch(problem.queries)
    expected = answers(alone, features)
    executor = LossyExecutor(CASES.index((run, name)))
    assert_same_bits(answers(method(bank, progress=False, executor=executor, **options), features), expected)
    assert len(executor.done) > 4
    assert len(executor.futures) > len(executor.done)  # some were lost


def test_threads_need_no_copies(runs):
    problem, bank = runs["one"]
    alone = sp.Source(bank, model=problem.model, progress=False, cache=False)
    features = alone.sketch(problem.queries)
    with ThreadPoolExecutor(3) as threads:
        assert_same_bits(answers(alone.replace(executor=threads), features), answers(alone, features))


def test_streamed_outputs_are_the_same(runs, tmp_path):
    problem, bank = runs["one"]
    alone = sp.Source(bank, model=problem.model, progress=False)
    shared = alone.replace(executor=LossyExecutor(1))
    features = alone.sketch(problem.queries)
    pairs = [
        (method.score(features, out=tmp_path / f"{n}.zarr"), method.top_k(features, 3, out=tmp_path / f"{n}.parquet"))
        for n, method in enumerate((alone, shared))
    ]
    assert np.array_equal(pairs[0][0].values, pairs[1][0].values)
    assert list(pairs[0][1]) == list(pairs[1][1])


def test_progress_counts_the_rows_that_workers_read(runs):
    problem, bank = runs["one"]
    told = []
    method = sp.Source(
        bank, model=problem.model, cache=False, executor=LossyExecutor(0), progress=lambda *given: told.append(given)
    )
    method.fit()
    assert told[-1] == ("fit", 4 * 40, 4 * 40)
    assert len(told) == 2 * 4  # two segments


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7, 16, 30])
@pytest.mark.parametrize("checkpoints", [[0], [2, 0, 1]])
def test_groups_hold_every_shard_once_and_in_order(count, checkpoints):
    stage = SimpleNamespace(shard_spans=[(i, i + 1) for i in range(count)])
    groups = shards.shard_groups(stage, checkpoints)
    flat = [(c, shard) for group in groups for c, own in group for shard in own]
    assert flat == [(c, shard) for c in checkpoints for shard in range(count)]
    assert len(groups) <= 4
    assert all(group for group in groups)


@pytest.mark.parametrize("row_bytes", [0, 1, 100])
def test_spans_cover_the_rows_once_and_are_short_where_results_are_large(runs, row_bytes):
    bank = runs["staged"][1]
    spans = shards.row_spans(bank, row_bytes=row_bytes, limit=600)
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(bank.n_rows))
    assert all((stop - start) * row_bytes <= 600 for start, stop in spans)
    assert len(spans) <= 4 or row_bytes == 100
    only = shards.row_spans(bank, [1])
    assert (only[0][0], only[-1][1]) == (bank.stages[0].n, bank.n_rows)


def test_a_bank_is_sent_by_its_place(runs, tmp_path):
    _, bank = runs["one"]
    again = pickle.loads(pickle.dumps(bank))
    assert len(pickle.dumps(bank)) < 1000
    assert again.fingerprint == bank.fingerprint
    assert pickle.loads(pickle.dumps(bank)) is again  # a worker opens it once
    stage = pickle.loads(pickle.dumps(bank.stages[0]))
    assert [b.rows.tolist() for b in stage.iter_rows(1)] == [b.rows.tolist() for b in bank.stages[0].iter_rows(1)]


def test_another_bank_at_its_place_is_refused(tmp_path):
    problem = classification()
    sent = pickle.dumps(problem.build(tmp_path / "bank", sketch=sp.Sketch(24)))
    (tmp_path / "bank").rename(tmp_path / "elsewhere")
    with pytest.raises(sp.BankError, match="bank"):
        pickle.loads(sent)
    problem.build(tmp_path / "bank", sketch=sp.Sketch(24, seed=1))
    with pytest.raises(sp.MismatchError, match="another one here than where it was sent from"):
        pickle.loads(sent)


def test_what_is_no_executor_is_refused(runs):
    with pytest.raises(TypeError, match="executor must be shaped like"):
        sp.Source(runs["one"][1], executor=4)
