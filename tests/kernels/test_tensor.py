"""The tensor map: blocks are permutations, and every route on every backend gives the sketch of the gradient."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from source_proj.kernels import TensorMap, available_backends, sparse_native, tensor, tensor_native
from source_proj.kernels import native as native_module
from source_proj.kernels.native import native_library, run_jobs
from source_proj.kernels.tensor import tensor_add_, tensor_add_at_, tensor_add_outer_, tensor_add_windows_
from source_proj.kernels.tensor_spectral import TorchSpectra

CPU = torch.device("cpu")
BACKENDS = [name for name in available_backends() if name != "triton"]  # smaller cases: test_triton_tensor.py
ROUTES = [("torch", None, False), ("torch", None, True)]
if native_library() is not None:
    ROUTES += [("native", level, spectral) for level in range(3) for spectral in (False, True)]
native = pytest.mark.skipif(native_library() is None, reason="the compiled kernels were not built")
over_routes = pytest.mark.parametrize(("backend", "level", "spectral"), ROUTES)


def dense(matrix):
    """The map's matrix (k, o i) in float64."""
    count = matrix.shape[0] * matrix.shape[1]
    columns, negative = matrix.columns(matrix.offset, matrix.offset + count)
    entries = torch.zeros(matrix.dim, count, dtype=torch.float64)
    entries[torch.from_numpy(columns), torch.arange(count)] = torch.from_numpy(np.where(negative, -1.0, 1.0))
    return entries


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def products(left, right):
    return torch.einsum("bto,bti->boi", left.double(), right.double()).flatten(1)


