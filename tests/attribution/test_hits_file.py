"""Hits in files are those in memory, however they are asked for."""

import shutil

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import source

import source_proj as sp
from source_proj.attribution import streaming
from source_proj.attribution.hits_file import HitsFile, sealed_facts, write_hits
from source_proj.attribution.score_files import scores_facts


@pytest.fixture(scope="module")
def streamed(blobs, tmp_path_factory):
    """Hits of seven queries in blocks of two: in memory, and in a file of each kind."""
    problem, bank = blobs
    method, folder = source(problem, bank, batch_size=2), tmp_path_factory.mktemp("hits")
    features = method.sketch(problem.queries, ids=[f"q{i}" for i in range(7)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streaming, "_MOST_QUERIES", 2)
        patched.setattr(streaming, "_CHUNK", (2, 16))
        files = {ending: method.top_k(features, 5, out=folder / f"hits{ending}") for ending in (".zarr", ".parquet")}
        held = [method.top_k(features.part(start, start + 2), 5) for start in range(0, 7, 2)]
    return held, files


@pytest.mark.parametrize("ending", [".parquet", ".zarr"])
def test_every_query_is_read_by_its_place(streamed, ending):
    held, files = streamed
    wanted = [hits for part in held for _, hits in part]
    places = range(-7, 7)
    assert [files[ending][place] for place in places] == [wanted[place] for place in places]
    assert files[ending][np.int64(3)] == wanted[3]
    for outside in (7, -8):
        with pytest.raises(IndexError, match=f"there are 7 queries, got {outside}"):
            files[ending][outside]
    with pytest.raises(TypeError, match="place or a slice of places, got 'q1'"):
        files[ending]["q1"]


PLACE = st.none() | st.integers(-9, 9)


@settings(max_examples=25)
@given(start=PLACE, stop=PLACE, step=st.none() | st.sampled_from([-3, -1, 1, 2]))
@pytest.mark.parametrize("ending", [".parquet", ".zarr"])
def test_a_slice_is_that_of_the_hits_in_memory(streamed, ending, start, stop, step):
    held, files = streamed
    wanted = [entry for part in held for entry in part][start:stop:step]
    indices = np.concatenate([part.indices for part in held])[start:stop:step]
    hits = files[ending][start:stop:step]
    assert list(hits) == wanted
    assert np.array_equal(hits.indices, indices)
    assert (hits.scores.shape, hits.unit, hits.higher_is_better) == ((len(wanted), 5), "logit margin", True)


@pytest.mark.parametrize("ending", [".parquet", ".zarr"])
def test_a_file_is_opened_by_its_name(streamed, ending):
    file = streamed[1][ending]
    assert list(HitsFile(file.path)) == list(file)
    assert repr(file) == f"HitsFile('{file.path}': 7 queries x 5 training examples, in the logit margin)"


def written(folder, ending, query_ids, train_ids, block=2, k=3):
    """A file of random hits, as streaming writes it."""
    numbers, folder = np.random.default_rng(len(query_ids)), folder / f"made{ending}"
    shutil.rmtree(folder, ignore_errors=True)
    shape = len(query_ids), min(k, len(train_ids))
    group = zarr.open_group(folder, mode="w")
    where = np.stack([numbers.permutation(len(train_ids))[: shape[1]] for _ in query_ids])
    arrays = [
        group.create_array(name, data=data, chunks=(block, shape[1]))
        for name, data in (("indices", where), ("scores", numbers.standard_normal(shape).astype(np.float32)))
    ]
    facts = scores_facts(query_ids, train_ids, "u", higher_is_better=True)
    path = folder.with_name(f"hits{ending}")
    if ending == ".zarr":
        group.update_attributes(sealed_facts(facts, *arrays))
        return HitsFile(folder), where
    write_hits(path, *arrays, facts, query_ids, train_ids, block, overwrite=True)
    return HitsFile(path), where


WORD = st.text(st.characters(exclude_categories=[]), max_size=3) | st.sampled_from(["a/b", "1", "\ud800"])
ID = st.integers() | WORD | st.booleans() | st.tuples(WORD, st.integers() | st.tuples(WORD)) | st.none()
IDS = st.lists(ID, min_size=1, max_size=5, unique_by=lambda given: (given, type(given)))


@settings(max_examples=60, deadline=None)
@given(
    query_ids=IDS | st.lists(st.integers(-9, 9), min_size=1), train_ids=IDS | st.lists(WORD, min_size=1, unique=True)
)
@pytest.mark.parametrize("ending", [".parquet", ".zarr"])
def test_ids_come_back_as_they_were_given(tmp_path_factory, ending, query_ids, train_ids):
    """Pairs of stage and id came back as lists from one kind of file, and as words from the other."""
    hits, where = written(tmp_path_factory.getbasetemp(), ending, query_ids, train_ids)
    assert [query_id for query_id, _ in hits] == query_ids
    assert list(map(type, hits[:].query_ids)) == list(map(type, query_ids))
    wanted = [[train_ids[place] for place in row] for row in where]
    assert [[hit.id for hit in own] for _, own in hits] == hits[:].ids == wanted
    assert [type(each) for row in hits[:].ids for each in row] == [type(each) for row in wanted for each in row]


@pytest.mark.parametrize("ending", [".parquet", ".zarr"])
def test_hits_of_stages_name_what_can_be_removed(staged, tmp_path, ending):
    problem, bank = staged
    method = source(problem, bank)
    features = method.sketch(problem.queries, ids=[("q", np.int64(i)) for i in range(6)])
    file = method.top_k(features, 4, out=tmp_path / f"hits{ending}")
    held = method.top_k(features, 4)
    assert list(file) == list(held)
    assert method.score(features).predict_removal([hit.id for hit in file[0]]).n_removed == 4


def test_what_is_flipped_in_long_form_is_noticed(streamed, tmp_path):
    """Half of all flipped bits gave other hits, and most others the errors of whatever met them."""
    whole = streamed[1][".parquet"].path.read_bytes()
    good = HitsFile(streamed[1][".parquet"].path)
    path, numbers, refused = tmp_path / "flipped.parquet", np.random.default_rng(0), []
    for place in numbers.choice(len(whole), 400, replace=False):
        content = bytearray(whole)
        content[place] ^= 1 << int(numbers.integers(8))
        path.write_bytes(content)
        try:
            hits = HitsFile(path)
            assert list(hits) == list(good)
            assert (hits.unit, hits.k, len(hits)) == (good.unit, good.k, len(good))
        except sp.MismatchError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(str(path) in message for message in refused)
    path.write_bytes(whole[:-20])
    with pytest.raises(sp.MismatchError, match=r"flipped.parquet' is no Parquet file of hits"):
        HitsFile(path)


@pytest.mark.parametrize("ending", [".parquet", ".zarr"])
def test_hits_do_not_follow_their_file_to_other_queries(streamed, blobs, tmp_path, ending):
    problem, bank = blobs
    method, path = source(problem, bank), tmp_path / f"hits{ending}"
    features = method.sketch(problem.queries)
    first = method.top_k(features, 3, out=path)
    wanted = list(method.top_k(features, 3))
    method.bottom_k(features, 3, out=path, overwrite=True)
    if ending == ".parquet":  # it is still open
        assert list(first) == wanted
        return
    with pytest.raises(sp.MismatchError, match=r"other hits were written to .* since it was opened"):
        list(first)
