"""Scores: ids, sums, rankings, predictions, exports."""

import warnings

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from source_proj.attribution.scores import Scores
from source_proj.attribution.words import signed


def example(q: int = 3, n: int = 6, seed: int = 0, **options) -> Scores:
    values = np.random.default_rng(seed).standard_normal((q, n)).astype(np.float32)
    options = {"unit": "logit margin", **options}
    return Scores(values, [f"q{i}" for i in range(q)], [f"z{i}" for i in range(n)], **options)


@given(n=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 100))
def test_top_k_is_a_full_sort(n, k, seed):
    scores = example(2, n, seed)
    if k > n:
        with pytest.raises(ValueError, match=f"1..{n}"):
            scores.top_k(k)
        return
    order = np.argsort(-scores.values, axis=1)
    np.testing.assert_array_equal(scores.top_k(k).indices, order[:, :k])
    np.testing.assert_array_equal(scores.bottom_k(k).indices, order[:, ::-1][:, :k])
    np.testing.assert_array_equal(scores.top_k(k).scores, np.take_along_axis(scores.values, order[:, :k], 1))
    assert scores.top_k(k).ids[0] == [f"z{i}" for i in order[0, :k]]


def test_helpful_follows_higher_is_better():
    up, down = example(), example(higher_is_better=False)
    assert up.helpful(2).ids == up.top_k(2).ids == down.harmful(2).ids
    assert up.harmful(2).ids == up.bottom_k(2).ids == down.helpful(2).ids


def test_group_and_predict_removal():
    scores = example(stage_sizes=[4, 2])
    v = scores.values.astype(np.float64)
    alone = scores.group(["z1", "z5"])
    assert alone.train_ids == ["group"]
    np.testing.assert_allclose(alone, v[:, [1, 5]].sum(1)[:, None])
    mask = np.array([False, True, False, False, False, True])
    np.testing.assert_allclose(scores.group(mask), scores.group(["z5", "z1"]))
    named = scores.group({"a": ["z0"], "b": ["z1", "z2"]})
    np.testing.assert_allclose(named.values, np.stack([v[:, 0], v[:, 1] + v[:, 2]], 1))
    assert named.train_ids == ["a", "b"]
    change = scores.predict_removal(["z1", "z5"])
    np.testing.assert_allclose(change, -v[:, [1, 5]].sum(1))
    assert (change.normalization, change.n_removed, change.unit) == ("fixed 1/N", 2, "logit margin")
    shown = ", ".join(map(signed, change.values.tolist()))
    assert repr(change) == f"PredictedChange({shown} logit margin without 2 training examples, fixed 1/N)"
    again = scores.predict_removal(["z1", "z5"], renormalize=True)
    # the weights of the three that stay of four rise by a third of 1/N; of one that stays of two, by all of it
    np.testing.assert_allclose(again, -v[:, [1, 5]].sum(1) + v[:, [0, 2, 3]].sum(1) / 3 + v[:, 4])
    assert again.normalization == "renormalized"


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (["nobody"], "unknown training ids"),
        (["z0", "z0"], "some are repeated"),
        (np.zeros(4, dtype=bool), r"shape \(6,\)"),
        (np.zeros((6, 1), dtype=bool), r"shape \(6,\)"),
        ([True, False], r"shape \(6,\)"),
        (torch.zeros(7, dtype=torch.bool), r"shape \(6,\)"),
    ],
)
def test_bad_subsets_are_refused(subset, message):
    with pytest.raises(ValueError, match=message):
        example().group(subset)


