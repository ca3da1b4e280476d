"""Hits in files are those in memory, however they are asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import source

from source_proj.attribution import streaming
from source_proj.attribution.hits_file import HitsFile


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
