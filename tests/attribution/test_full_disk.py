"""A disk without room is named with the file and the remedy, and what is asked again is whole."""

import errno

import pytest
from problems import source

from source_proj.attribution import streaming

resource = pytest.importorskip("resource", reason="Windows has no limits of files")

ROOM = 700  # bytes of a file


@pytest.fixture
def full():
    """Files get no larger than a little: the system's own error, like that of a full disk, in whatever writes them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(room):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "to_zarr": ("scores.zarr", lambda method, queries, path: method.score(queries).to_zarr(path)),
    "to_parquet": ("scores.parquet", lambda method, queries, path: method.score(queries).to_parquet(path)),
    "score": ("scores.zarr", lambda method, queries, path: method.score(queries, out=path)),
    "top_k": ("hits.parquet", lambda method, queries, path: method.top_k(queries, 20, out=path)),
    "top_k of zarr": ("hits.zarr", lambda method, queries, path: method.top_k(queries, 20, out=path)),
    "features": ("q.safetensors", lambda method, queries, path: method.sketch(queries).save(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_the_call_goes_on_when_it_is_repeated(blobs, tmp_path, monkeypatch, full, name):
    monkeypatch.setattr(streaming, "_MOST_QUERIES", 2)
    problem, bank = blobs
    method, (file, write) = source(problem, bank, batch_size=2), WRITERS[name]
    method.score(problem.queries)  # whose fit has room
    path = tmp_path / file
    full(ROOM)
    with pytest.raises(OSError, match=rf"{path} cannot be written; make room \(or lift the limit\), then ") as refused:
        write(method, problem.queries, path)
    full(resource.RLIM_INFINITY)
    assert refused.value.errno == errno.EFBIG
    assert str(refused.value).count("make room") == 1
    assert not path.exists()
    write(method, problem.queries, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [file]
