"""Triton's kernels against the plain reference: in the interpreter, or on GPUs where there are some."""

import importlib.util

import numpy as np
import pytest
import torch

from source_proj import kernels
from source_proj.kernels import rademacher, sparse
from source_proj.sketch import Sketch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from source_proj.kernels import triton_outer, triton_rademacher, triton_sparse
from source_proj.kernels.triton_device import interpreted

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FAR = 2**40 + 77
TYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device is here")


@pytest.fixture(autouse=True)
def _can_run():
    if not GPU and not interpreted():
        pytest.skip("triton was imported before TRITON_INTERPRET=1 was set, and there is no CUDA device")


def whole_numbers(*shape, seed=0, most=5):
    """Sums of a few products of these are exact in float32, whatever their order."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def sums(batch, k):
    return torch.zeros(batch, k), torch.zeros(batch, k, device=DEVICE)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("batch", "count", "k", "offset"),
    [
        (3, 300, 64, 0),  # fewer columns than one call of Philox has bits
        (5, 700, 128, FAR),
        (1, 900, 100, 2**31 - 450),  # k no power of two, across 2^31
        (2, 20, 4096, 4090),  # two bits of blocks
        (2, 3000, 384, 1),  # 128 divides k, which is no power of two
        (2, 9500, 9000, FAR),  # too wide for registers
    ],
)
def test_given_rows_to_the_bit(batch, count, k, offset, dtype):
    expected, got = sums(batch, k)
    rows = whole_numbers(batch, count).to(dtype)
    sparse.sparse_add_(expected, rows.float(), offset, seed=2**63 + 5)
    sparse.sparse_add_(got, rows.to(DEVICE), offset, seed=2**63 + 5, backend="triton")
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("k", [96, 9000])
def test_several_copies_and_any_strides(k):
    expected, got = sums(3, k)
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)).T[::2]
    sparse.sparse_add_(expected, rows, FAR, seed=3, nnz=3)
    sparse.sparse_add_(got, rows.to(DEVICE), FAR, seed=3, nnz=3, backend="triton")
    assert (got.cpu() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("parts", [1, 7, 10**6])
def test_cuts_into_parts_change_no_whole_number(parts, monkeypatch):
    monkeypatch.setattr(triton_sparse, "_PROGRAMS", parts)
    monkeypatch.setattr(triton_sparse, "_FEWEST_BLOCKS", 1)
    monkeypatch.setattr(triton_rademacher, "_PROGRAMS", parts)
    monkeypatch.setattr(triton_rademacher, "_FEWEST", 1)
    rows = whole_numbers(2, 500)
    expected, got = sums(2, 64)
    sparse.sparse_add_(expected, rows, 5, seed=1)
    sparse.sparse_add_(got, rows.to(DEVICE), 5, seed=1, backend="triton")
    assert torch.equal(got.cpu(), expected)
    expected, got = sums(2, 64)  # 1/8 is exact
    rademacher.rademacher_add_(expected, rows, 5, seed=1)
    rademacher.rademacher_add_(got, rows.to(DEVICE), 5, seed=1, backend="triton")
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("nnz", [1, 2])
def test_rows_at_their_own_offsets(nnz):
    rows, generator = whole_numbers(40, 70), torch.Generator().manual_seed(0)
    examples = torch.randint(0, 3, (40,), generator=generator)
    examples[examples == 1] = 2  # one example has no row
    offsets = 2**33 + 70 * torch.randint(0, 9, (40,), generator=generator)  # some rows come again
    expected, got = sums(3, 64)
    sparse.sparse_add_at_(expected, rows, examples, offsets, seed=1, nnz=nnz)
    there = [one.to(DEVICE) for one in (rows, examples, offsets)]
    sparse.sparse_add_at_(got, *there, seed=1, nnz=nnz, backend="triton")
    assert (got.cpu() - expected).abs().max() <= (0 if nnz == 1 else 1e-6 * expected.norm())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "steps", "o", "i", "k"),
    [(2, 1, 70, 21, 128), (3, 5, 20, 33, 100), (1, 70, 17, 40, 128), (2, 3, 3, 4, 4096)],  # the last takes the detour
)
def test_outer_products_to_the_bit(batch, steps, o, i, k, dtype, scaled):
    left, right = whole_numbers(batch, steps, o, most=3), whole_numbers(batch, steps, i, seed=1, most=3)
    scale = whole_numbers(o * i, seed=2, most=2) if scaled else None
    expected, got = sums(batch, k)
    sparse.sparse_add_outer_(expected, left, right, FAR, seed=9, scale=scale)
    there = None if scale is None else scale.to(DEVICE)
    pair = [one.to(DEVICE, dtype) for one in (left, right)]
    sparse.sparse_add_outer_(got, *pair, FAR, seed=9, backend="triton", scale=there)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_tasks_of_any_number_of_programs_give_the_same_bits(programs, monkeypatch):
    left, right = (torch.randn(3, 2, n, generator=torch.Generator().manual_seed(n)) for n in (40, 30))
    monkeypatch.setattr(triton_outer, "_TASK", 4)
    out = torch.zeros(2, 3, 64, device=DEVICE)
    sparse.sparse_add_outer_(out[0], left.to(DEVICE), right.to(DEVICE), 3, seed=1, backend="triton")
    monkeypatch.setattr(triton_outer, "_programs", lambda device: programs)
    sparse.sparse_add_outer_(out[1], left.to(DEVICE), right.to(DEVICE), 3, seed=1, backend="triton")
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("scaled", [False, True])
def test_convolutions_to_the_bit(scaled):
    taps = torch.tensor([5 * row + column for row in range(3) for column in range(3)])
    windows = torch.tensor([5 * row + column for row in range(3) for column in range(3)])
    left, right = whole_numbers(2, 17, 9, most=3), whole_numbers(2, 4, 25, seed=1, most=3)
    scale = whole_numbers(17 * 4 * 9, seed=2, most=2) if scaled else None
    expected, got = sums(2, 64)
    sparse.sparse_add_windows_(expected, left, right, taps, windows, 11, seed=3, scale=scale)
    there = [None if one is None else one.to(DEVICE) for one in (left, right, taps, windows, scale)]
    sparse.sparse_add_windows_(got, *there[:4], 11, seed=3, backend="triton", scale=there[4])
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("batch", "count", "k", "offset"), [(3, 200, 64, 0), (20, 90, 256, FAR), (2, 500, 300, 5)])
def test_dense_signs(batch, count, k, offset, dtype):
    rows = whole_numbers(batch, count).to(dtype)
    expected, got = sums(batch, k)
    rademacher.rademacher_add_(expected, rows.float(), offset, seed=4)
    rademacher.rademacher_add_(got, rows.to(DEVICE), offset, seed=4, backend="triton")
    exact = float(np.sqrt(k)).is_integer()  # else the reference rounds its products by k^-0.5 tile by tile
    assert (got.cpu() - expected).norm() <= (0 if exact else 1e-6 * expected.norm())


def test_dense_signs_of_float32_rows_are_as_exact_as_float32():
    rows = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    expected, got = sums(4, 64)
    rademacher.rademacher_add_(expected, rows, 0, seed=4)
    rademacher.rademacher_add_(got, rows.to(DEVICE), 0, seed=4, backend="triton")
    exact = rows.double() @ rademacher.sign_tile(0, 3000, 64, seed=4).double() / 8
    theirs = (expected.double() - exact).norm()
    assert (got.cpu().double() - exact).norm() <= 4 * theirs  # sums of thousands, in other orders


@pytest.mark.parametrize(("start", "stop", "count"), [(0, 70, 5), (FAR, FAR + 130, 300)])
def test_tiles_of_signs(start, stop, count):
    tile = rademacher.sign_tile(start, stop, count, seed=2**50, tag=77, backend="triton", device=DEVICE)
    assert torch.equal(tile.cpu(), rademacher.sign_tile(start, stop, count, seed=2**50, tag=77))


def test_numbers_of_one_example_stay_with_it():
    rows = whole_numbers(3, 200)
    rows[1, 50] = torch.nan
    for add in (sparse.sparse_add_, rademacher.rademacher_add_):
        _, got = sums(3, 64)
        add(got, rows.to(DEVICE), 0, seed=1, backend="triton")
        assert torch.isfinite(got[[0, 2]]).all()
        assert torch.isnan(got[1]).any()


def test_nothing_to_add():
    for shape in [(0, 5), (3, 0)]:
        out = torch.ones(shape[0], 64, device=DEVICE)
        Sketch(64, backend="triton").add_(out, torch.empty(shape, device=DEVICE))
        assert torch.equal(out, torch.ones_like(out))


def test_the_backend_is_honoured_or_refused():
    if not GPU:  # in the interpreter it comes last, and is taken by name alone
        assert kernels.available_backends("sparse")[-1] == "triton"
        assert Sketch(64).chosen_backend != "triton"
        assert Sketch(64, backend="triton").chosen_backend == "triton"
    with pytest.raises(ValueError, match="triton"):
        kernels.choose_backend("identity", "triton")
    with pytest.raises(ValueError, match="triton"):
        kernels.choose_backend("sparse", "triton", "meta")


@pytest.mark.gpu
@needs_gpu
def test_another_stream_and_the_last_device():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    rows = whole_numbers(5, 10_000)
    expected = torch.zeros(5, 4096)
    sparse.sparse_add_(expected, rows, FAR, seed=1)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        got = torch.zeros(5, 4096, device=device)
        sparse.sparse_add_(got, rows.to(device), FAR, seed=1, backend="triton")
        assert torch.equal(got.cpu(), expected)
