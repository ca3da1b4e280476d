"""Queries that are none, and rows that are no positions: the same shapes as of some, or a clear refusal."""

import numpy as np
import pytest
import torch

import source_proj as sp


@pytest.fixture(scope="module")
def source(blobs):
    problem, bank = blobs
    return problem.queries, sp.Source(bank, model=problem.model, progress=False)


@pytest.fixture(scope="module")
def nothing(source):
    queries, method = source
    return method.sketch(queries).only([])


def test_scores_of_no_queries_stream_as_they_are_held(source, nothing, tmp_path):
    _, method = source
    held, streamed = method.score(nothing), method.score(nothing, out=tmp_path / "scores.zarr")
    assert held.shape == streamed.shape == streamed.values.shape == (0, method.n_rows)
    assert streamed.top_k(2).ids == held.top_k(2).ids == []


@pytest.mark.parametrize("ending", ["zarr", "parquet"])
def test_hits_of_no_queries_stream_as_they_are_held(source, nothing, ending, tmp_path):
    _, method = source
    hits = method.top_k(nothing, 3, out=tmp_path / f"hits.{ending}")
    assert len(hits) == len(method.top_k(nothing, 3)) == 0
    assert hits[:].scores.shape == (0, 3)
    assert hits.to_pandas().columns.tolist() == ["query_id", "train_id", "rank", "score"]


def test_parts_of_no_queries_make_an_empty_table(source, nothing):
    _, method = source
    frame = method.by_segment(nothing).to_pandas()
    assert (len(frame), frame["score"].dtype) == (0, np.float32)


@pytest.mark.parametrize(
    "rows",
    [
        [True, False],
        np.array([True, False]),
        torch.tensor([True, False], device="cpu", dtype=torch.bool),
        [1.5],
        np.array([1.0]),
        ["1"],
    ],
    ids=repr,
)
def test_rows_that_are_no_positions_are_refused(source, rows):
    queries, method = source
    for asked in (method.score_rows, method.by_segment):
        with pytest.raises(TypeError, match="rows are positions of training examples, whole numbers"):
            asked(queries, rows)


@pytest.mark.parametrize("kind", [list, np.uint8, np.int64, torch.tensor])
def test_positions_of_any_library_are_the_same(source, kind):
    queries, method = source
    rows = [4, 0, 4] if kind is list else kind([4, 0, 4])
    np.testing.assert_array_equal(method.score_rows(queries, rows), method.score_rows(queries, [4, 0, 4]))
    np.testing.assert_array_equal(method.by_segment(queries, rows).values, method.by_segment(queries, [4, 0, 4]).values)