@given(n=st.integers(1, 9), data=st.data())
def test_every_form_of_a_subset_is_the_same_subset(n, data):
    flags = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    ids = list(range(10, 10 + n))
    scores = Scores(np.random.default_rng(n).standard_normal((2, n)), [0, 1], ids, unit="loss")
    wanted = scores.values[:, np.array(flags)].sum(1)
    chosen = [train_id for train_id, flag in zip(ids, flags, strict=True) if flag]
    masks = [flags, tuple(flags)]
    lists = [chosen, iter(chosen), set(chosen)]
    for kind in (np.array, torch.tensor):
        masks += [kind(flags), list(kind(flags))]
        lists += [kind(chosen), list(kind(chosen))]
    for subset in masks + lists:
        np.testing.assert_allclose(scores.group(subset), wanted[:, None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("subset", [3, 3.0, None, "z0", b"z0", {"a": ["z0"]}, np.int64(3), torch.tensor(3)])
def test_what_is_no_subset_is_refused(subset):
    with pytest.raises(TypeError, match="a sequence of training ids, or a boolean mask, got"):
        example().predict_removal(subset)


def test_a_mask_among_ids_is_refused():
    scores = Scores(np.ones((1, 3)), [0], [0, 1, 2], unit="loss")
    with pytest.raises(TypeError, match="mixes both"):
        scores.group([True, 2])
    with pytest.raises(TypeError, match="training ids are hashable"):
        scores.group([[0], [1]])


@given(n=st.integers(2, 9), data=st.data())
def test_training_ids_that_are_repeated_are_refused_by_name(n, data):
    ids = [f"z{i}" for i in range(n)]
    first, second = sorted(data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True)))
    ids[second] = ids[first]
    with pytest.raises(ValueError, match=f"and 'z{first}' stands at places {first} and {second}"):
        Scores(np.zeros((2, n)), [0, 0], ids, unit="loss")
    assert Scores(np.zeros((2, n)), [0, 0], range(n), unit="loss").query_ids == [0, 0]
    with pytest.raises(TypeError, match=r"training ids are hashable .* got {'a': 1}"):
        Scores(np.zeros((1, 1)), [0], [{"a": 1}], unit="loss")


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="at least one group"):
        example().group({})


def test_a_whole_stage_cannot_be_renormalized_away():
    with pytest.raises(ValueError, match="nothing is left"):
        example(stage_sizes=[4, 2]).predict_removal(["z4", "z5"], renormalize=True)


def test_similarities_are_not_summed():
    cosine = example(additive=False, unit="cosine")
    assert "similarity (cosine)" in repr(cosine)
    for verb in (cosine.group, cosine.predict_removal):
        with pytest.raises(ValueError, match="are a similarity"):
            verb(["z0"])


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\) do not fit 2 query ids and 4"):
        Scores(np.zeros((2, 3)), [0, 1], [0, 1, 2, 3], unit="loss")


def test_array_like():
    scores = example()
    assert np.asarray(scores) is not None
    np.testing.assert_array_equal(np.asarray(scores), scores.values)
    np.testing.assert_array_equal(scores[1, 2:4], scores.values[1, 2:4])
    assert len(scores) == 3
    assert scores.shape == (3, 6)
    assert scores.to_numpy() is scores.values
    assert "+: including the example raised the logit margin" in repr(scores)


def test_exports(tmp_path):
    scores = example()
    frame = scores.to_pandas()
    assert frame.loc["q1", "z2"] == scores.values[1, 2]
    scores.to_zarr(tmp_path / "scores.zarr")
    array = zarr.open_array(tmp_path / "scores.zarr", mode="r")
    np.testing.assert_array_equal(array[...], scores.values)
    assert array.attrs["train_ids"] == scores.train_ids
    with pytest.raises(FileExistsError, match="remove it"):
        scores.to_zarr(tmp_path / "scores.zarr")


def test_tuple_ids_export(tmp_path):
    ids = [("pretrain", 0), ("finetune", 0)]
    scores = Scores(np.ones((1, 2)), [0], ids, unit="loss")
    assert scores.top_k(2).ids[0] == ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores.to_pandas()[("finetune", 0)].iloc[0] == 1
    assert scores.to_zarr(tmp_path / "s.zarr").attrs["train_ids"] == [["pretrain", 0], ["finetune", 0]]


_IDS = st.one_of(
    st.integers(0, 3), st.sampled_from(["0", "1", "a/0", "a"]), st.tuples(st.sampled_from("ab"), st.integers(0, 1))
)


@given(ids=st.lists(_IDS, min_size=1, max_size=6, unique=True))
def test_a_table_says_every_id_apart_or_is_refused(tmp_path_factory, ids):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.mktemp("tables") / "scores.parquet"
    scores = Scores(np.arange(len(ids), dtype=np.float32)[None], ["q"], ids, unit="logit margin")
    words = {"/".join(map(str, given)) if isinstance(given, tuple) else str(given) for given in ids}
    if len(words) < len(ids):
        with pytest.raises(ValueError, match=r"would both be '.*' in a table"):
            scores.to_parquet(path)
        assert not path.exists()
    else:
        scores.to_parquet(path)
        assert {str(word) for word in parquet.read_table(path).column("train_id").to_pylist()} == words
