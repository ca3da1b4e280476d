"""Scores in a file are those that were written, or it is said that they are not."""

import shutil

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import source

import source_proj as sp
from source_proj.attribution import streaming
from source_proj.attribution.scores import Scores


@pytest.fixture(scope="module")
def streamed(blobs, tmp_path_factory):
    """Scores of seven queries in chunks of two queries and 16 examples."""
    problem, bank = blobs
    method, path = source(problem, bank, batch_size=2), tmp_path_factory.mktemp("scores") / "scores.zarr"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streaming, "_MOST_QUERIES", 2)
        patched.setattr(streaming, "_CHUNK", (2, 16))
        scores = method.score(problem.queries, out=path)
    return method, scores, path


def opened(path):
    array = zarr.open_array(path, mode="r")
    return Scores(array, array.attrs["query_ids"], array.attrs["train_ids"], unit=array.attrs["unit"])


PLACES = st.integers(-7, 6) | st.slices(7)
COLUMNS = st.integers(-40, 39) | st.slices(40)
ROWS = st.lists(st.integers(-7, 6), min_size=1) | st.lists(st.booleans(), min_size=7, max_size=7)


@settings(max_examples=60)
@given(index=PLACES | st.tuples(PLACES, COLUMNS) | ROWS | ROWS.map(np.array) | st.just(...) | st.tuples(PLACES, ROWS))
def test_values_are_indexed_as_numpy_does(streamed, index):
    _, scores, path = streamed
    values = zarr.open_array(path, mode="r")[...]
    if isinstance(index, tuple) and isinstance(index[1], list) and len(index[1]) == 7 and isinstance(index[1][0], bool):
        index = index[0], [*index[1], *[False] * 33]
    np.testing.assert_array_equal(scores[index], values[index])
    assert np.shape(scores[index]) == values[index].shape


@pytest.mark.parametrize("written", ["streamed", "to_zarr"])
def test_damaged_scores_are_refused_by_name(streamed, tmp_path, written):
    """A chunk that was lost, or came from elsewhere, was read as scores of NaN, or of other queries."""
    _, scores, path = streamed
    copy = tmp_path / "copy.zarr"
    if written == "streamed":
        shutil.copytree(path, copy)
    else:
        scores.to_zarr(copy)
    held = opened(copy)
    np.testing.assert_array_equal(held.values, scores.values)
    chunk = sorted(file for file in (copy / "c").rglob("*") if file.is_file())[-1]
    content = chunk.read_bytes()
    other = sorted(file for file in (copy / "c").rglob("*") if file.is_file())[0].read_bytes()
    damages = {"lost": None, "empty": b"", "cut": content[:-3], "flipped": bytes([content[0] ^ 4]) + content[1:]}
    if other != content:
        damages["exchanged"] = other
    for damage in damages.values():
        chunk.unlink(missing_ok=True)
        if damage is not None:
            chunk.write_bytes(damage)
        for verb in (
            lambda: held.values,
            lambda: held.top_k(2),
            lambda: held.predict_removal([0]),
            lambda: held[6, 39],
            lambda: held.to_pandas(),
            lambda: opened(copy).bottom_k(1),
        ):
            with pytest.raises(sp.MismatchError, match=r"the scores '.*copy.zarr' are damaged"):
                verb()
    chunk.write_bytes(content)
    np.testing.assert_array_equal(held.values, scores.values)


def test_a_damaged_description_is_refused(streamed, tmp_path):
    _, scores, path = streamed
    copy = tmp_path / "copy.zarr"
    shutil.copytree(path, copy)
    content = (copy / "zarr.json").read_text()
    for old, new in [("logit margin", "logit mbrgin"), ('"higher_is_better": true', '"higher_is_better": false'),
                     ('"sha256"', '"sha255"'), ('"blocks"', '"blockt"'), ('"query_ids"', '"query_idt"')]:  # fmt: skip
        assert old in content
        (copy / "zarr.json").write_text(content.replace(old, new, 1))
        with pytest.raises(sp.MismatchError, match=r"the scores '.*copy.zarr' are damaged"):
            Scores(zarr.open_array(copy, mode="r"), scores.query_ids, scores.train_ids, unit="u")


@pytest.mark.parametrize("count", [7, 5])
def test_scores_do_not_follow_their_file_to_other_queries(streamed, blobs, tmp_path, count):
    """They gave the numbers of the queries that were written there since, under their own queries' ids."""
    method, _, _ = streamed
    queries = blobs[0].queries
    first = method.score(queries, out=tmp_path / "scores.zarr")
    x, y = (tensor[:count] for tensor in queries.tensors)
    second = method.score(torch.utils.data.TensorDataset(x + 1, y), out=tmp_path / "scores.zarr", overwrite=True)
    for verb in (lambda: first.values, lambda: first.helpful(3), lambda: first[0, 3]):
        with pytest.raises(sp.MismatchError, match=r"other scores were written to '.*scores.zarr' since it was opened"):
            verb()
    assert second.values.shape == (count, 40)
    again = method.score(queries, out=tmp_path / "scores.zarr", overwrite=True)
    np.testing.assert_array_equal(first.values, again.values)  # the same as before


def test_arrays_of_others_are_read_as_they_are(tmp_path):
    values = np.arange(12.0).reshape(3, 4)
    array = zarr.create_array(str(tmp_path / "mine.zarr"), data=values, attributes={"unit": "mine"})
    scores = Scores(array, "abc", range(4), unit="u")
    np.testing.assert_array_equal(scores.values, values)
    assert scores.top_k(1).indices.tolist() == [[3], [3], [3]]
