"""Scores and the strongest of packed codes, on every backend, against a naive decoding in numpy."""

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
    native,
    score,
    spans,
    top_k,
)

from source_proj.kernels import codes as codes_module
from source_proj.kernels import scoring_native, scoring_torch
from source_proj.kernels.codes import PackedRows

LEVELS = {  # neither symmetric nor equidistant
    1: (-0.75, 1.25),
    2: (-1.5, -0.45, 0.5, 1.625),
    4: tuple(np.float32(i - 7.3 + 0.04 * i**2).item() for i in range(16)),
}
WHOLE = {1: (-1.0, 1.0), 2: (-2.0, -1.0, 1.0, 2.0), 4: tuple(float(i - 8) for i in range(16))}
SHAPES = [
    (1, 1, 1),
    (1, 33, 7),
    (3, 70, 31),
    (2, 9, 130),
    (4, 34, 517),
    (7, 66, 16),
    (16, 5, 40),
    (17, 8, 9),
    (40, 67, 33),
]

every_backend = pytest.mark.parametrize(("backend", "level"), BACKENDS)
every_size = pytest.mark.parametrize("bits", LEVELS)


def packed(n, k, levels, *, seed=0):
    """Codes of random bytes, zeros beyond the last number as the format has them."""
    generator = torch.Generator().manual_seed(seed)
    bits = len(levels).bit_length() - 1
    codes = torch.randint(0, 256, (n, -(-k * bits // 8)), generator=generator, dtype=torch.uint8)
    if k * bits % 8:
        codes[:, -1] &= (1 << k * bits % 8) - 1
    return PackedRows(codes, k, levels)


def decoded(rows):
    """The numbers (n, k) float64, bit by bit."""
    bits = np.unpackbits(rows.codes.numpy(), axis=1, bitorder="little").reshape(
        len(rows), 8 * rows.codes.shape[1] // rows.bits, rows.bits
    )
    return np.array(rows.levels)[(bits << np.arange(rows.bits)).sum(2)][:, : rows.k]


def operands(count, n, k, levels, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries, scale = torch.randn(count, k, generator=generator), torch.rand(n, generator=generator)
    return queries, packed(n, k, levels, seed=seed), scale


def whole(count, n, k, bits, *, seed=0):
    """Operands whose products are small integers, so that any order of summation is exact and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (count, k), generator=generator).float()
    scale = 2.0 ** torch.randint(-1, 2, (n,), generator=generator)
    return queries, packed(n, k, WHOLE[bits], seed=seed), scale


@every_backend
@every_size
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("count", "n", "k"), SHAPES)
def test_scores_are_those_of_the_decoded_rows(count, n, k, scaled, bits, backend, level, at_level):
    at_level(level)
    queries, rows, scale = operands(count, n, k, LEVELS[bits])
    scale = scale if scaled else None
    exact, bound = exact_and_bound(queries, decoded(rows), scale)
    found = score(queries, rows, scale, backend=backend)
    assert found.shape == (count, n)
    assert found.dtype == torch.float32
    assert (np.abs(found.numpy() - exact) <= bound).all()


@every_backend
@every_size
@pytest.mark.parametrize("verb", [top_k, bottom_k])
@pytest.mark.parametrize(("count", "n", "kept"), [(1, 1, 1), (2, 200, 3), (12, 33, 33), (40, 150, 9), (3, 100, 70)])
def test_ties_go_to_the_lower_row(count, n, kept, verb, bits, backend, level, at_level):
    at_level(level)
    queries, rows, scale = whole(count, n, 5, bits)
    exact, _ = exact_and_bound(queries, decoded(rows), scale)
    values, found = verb(queries, rows, kept, scale, backend=backend)
    assert_strongest((values, found), exact, kept, largest=verb is top_k)


@settings(max_examples=40)
@given(
    count=st.integers(0, 36),
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    k=st.integers(1, 150),
    kept=st.integers(1, 100),
    bits=st.sampled_from(sorted(WHOLE)),
    largest=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=native)])
def test_streamed_blocks_in_any_order_equal_one_sort(backend, count, sizes, k, kept, bits, largest, seed):
    queries, rows, scale = whole(count, sum(sizes), k, bits, seed=seed)
    best = Strongest(count, kept, largest=largest, backend=backend)
    parts = spans(sizes)
    for index in np.random.default_rng(seed).permutation(len(parts)):
        part = parts[index]
        best.add(queries, rows[part], scale[part], first=part.start)
    values, found = best.result()
    exact, _ = exact_and_bound(queries, decoded(rows), scale)
    there = min(kept, sum(sizes)) if count else found.shape[1]
    assert_strongest((values, found), exact, there, largest=largest)


@every_backend
@every_size
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # triton's interpreter is numpy
@pytest.mark.parametrize("count", [1, 40])
def test_queries_that_are_not_finite(count, bits, backend, level, at_level):
    """An infinity gives every score its sign times the number's; NaN is a NaN of every row, and no rank."""
    at_level(level)
    _, rows, scale = operands(count, 70, 19, LEVELS[bits])
    queries, signs = torch.ones(count, 19), np.sign(decoded(rows)[:, 18])
    queries[:, 18] = torch.inf
    found = score(queries, rows, scale, backend=backend)
    np.testing.assert_array_equal(found, np.broadcast_to(signs * np.inf, (count, 70)))
    values, where = top_k(queries, rows, 70, scale, backend=backend)
    order = np.argsort(-signs, kind="stable")
    np.testing.assert_array_equal(where, np.broadcast_to(order, (count, 70)))
    assert torch.equal(values, found.gather(1, where))
    queries[-1, 2] = torch.nan
    assert score(queries, rows, scale, backend=backend)[-1].isnan().all()
    with pytest.raises(ValueError, match="score of row 0 is NaN"):
        top_k(queries, rows, 3, scale, backend=backend)


@every_backend
@every_size
@pytest.mark.parametrize("count", [3, 40])
def test_views_are_read_as_they_are(count, bits, backend, level, at_level):
    at_level(level)
    wide, rows, scale = operands(2 * count, 120, 44, LEVELS[bits])
    every_third = PackedRows(rows.codes[10::3].clone(), rows.k, rows.levels)
    expected = score(wide[::2].contiguous(), every_third, scale[10::3].contiguous(), backend=backend)
    transposed = PackedRows(rows.codes.T.contiguous().T, rows.k, rows.levels)
    for given_ in (rows[10::3], transposed[10::3]):
        assert torch.equal(score(wide[::2], given_, scale[10::3], backend=backend), expected)


@native
@every_size
@pytest.mark.parametrize("count", [1, 5])
def test_neither_processors_nor_threads_change_a_bit(count, bits, at_level, monkeypatch):
    monkeypatch.setattr(scoring_native, "_JOB_BYTES", 1 << 10)
    monkeypatch.setattr("source_proj.kernels.native._WORTH_THREADS", 0)
    queries, rows, scale = operands(count, 330, 1030, LEVELS[bits])
    at_level(0)
    expected = score(queries, rows, scale, backend="native"), *top_k(queries, rows, 11, scale, backend="native")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        found = score(queries, rows, scale, backend="native"), *top_k(queries, rows, 11, scale, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    torch.set_num_threads(1)
    cut = torch.cat([score(queries, rows[part], scale[part]) for part in (slice(0, 7), slice(7, 330))], dim=1)
    assert torch.equal(cut, expected[0])
    for level in (1, 2):  # the last, for a processor that lacks it leaves the test
        at_level(level)
        assert torch.equal(score(queries, rows, scale, backend="native"), expected[0])


@native
@every_size
def test_both_routes_of_the_compiled_code_agree(bits, monkeypatch):
    queries, rows, scale = operands(9, 300, 50, LEVELS[bits])
    exact, bound = exact_and_bound(queries, decoded(rows), scale)
    for takes_product, looked_up in ((False, 9), (False, 4), (False, 0), (True, 0)):
        monkeypatch.setattr(scoring_native, "takes_product", lambda *_, chosen=takes_product: chosen)
        monkeypatch.setattr(scoring_native, "looked_up", lambda *_, chosen=looked_up: chosen)
        monkeypatch.setattr(scoring_native, "_HEIGHT", (7, 64))
        best = scoring_native.StrongestNative(9, 4, True)
        best.add(queries, rows, scale, 0)
        values, at = (part.numpy() for part in best.result())
        error = np.abs(values - np.take_along_axis(exact, at, 1))
        assert (error <= np.take_along_axis(bound, at, 1)).all()
        assert (np.abs(scoring_native.score_native(queries, rows, scale).numpy() - exact) <= bound).all()


@native
@pytest.mark.parametrize(("level", "always"), [(0, set()), (1, {1}), (2, {1, 2})])
def test_how_many_queries_are_looked_up(level, always, at_level):
    """As many as pay, but tables of several queries must fit the cache; any number, in groups, where that pays."""
    at_level(level)
    narrow, wide = ({bits: packed(1, k, WHOLE[bits]) for bits in WHOLE} for k in (8, 1 << 18))
    for bits, most in scoring_native._FEW_OF_CODES.items():
        looked_up = [scoring_native.looked_up(count, narrow[bits]) for count in (1, most, most + 1)]
        assert looked_up == [most, most, most if bits in always else 0]
        assert [scoring_native.looked_up(count, wide[bits]) for count in (1, most)] == [1, 0]


@native
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("count", [33, 70])
def test_a_score_of_codes_that_are_looked_up_does_not_depend_on_the_other_queries(count, bits, at_level):
    at_level(2)
    queries, rows, scale = operands(count, 330, 1030, LEVELS[bits])
    each = torch.cat([score(one, rows, scale) for one in queries.split(1)])
    assert torch.equal(score(queries, rows, scale), each)
    values, found = top_k(queries, rows, 7, scale)
    assert torch.equal(values, each.gather(1, found))
    for one in (33, 70):
        most = top_k(queries[:one], rows, 5, scale)
        assert torch.equal(most[1], found[:one, :5])


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=native)])
@every_size
def test_rows_are_unpacked_by_blocks(bits, backend, monkeypatch, at_level):
    """Where codes are not looked up, the float32 rows of a shard are never there at once."""
    at_level(0)
    heights, plain = [], codes_module.unpack_rows
    monkeypatch.setattr(
        codes_module,
        "unpack_rows",
        lambda codes, *rest, **how: heights.append(len(codes)) or plain(codes, *rest, **how),
    )
    monkeypatch.setattr(scoring_torch, "_BLOCK", 64 * 24)
    monkeypatch.setattr(scoring_native, "_HEIGHT", (1, 64))
    queries, rows, scale = operands(40, 1000, 24, LEVELS[bits])
    score(queries, rows, scale, backend=backend)
    top_k(queries, rows, 3, scale, backend=backend)
    assert sum(heights) == 2 * len(rows)
    assert max(heights) <= 64


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=native)])
def test_no_query_and_no_row(backend):
    queries, rows, scale = operands(2, 5, 3, LEVELS[2])
    assert score(queries[:0], rows, scale, backend=backend).shape == (0, 5)
    assert score(queries, rows[:0], scale[:0], backend=backend).shape == (2, 0)
    best = Strongest(2, 4, backend=backend)
    best.add(queries, rows[:0], scale[:0])
    assert [part.shape for part in best.result()] == [(2, 0), (2, 0)]


def test_refusals():
    queries, rows, scale = operands(2, 5, 3, LEVELS[2])
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(n, 1\), got torch.uint8 of shape \(5, 2\)"):
        PackedRows(torch.zeros(5, 2, dtype=torch.uint8), 3, LEVELS[2])
    with pytest.raises(ValueError, match=r"must be uint8 .* got torch.int8"):
        PackedRows(rows.codes.to(torch.int8), 3, LEVELS[2])
    with pytest.raises(ValueError, match=r"levels must be 2, 4 or 16 .* got 3"):
        PackedRows(rows.codes, 3, LEVELS[2][:3])
    with pytest.raises(ValueError, match=r"must fit, got \(2, 2\) and \(5, 3\)"):
        score(queries[:, :2], rows, scale)
    with pytest.raises(ValueError, match="one entry for each of 5 rows"):
        score(queries, rows, scale[:4])