@given(k=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), offset=st.integers(0, 2**62))
@settings(max_examples=30)
def test_blocks_of_both_sides_are_permutations_of_their_own(k, seed, offset):
    tables = TensorMap(k, seed, offset, (2 * k, k)).tables(CPU)
    left, right = ((table & 0x7FFFFFFF).numpy() for table in tables)
    for block in (left[:k], left[k:], right):
        np.testing.assert_array_equal(np.sort(block), np.arange(k))
    if k > 20:  # k! permutations: two of them are equal once in 10^18 cases
        assert not np.array_equal(left[:k], left[k:])
        assert not np.array_equal(left[:k], right)
    shorter = TensorMap(k, seed, offset, (k + k // 2, max(1, k // 2))).tables(CPU)
    assert torch.equal(shorter[0], tables[0][: k + k // 2])
    assert torch.equal(shorter[1], tables[1][: max(1, k // 2)])


def test_other_parameters_have_other_maps():
    offsets = [0, 1, 2**32, 2**32 + 1, 2**40]
    tables = [TensorMap(64, 5, offset, (64, 64)).tables(CPU) for offset in offsets]
    for n, table in enumerate(tables):
        for other in tables[:n]:
            assert not torch.equal(table[0], other[0])
            assert not torch.equal(table[1], other[1])


def test_any_two_coordinates_that_share_neither_row_nor_column_meet_once_in_k():
    """Also along diagonals, and k/2 apart: where sums of affine permutations would meet far more often, or always."""
    k, trials, pairs = 64, 4000, [((0, 0), (1, 1)), ((0, 0), (32, 32)), ((3, 5), (19, 21)), ((0, 7), (16, 50))]
    meetings = np.zeros(len(pairs))
    for seed in range(trials):
        left, right = ((t & 0x7FFFFFFF).numpy() for t in TensorMap(k, seed, 0, (64, 64)).tables(CPU))
        meetings += [(left[a] + right[b] - left[c] - right[d]) % k == 0 for (a, b), (c, d) in pairs]
    expected = trials / (k - 1)
    assert (np.abs(meetings - expected) <= 5 * expected**0.5).all()


@native
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("o", "i", "k"), [(5, 7, 64), (40, 30, 16), (3, 500, 37), (200, 1, 8)])
def test_same_integers_by_the_compiled_code(o, i, k, level, at_level):
    at_level(level)
    matrix = TensorMap(k, 2**63 + 1, 2**40 + 3, (o, i))
    for start, stop in ((0, o * i), (i // 2, o * i - i // 3)):
        columns, negative = matrix.columns(matrix.offset + start, matrix.offset + stop)
        rows = torch.eye(o * i)[start:stop, start:stop]
        out = torch.zeros(len(rows), k)
        tensor_add_(out, rows, matrix.offset + start, matrix, backend="native")
        expected = torch.zeros(len(rows), k)
        expected[torch.arange(len(rows)), torch.from_numpy(columns)] = torch.from_numpy(
            np.where(negative, np.float32(-1), np.float32(1))
        )
        assert torch.equal(out, expected)


SHAPES = [
    (1, 1, 5, 7, 256),
    (16, 1, 33, 50, 1024),
    (17, 5, 130, 30, 256),  # parts; a group that one example is in
    (2, 40, 9, 600, 256),  # blocks of a side; parts of the steps
    (9, 33, 6, 1050, 512),
    (3, 2, 3, 2, 2048),
    (2, 3, 40, 30, 8192),  # more than the first-level cache holds
    (2, 1, 40, 30, 16384),
]


@over_routes
@pytest.mark.parametrize(("batch", "steps", "o", "i", "k"), SHAPES)
def test_outer_is_the_sketch_of_the_gradient(batch, steps, o, i, k, backend, level, spectral, at_level):
    at_level(level)
    left, right = normal(batch, steps, o), normal(batch, steps, i, seed=1)
    matrix, out = TensorMap(k, 2, 2**31 - 50, (o, i)), torch.ones(batch, k)
    tensor_add_outer_(out, left, right, matrix, backend=backend, spectral=spectral)
    size = products(left.abs(), right.abs()).norm(dim=1)
    assert ((out - 1 - products(left, right) @ dense(matrix).T).norm(dim=1) <= 1e-6 * (size + k**0.5)).all()


@over_routes
@pytest.mark.parametrize(("left_size", "right_size"), [(1e-30, 1.0), (1e8, 1e-12), (1e-4, 1e-30), (0.0, 1.0)])
def test_factors_of_any_size_keep_their_precision(left_size, right_size, backend, level, spectral, at_level):
    """The small one must not drown in the other's rounding, nor one step in another."""
    at_level(level)
    left, right = left_size * normal(16, 4, 12), right_size * normal(16, 4, 20, seed=1)
    left[:, 1], right[:, 2] = 0, torch.eye(20)[3] * right_size
    matrix, out = TensorMap(256, 2, 0, (12, 20)), torch.zeros(16, 256)
    tensor_add_outer_(out, left, right, matrix, backend=backend, spectral=spectral)
    size = products(left.abs(), right.abs()).norm(dim=1)
    assert ((out - products(left, right) @ dense(matrix).T).norm(dim=1) <= 1e-6 * size).all()


@over_routes
def test_an_example_that_is_not_finite_spoils_no_other(backend, level, spectral, at_level):
    at_level(level)
    left, right = normal(18, 3, 12), normal(18, 3, 20)
    left[4, 1, 2], right[7, 0, 3], right[9, 2, 19] = torch.nan, torch.inf, torch.nan
    left[9] = 0  # nothing times what is not a number is not a number
    out = torch.zeros(18, 256)
    tensor_add_outer_(out, left, right, TensorMap(256, 0, 0, (12, 20)), backend=backend, spectral=spectral)
    assert [b for b in range(18) if not out[b].isfinite().all()] == [4, 7, 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_numbers_are_mapped_to_the_bit_with_and_without_a_scale(backend):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-3, 4, (17, 5, n), generator=generator).float() for n in (12, 70))
    scale = torch.randint(0, 4, (12 * 70,), generator=generator).float()
    matrix = TensorMap(48, 1, 2**33, (12, 70))
    for own in (None, scale):
        out = torch.zeros(17, 48)
        tensor_add_outer_(out, left, right, matrix, backend=backend, scale=own, spectral=False)
        times = 1 if own is None else own
        assert torch.equal(out.double(), (products(left, right) * times) @ dense(matrix).T)


@over_routes
@pytest.mark.parametrize(
    ("batch", "o", "c", "taps", "windows", "plane"),
    [(3, 5, 3, 9, 16, 36), (18, 40, 2, 9, 49, 81), (16, 6, 30, 3, 4, 9)],
)
def test_windows_are_an_outer_product_with_patches(
    batch, o, c, taps, windows, plane, backend, level, spectral, at_level
):
    at_level(level)
    left, right = normal(batch, o, windows), normal(batch, c, plane, seed=1)
    tap, window = torch.arange(taps) % (plane // 2), torch.arange(windows) * 5 % (plane - plane // 2)
    patches = right[:, :, tap[:, None] + window].flatten(1, 2).transpose(1, 2)  # (B, L, c J)
    matrix, out = TensorMap(256, 3, 77, (o, c * taps)), torch.zeros(batch, 256)
    tensor_add_windows_(out, left, right, tap, window, matrix, backend=backend, spectral=spectral)
    left = left.transpose(1, 2)
    size = products(left.abs(), patches.abs()).norm(dim=1)
    assert ((out - products(left, patches) @ dense(matrix).T).norm(dim=1) <= 1e-6 * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "o", "c", "taps", "windows"), [(3, 100, 40, 9, 4), (9, 33, 70, 5, 20)])
def test_columns_of_windows_are_scaled_before_the_transforms(batch, o, c, taps, windows, backend):
    left, right, scale = normal(batch, o, windows), normal(batch, c, 30, seed=1), normal(c * taps, seed=2)
    tap, window, matrix = torch.arange(taps) * 2, torch.arange(windows) % 13, TensorMap(256, 2, 77, (o, c * taps))
    patches = right[:, :, tap.unsqueeze(1) + window].flatten(1, 2).transpose(1, 2)
    out = torch.zeros(batch, 256)
    spectra = tensor_native.NativeSpectra(out) if backend == "native" else TorchSpectra(out, backend)
    spectra.add_windows(left, right, tap, window, matrix, scale)
    spectra.finish_()
    gradients = products(left.transpose(1, 2), patches * scale)
    assert ((out - gradients @ dense(matrix).T).norm(dim=1) <= 2e-6 * gradients.norm(dim=1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_table(backend):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (200, 30), generator=generator).float()
    examples, index = (torch.randint(0, n, (200,), generator=generator) for n in (5, 40))
    matrix, out = TensorMap(64, 1, 2**33, (40, 30)), torch.zeros(5, 64)
    tensor_add_at_(out, values, examples, index, matrix, backend=backend)
    table = torch.zeros(5, 40, 30, dtype=torch.float64)
    table.index_put_((examples, index), values.double(), accumulate=True)
    assert torch.equal(out.double(), table.flatten(1) @ dense(matrix).T)


def test_reference_of_devices_without_order_adds_the_same():
    rows, matrix = normal(3, 900), TensorMap(16, 0, 5, (20, 50))
    ordered, unordered = torch.zeros(3, 16), torch.zeros(3, 16)
    tensor._add_reference_(ordered, rows, 25, matrix, ordered=True)
    tensor._add_reference_(unordered, rows, 25, matrix, ordered=False)
    assert (ordered - unordered).norm() <= 1e-6 * ordered.norm()


def test_pieces_of_steps_sum_to_the_whole_on_both_routes():
    left, right, matrix = normal(4, 30, 12), normal(4, 30, 20, seed=1), TensorMap(32, 1, 3, (12, 20))
    whole, parts = torch.zeros(4, 32), torch.zeros(4, 32)
    tensor_add_outer_(whole, left, right, matrix, spectral=False)
    for spectral, some in ((True, slice(0, 11)), (False, slice(11, 12)), (True, slice(12, 30))):
        tensor_add_outer_(parts, left[:, some], right[:, some], matrix, spectral=spectral)
    assert (parts - whole).norm() <= 1e-6 * products(left.abs(), right.abs()).norm()


@native
@pytest.mark.parametrize("spectral", [False, True])
def test_threads_and_memory_change_no_sum(spectral, monkeypatch):
    left, right, matrix = normal(33, 50, 40), normal(33, 50, 30, seed=1), TensorMap(256, 1, 0, (40, 30))

    def sums():
        out = torch.zeros(33, 256)
        tensor_add_outer_(out, left, right, matrix, backend="native", spectral=spectral)
        return out

    usual, threads = sums(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sums(), usual)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(sparse_native, "_BUFFERS", 1)
    assert torch.equal(sums(), usual)
    monkeypatch.setattr(tensor_native, "_PART_STEPS", 1)
    assert (sums() - usual).norm() <= 1e-6 * usual.norm()


@native
def test_tables_of_a_transform_outlive_all_threads_that_use_them(monkeypatch):
    """Asked for in each thread, the loser's of a race for the cache was freed before the kernel had read it."""
    tables, seen, made = [], [], tensor_native._twiddles.__wrapped__

    def uncached(*shape):
        table = made(*shape)
        tables.append(weakref.ref(table))
        return table

    def watched(jobs, nanoseconds):
        seen.append([table() is not None for table in tables])
        run_jobs(jobs, nanoseconds)
        assert len(tables) == len(seen[-1])

    monkeypatch.setattr(tensor_native, "_twiddles", uncached)
    for module in (tensor_native, native_module):  # the way there, and the way back
        monkeypatch.setattr(module, "run_jobs", watched)
    left, right, matrix = normal(20, 8, 40), normal(20, 8, 30), TensorMap(256, 1, 0, (40, 30))
    tensor_add_outer_(torch.zeros(20, 256), left, right, matrix, backend="native", spectral=True)
    windows = torch.arange(8)
    args = left.transpose(1, 2), right.transpose(1, 2), torch.zeros(1, dtype=torch.int64), windows
    tensor_add_windows_(torch.zeros(20, 256), *args, matrix, backend="native", spectral=True)
    assert len(seen) == 4  # a way there and a way back of each
    assert all(alive and alive[-1] for alive in seen)


@native
def test_the_route_is_the_cheaper_one_and_needs_a_transform():
    cheaper = tensor_native.spectral_is_cheaper
    assert cheaper(16, 64, 1024, 1024, 4096)
    assert not cheaper(16, 64, 32, 32, 4096)
    assert not cheaper(16, 64, 1024, 1024, 4095)
    assert not cheaper(16, 64, 1024, 1024, 128)
    assert not cheaper(16, 64, 1024, 1024, 2**20)


@native
@pytest.mark.parametrize("dim", [1, 5, 8, 128, 255, 257, 2**17])
def test_a_route_that_has_no_transform_is_refused(dim):
    left, right, out = normal(2, 1, 3), normal(2, 1, 5), torch.zeros(2, dim)
    with pytest.raises(ValueError, match=f"a power of two from 256 to 65536 numbers, got {dim}"):
        tensor_add_outer_(out, left, right, TensorMap(dim, 0, 0, (3, 5)), backend="native", spectral=True)
    assert not out.any()
