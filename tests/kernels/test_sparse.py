"""The sparse map: its definition word by word, the same integers on every backend, every route to the same sums."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from source_proj.kernels import available_backends, philox4x32, sparse, sparse_add_, sparse_map, sparse_native
from source_proj.kernels.native import native_library
from source_proj.kernels.sparse import sparse_add_at_, sparse_add_outer_

BACKENDS = [name for name in available_backends() if name != "triton"]  # smaller cases: test_triton.py

native = pytest.mark.skipif(native_library() is None, reason="the compiled kernels were not built")

ROUTES = (
    [("torch", None)] if native_library() is None else [("torch", None), *(("native", level) for level in range(3))]
)

RANGES = [  # start, count, k
    (0, 10, 5),
    (3, 1000, 7),
    (17, 3000, 96),
    (5, 700, 1),
    (11, 400, 2),
    (2**31 - 40, 500, 96),
    (2**40 + 77, 9000, 4096),
    (2**62, 513, 12345),
    (5, 300, 2**31 - 1),
    (2**31 - 100, 300, 2**31 - 1),
]


def map_by_hand(i, k, seed, copy):
    """The contract of the matrix, one coordinate in Python integers."""

    def words(x, x2, tag):
        return [int(w) for w in philox4x32(x % 2**32, x // 2**32, x2, tag, seed=seed)]

    negative = words(i // 128, copy, 0x5349474E)[i % 128 // 32] >> (i % 32) & 1
    attempt = 0
    while True:
        w = words(i // k, copy | attempt << 16, 0x5045524D)
        a = (w[0] | w[1] << 32) % k
        if math.gcd(a, k) == 1:
            return (a * (i % k) + (w[2] | w[3] << 32) % k) % k, bool(negative)
        attempt += 1


@pytest.mark.parametrize(("start", "count", "k"), RANGES)
def test_reference_is_the_definition(start, count, k):
    columns, negative = sparse_map(start, start + count, dim=k, seed=2**63 + 5, copy=3)
    for p in {0, 1, count // 3, count // 2, count - 1}:
        assert (columns[p], negative[p]) == map_by_hand(start + p, k, 2**63 + 5, 3)


@native
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("start", "count", "k"), RANGES)
def test_same_integers_on_every_backend(start, count, k, level, at_level):
    at_level(level)
    for copy in (0, 3):
        expected = sparse_map(start, start + count, dim=k, seed=2**63 + 5, copy=copy)
        got = sparse_native.sparse_map_native(start, start + count, dim=k, seed=2**63 + 5, copy=copy)
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_array_equal(a, b)


@given(start=st.integers(0, 2**62), k=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60)
def test_a_block_is_a_permutation(start, k, seed):
    start -= start % k
    columns, _ = sparse_map(start, start + k, dim=k, seed=seed)
    np.testing.assert_array_equal(np.sort(columns), np.arange(k))
    short, _ = sparse_map(start, start + k // 2, dim=k, seed=seed)
    np.testing.assert_array_equal(short, columns[: k // 2])


def dense(k, start, count, seed, nnz):
    """The matrix by its map, in float64."""
    matrix = np.zeros((k, count))
    for copy in range(nnz):
        columns, negative = sparse_map(start, start + count, dim=k, seed=seed, copy=copy)
        np.add.at(matrix, (columns, np.arange(count)), np.where(negative, -1, 1) / np.sqrt(nnz))
    return matrix


def close(got, expected, scale):
    """Equal to rounding: sums of few terms in float32, beside the sum of the terms' absolute values."""
    return np.abs(got.double().numpy() - expected).max() <= 1e-6 * scale


