"""Scores and the strongest rows, on every backend, against numpy in float64 and a plain sort."""

import ctypes
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_backends import (
    BACKENDS,
    Strongest,
    assert_strongest,
    bottom_k,
    exact_and_bound,
    interpreted,
    native,
    score,
    spans,
    top_k,
)

from source_proj.kernels import scoring_native, scoring_torch
from source_proj.kernels.native import native_library
from source_proj.kernels.scoring import scoring_backend, scoring_backends

TYPES = (torch.float32, torch.float16, torch.int8)


def operands(count, n, dim, dtype, *, scaled=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(count, dim, generator=generator)
    if dtype == torch.int8:
        rows = torch.randint(-127, 128, (n, dim), generator=generator, dtype=torch.int8)
    else:
        rows = torch.randn(n, dim, generator=generator).to(dtype)
    return queries, rows, torch.rand(n, generator=generator) if scaled else None


def whole(count, n, dim, dtype, *, seed=0):
    """Operands whose products are small integers, so that any order of summation is exact and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (count, dim), generator=generator).float()
    rows = torch.randint(-2, 3, (n, dim), generator=generator).to(dtype)
    return queries, rows, 2.0 ** torch.randint(-1, 2, (n,), generator=generator)


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("count", "n", "dim"), [(1, 1, 1), (1, 9, 130), (3, 70, 31), (7, 66, 16), (16, 5, 40), (40, 67, 33)]
)
def test_scores_are_the_products(count, n, dim, dtype, scaled, backend, level, at_level):
    at_level(level)
    given_ = operands(count, n, dim, dtype, scaled=scaled)
    exact, bound = exact_and_bound(*given_)
    found = score(*given_, backend=backend)
    assert found.shape == (count, n)
    assert found.dtype == torch.float32
    assert (np.abs(found.numpy() - exact) <= bound).all()


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(
    ("count", "n", "k"), [(1, 1, 1), (1, 200, 3), (2, 33, 33), (5, 130, 7), (16, 64, 10), (40, 150, 9), (3, 100, 70)]
)
def test_ties_go_to_the_lower_row(count, n, k, largest, dtype, backend, level, at_level):
    at_level(level)
    queries, rows, scale = whole(count, n, 5, dtype)
    exact, _ = exact_and_bound(queries, rows, scale)
    values, found = (top_k if largest else bottom_k)(queries, rows, k, scale, backend=backend)
    assert_strongest((values, found), exact, k, largest=largest)


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 12, 40])
def test_the_strongest_are_those_of_the_scores(count, dtype, backend, level, at_level):
    """Of the same backend, whose rounding decides between nearly equal scores."""
    at_level(level)
    queries, rows, scale = operands(count, 140, 37, dtype)
    scores = score(queries, rows, scale, backend=backend)
    for verb, largest in ((top_k, True), (bottom_k, False)):
        values, found = verb(queries, rows, 6, scale, backend=backend)
        assert_strongest((values, found), scores.numpy(), 6, largest=largest)


@settings(max_examples=60)
@given(
    count=st.integers(0, 36),
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    dim=st.integers(1, 40),
    k=st.integers(1, 100),
    dtype=st.sampled_from(TYPES),
    largest=st.booleans(),
    backwards=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=native)])
def test_streamed_blocks_in_any_order_equal_one_sort(
    backend, count, sizes, dim, k, dtype, largest, backwards, seed
):  # fmt: skip
    queries, rows, scale = whole(count, sum(sizes), dim, dtype, seed=seed)
    best = Strongest(count, k, largest=largest, backend=backend)
    parts = list(enumerate(spans(sizes)))
    for index, part in reversed(parts) if backwards else parts:
        if index % 2:
            best.add_scores(score(queries, rows[part], scale[part]), first=part.start)
        else:
            best.add(queries, rows[part], scale[part], first=part.start)
    values, found = best.result()
    exact, _ = exact_and_bound(queries, rows, scale)
    kept = min(k, sum(sizes)) if count else found.shape[1]
    assert_strongest((values, found), exact, kept, largest=largest)


@interpreted
@pytest.mark.parametrize("k", [1, 5, 70])
def test_triton_streams_blocks_shorter_than_k(k):
    queries, rows, scale = whole(3, 150, 4, torch.int8)
    best = Strongest(3, k, backend="triton")
    for start, stop in ((0, 2), (2, 90), (90, 150)):
        best.add(queries, rows[start:stop], scale[start:stop], first=start)
        scores = exact_and_bound(queries, rows[:stop], scale[:stop])[0]
        assert_strongest(best.result(), scores, min(k, stop), largest=True)


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
@pytest.mark.parametrize("count", [2, 40])
def test_extremes_of_int8(count, backend, level, at_level):
    at_level(level)
    rows = torch.tensor([[127] * 50, [-127] * 50, [-128] * 50, [127, -127] * 25], dtype=torch.int8)
    scale = torch.tensor([2.0, 0.5, 1.0, 0.0])
    queries = torch.ones(count, 50)
    expected = [127 * 100.0, -127 * 25.0, -128 * 50.0, 0.0]
    assert score(queries, rows, scale, backend=backend).tolist() == [expected] * count
    values, found = top_k(queries, rows, 4, scale, backend=backend)
    assert found.tolist() == [[0, 3, 1, 2]] * count
    assert values.tolist() == [sorted(expected, reverse=True)] * count


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
def test_every_half_is_widened_exactly(backend, level, at_level):
    """All finite float16 numbers, subnormal ones too, and infinities; one number a row."""
    at_level(level)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[~halves.isnan()]
    if backend == "triton":
        halves = halves[::331]  # the interpreter is slow
    columns = 24  # beyond the last whole vector too
    padded = torch.cat([halves, halves[: -len(halves) % columns]]).view(-1, columns)
    for column in range(columns) if backend == "native" else (0, columns - 1):
        query = torch.zeros(1, columns)
        query[0, column] = 1.0
        finite = padded.isfinite().all(1)  # infinity times zero is NaN
        found = score(query, padded[finite], backend=backend)
        assert torch.equal(found[0], padded[finite][:, column].float())
    infinite = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]], dtype=torch.float16)
    found = score(torch.ones(1, 1), infinite, backend=backend)[0]
    assert found[:2].tolist() == [torch.inf, -torch.inf]
    assert found[2].isnan()


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # triton's interpreter is numpy
@pytest.mark.parametrize("count", [1, 40])
def test_nan_is_refused_and_infinity_ordered(count, backend, level, at_level):
    at_level(level)
    queries, rows, _ = operands(count, 150, 8, torch.float32)
    rows[77, 3], rows[101, 0] = torch.nan, torch.nan
    for verb in (top_k, bottom_k):
        with pytest.raises(ValueError, match="score of row 77 is NaN"):
            verb(queries, rows, 5, backend=backend)
    best = Strongest(count, 5, backend=backend)
    with pytest.raises(ValueError, match="score of row 1077 is NaN"):
        best.add_scores(score(queries, rows, backend=backend), first=1000)
    queries, rows = torch.ones(count, 2), torch.ones(150, 2)
    rows[99, 0], rows[140, 1], rows[30, 0] = torch.inf, torch.inf, -torch.inf
    values, found = top_k(queries, rows, 150, backend=backend)
    assert found[:, :3].tolist() == [[99, 140, 0]] * count
    assert values[:, 1].tolist() == [torch.inf] * count
    assert found[:, -1].tolist() == [30] * count


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
def test_scores_of_minus_infinity_have_rows(backend, level, at_level):
    at_level(level)
    values, found = top_k(torch.ones(1, 1), torch.full((5, 1), -torch.inf), 3, backend=backend)
    assert found.tolist() == [[0, 1, 2]]
    assert values.tolist() == [[-torch.inf] * 3]


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [3, 40])
def test_views_are_read_as_they_are(count, dtype, backend, level, at_level):
    at_level(level)
    queries, rows, scale = whole(2 * count, 120, 44, dtype)
    views = queries[::2, 4:26], rows[10::3, 4:26], scale[10::3]
    transposed = queries[::2, 4:26].T.contiguous().T, rows[10::3, 4:26].T.contiguous().T, scale[10::3]
    expected = score(*(one.contiguous() for one in views), backend=backend)
    top = top_k(*(one.contiguous() for one in views[:2]), 5, views[2].contiguous(), backend=backend)
    for given_ in (views, transposed):
        assert torch.equal(score(*given_, backend=backend), expected)
        found = top_k(given_[0], given_[1], 5, given_[2], backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(found, top, strict=True))


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=native)])
def test_no_query_and_no_row(backend):
    queries, rows, scale = operands(0, 5, 3, torch.int8)
    assert score(queries, rows, scale, backend=backend).shape == (0, 5)
    assert all(len(one) == 0 for one in top_k(queries, rows, 2, scale, backend=backend))
    assert score(torch.ones(2, 3), rows[:0], scale[:0], backend=backend).shape == (2, 0)
    best = Strongest(2, 4, backend=backend)
    best.add(torch.ones(2, 3), rows[:0], scale[:0])
    assert [one.shape for one in best.result()] == [(2, 0), (2, 0)]


@native
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 7, 16])
def test_threads_change_no_bit(count, dtype, monkeypatch):
    monkeypatch.setattr(scoring_native, "_JOB_BYTES", 1 << 10)
    monkeypatch.setattr("source_proj.kernels.native._WORTH_THREADS", 0)
    queries, rows, scale = operands(count, 530, 100, dtype)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(
            (score(queries, rows, scale), *top_k(queries, rows, 11, scale), *bottom_k(queries, rows, 2, scale))
        )
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # Nor do the cuts of a stream.
    best = Strongest(count, 11)
    for start in range(0, 530, 57):
        best.add(queries, rows[start : start + 57], scale[start : start + 57], first=start)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:3], best.result(), strict=True))


@native
def test_few_queries_are_as_many_as_the_compiled_code_takes():
    assert ctypes.c_int.in_dll(native_library(), "sp_score_few").value == scoring_native._FEW
    for dtype in TYPES:
        assert not scoring_native.takes_product(scoring_native._FEW, torch.ones(1, 1).to(dtype))
    assert scoring_native.takes_product(scoring_native._MANY + 1, torch.ones(1, 1))


@native
@pytest.mark.parametrize(
    ("count", "dtype"), [(33, torch.float32), (128, torch.float32), (64, torch.float16), (150, torch.int8)]
)
def test_with_avx512_a_score_does_not_depend_on_the_other_queries(count, dtype, at_level, monkeypatch):
    """Of rows that become float32 in registers; pieces of them, jobs and threads change no bit either."""
    at_level(2)
    queries, rows, scale = operands(count, 530, 100, dtype)
    each = torch.cat([score(one, rows, scale) for one in queries.split(1)])
    best = torch.cat([top_k(one, rows, 7, scale)[1] for one in queries.split(1)])
    monkeypatch.setattr("source_proj.kernels.native._WORTH_THREADS", 0)
    for threads, cached, least in ((1, 1 << 20, 1 << 22), (3, 1 << 10, 1 << 10), (2, 1, 1 << 10)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(scoring_native, "_CACHED_BYTES", cached)
        monkeypatch.setattr(scoring_native, "_JOB_BYTES", least)
        assert torch.equal(score(queries, rows, scale), each)
        assert torch.equal(top_k(queries, rows, 7, scale)[1], best)
    torch.set_num_threads(1)


@native
@pytest.mark.parametrize("dtype", TYPES)
def test_both_routes_of_the_compiled_code_agree(dtype, monkeypatch):
    queries, rows, scale = operands(9, 300, 50, dtype)
    few = scoring_native.StrongestNative(9, 4, True)
    few.add(queries, rows, scale, 0)
    monkeypatch.setattr(scoring_native, "takes_product", lambda *_: True)
    monkeypatch.setattr(scoring_native, "_HEIGHT", (7, 64))
    many = scoring_native.StrongestNative(9, 4, True)
    many.add(queries, rows, scale, 0)
    exact, bound = exact_and_bound(queries, rows, scale)
    for values, found in (few.result(), many.result()):
        at = found.numpy()
        error = np.abs(values.numpy() - np.take_along_axis(exact, at, 1))
        assert (error <= np.take_along_axis(bound, at, 1)).all()
    assert (np.abs(scoring_native.score_native(queries, rows, scale).numpy() - exact) <= bound).all()


def test_refusals():
    queries, rows, scale = operands(2, 5, 3, torch.int8)
    with pytest.raises(ValueError, match=r"must fit, got \(2, 2\) and \(5, 3\)"):
        score(queries[:, :2], rows)
    with pytest.raises(ValueError, match="one entry for each of 5 rows"):
        score(queries, rows, scale[:4])
    with pytest.raises(TypeError, match=r"rows must be packed or one of .* got torch.int32"):
        score(queries, rows.int())
    with pytest.raises(TypeError, match=r"queries must be float32, got torch\.float64"):
        score(queries.double(), rows)
    with pytest.raises(TypeError, match=r"scores must be float32, got torch\.float64"):
        Strongest(2, 1).add_scores(torch.zeros(2, 3, dtype=torch.float64), first=0)
    with pytest.raises(ValueError, match=r"shape \(queries, rows\), got \(3,\)"):
        Strongest(2, 1).add_scores(torch.zeros(3), first=0)
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k must lie in 1\.\.5 .* got {k}"):
            top_k(queries, rows, k, scale)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Strongest(2, 0)
    with pytest.raises(ValueError, match="got 1 queries for a search that was begun with 2"):
        Strongest(2, 1).add(queries[:1], rows, scale)
    with pytest.raises(ValueError, match=r"'native' cannot score on cuda; it needs the CPU .* choose one of"):
        scoring_backend("native", "cuda")
    assert scoring_backend(None, "meta") == "torch"
    assert scoring_backends("meta") == ("torch",)


@pytest.mark.parametrize("block", [1, 50])
def test_the_torch_reference_streams_blocks(block, monkeypatch):
    monkeypatch.setattr(scoring_torch, "_BLOCK", block)
    queries, rows, scale = whole(4, 60, 5, torch.int8)
    values, found = top_k(queries, rows, 8, scale, backend="torch")
    assert_strongest((values, found), exact_and_bound(queries, rows, scale)[0], 8, largest=True)


@interpreted
def test_three_halves_are_a_query():
    halves = importlib.import_module("source_proj.kernels.triton_scoring")._three_halves
    queries = (
        torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-12, 12, 4)[:, None]
    )
    queries[0, :3], queries[1, 0], queries[2] = torch.tensor([0.0, 1e-30, -1.0]), 3e20, 0.0
    parts, unit = halves(queries, torch.int8)
    assert unit is None
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().view(3, 6, 500).sum(0), queries.double())
    parts, unit = halves(queries, torch.float16)
    assert parts.dtype == torch.float16
    assert parts.isfinite().all()
    error = (parts.double().view(3, 6, 500).sum(0) * unit - queries.double()).abs()
    assert (error <= 2.0**-38 * queries.abs().amax(1, keepdim=True)).all()
    for stored in (torch.int8, torch.float16):  # what is not finite stays so, and the rest of its query finite
        parts, _ = halves(torch.tensor([[1.0, torch.inf, torch.nan]]), stored)
        total = parts.float().view(3, 1, 3).sum(0)[0]
        assert total[0] == 1.0
        assert total[1] == torch.inf
        assert total[2].isnan()