@pytest.mark.parametrize(("backend", "level"), ROUTES)
@pytest.mark.parametrize("nnz", [1, 3])
@pytest.mark.parametrize(
    ("batch", "count", "k", "offset"),
    [
        (1, 1000, 64, 0),
        (3, 50, 64, 2**31 - 20),  # fewer coordinates than columns
        (7, 333, 1, 5),
        (16, 2000, 96, 2**40 + 13),  # one group of lanes, in parts
        (21, 5000, 37, 1),  # a group of lanes, and a rest in rows
        (29, 700, 512, 100),  # a second group with empty lanes
        (150, 400, 50, 3),
    ],
)
def test_add_is_the_dense_product(batch, count, k, offset, nnz, backend, level, at_level):
    at_level(level)
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(batch, count, generator=generator)
    before = torch.randn(batch, k, generator=generator)
    out = before.clone()
    sparse_add_(out, rows, offset, seed=9, nnz=nnz, backend=backend)
    matrix = dense(k, offset, count, 9, nnz)
    expected = before.double().numpy() + rows.double().numpy() @ matrix.T
    scale = (before.abs().double().numpy() + rows.abs().double().numpy() @ np.abs(matrix).T).max()
    assert close(out, expected, scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "steps", "o", "i", "k", "nnz"),
    [
        (1, 1, 5, 7, 16, 1),
        (16, 1, 33, 50, 96, 1),
        (17, 5, 130, 30, 64, 1),  # parts; a rest through tiles
        (20, 40, 9, 270, 128, 1),  # steps in two chunks; two groups
        (9, 33, 6, 1050, 128, 1),  # several chunks of columns
        (4, 2, 300, 3, 37, 1),
        (8, 3, 3000, 2, 64, 1),
        (33, 2, 3, 2, 64, 1),  # fewer coordinates than columns
        (16, 2, 1, 5000, 64, 1),
        (16, 3, 40, 30, 96, 3),
        (16, 2, 130, 70, 64, 20),  # tables of several copies
        (16, 2, 20, 30, 64, 70),  # more copies than the interleaved kernel takes
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_outer_is_the_sketch_of_the_gradient(batch, steps, o, i, k, nnz, backend, scaled):
    generator = torch.Generator().manual_seed(o)
    left = torch.randn(batch, steps, o, generator=generator)
    right = torch.randn(batch, steps, i, generator=generator)
    out = torch.ones(batch, k)
    scale = torch.rand(o * i, generator=generator) if scaled else None
    times = np.ones(1) if scale is None else scale.double().numpy()
    sparse_add_outer_(out, left, right, 2**31 - 50, seed=2, nnz=nnz, backend=backend, scale=scale)
    gradient = np.einsum("bto,bti->boi", left.double(), right.double()).reshape(batch, -1) * times
    sizes = np.einsum("bto,bti->boi", left.double().abs(), right.double().abs()).reshape(batch, -1) * times
    matrix = dense(k, 2**31 - 50, o * i, 2, nnz)
    assert close(out, 1 + gradient @ matrix.T, (1 + sizes @ np.abs(matrix).T).max())


def test_reference_of_devices_without_order_adds_the_same():
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    ordered, unordered = torch.zeros(3, 96), torch.zeros(3, 96)
    sparse._add_reference_(ordered, rows, 50, 4, 2, ordered=True)
    sparse._add_reference_(unordered, rows, 50, 4, 2, ordered=False)
    assert (ordered - unordered).norm() <= 1e-6 * ordered.norm()


@native
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_outer_on_every_instruction_set(level, at_level, scaled):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(16, 37, 11, generator=generator), torch.randn(16, 37, 130, generator=generator)
    expected, got = torch.zeros(16, 64), torch.zeros(16, 64)
    scale = torch.rand(11 * 130, generator=generator) if scaled else None
    sparse_add_outer_(expected, left, right, 7, seed=2, backend="torch", scale=scale)
    at_level(level)
    sparse_add_outer_(got, left, right, 7, seed=2, backend="native", scale=scale)
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nnz", [1, 2])
def test_rows_at_their_own_offsets(backend, nnz):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 30, generator=generator)
    examples = torch.randint(0, 5, (200,), generator=generator)
    offsets = 2**33 + 30 * torch.randint(0, 40, (200,), generator=generator)
    out = torch.zeros(5, 64)
    sparse_add_at_(out, rows, examples, offsets, seed=1, nnz=nnz, backend=backend)
    whole = torch.zeros(5, 30 * 40)
    for row, example, offset in zip(rows, examples.tolist(), (offsets - 2**33).tolist(), strict=True):
        whole[example, offset : offset + 30] += row
    expected = whole.double().numpy() @ dense(64, 2**33, 1200, 1, nnz).T
    assert close(out, expected, 50.0)


@native
@pytest.mark.parametrize(("name", "value"), [("_LANES_DIM", 32), ("_BUFFERS", 1), ("_PART", 1), ("_TILE", 40)])
def test_other_routes_to_the_same_sums(name, value, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(37, 3, 200, generator=generator), torch.randn(37, 3, 21, generator=generator)
    rows = torch.randn(37, 4200, generator=generator)

    def sums():
        out = torch.zeros(37, 64)
        sparse_add_outer_(out, left, right, 7, seed=2, backend="native")
        sparse_add_(out, rows, 2**35, seed=2, backend="native")
        return out

    usual = sums()
    monkeypatch.setattr(sparse_native, name, value)
    assert (sums() - usual).norm() <= 1e-6 * usual.norm()
