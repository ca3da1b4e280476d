"""The Triton kernels alone, in the interpreter or on a GPU: every route gives the integers of the plain reference."""

import importlib

import pytest
import torch

from source_proj import kernels
from source_proj.kernels import available_backends

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TYPES = (torch.float32, torch.float16, torch.bfloat16)

pytest.importorskip("triton")
triton_outer = importlib.import_module("source_proj.kernels.triton_outer")
triton_rademacher = importlib.import_module("source_proj.kernels.triton_rademacher")
triton_sparse = importlib.import_module("source_proj.kernels.triton_sparse")


def whole(*shape, dtype=torch.float32, seed=0):
    """Integers that every type holds and whose sums float32 holds: any order of summation gives the same bits."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(add, *operands, dim, batch, **options):
    """Whether triton adds what torch adds, bit for bit, to the same numbers."""
    before = whole(batch, dim, seed=9)
    expected, got = before.clone(), before.to(DEVICE)
    add(expected, *[x.float() if x.is_floating_point() else x for x in operands], backend="torch", **options)
    add(got, *[x.to(DEVICE) for x in operands], backend="triton", **options)
    return torch.equal(got.cpu(), expected)


# Halves of a seed that are 0 or 1 are what triton makes constants of.
SEEDS = [0, 1, 2**32, 2**32 + 1, 2**31, 2**64 - 1]


@pytest.mark.skipif(GPU, reason="on a GPU it is the default")
def test_is_there_where_the_interpreter_is_on():
    assert "triton" in available_backends()
    assert kernels.choose_backend("triton") == "triton"
    assert kernels.choose_backend(None) != "triton"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 2**32 - 3, 2**62])
def test_signs_are_those_of_the_reference(seed, start):
    got = kernels.sign_tile(start, start + 5, 140, seed=seed, backend="triton", device=DEVICE)
    assert torch.equal(got.cpu(), kernels.sign_tile(start, start + 5, 140, seed=seed))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("batch", "count", "dim", "offset", "nnz"),
    [
        (1, 1, 1, 1, 1),
        (3, 300, 128, 0, 1),
        (2, 250, 100, 2**31 - 50, 4),  # blocks that start anywhere in a group of signs
        (5, 400, 37, 2**40 + 5, 1),  # several ranges of blocks
        (2, 40, 9000, 2**62 + 17, 1),  # too wide for registers, and less than a block
    ],
)
def test_given_rows(batch, count, dim, offset, nnz, dtype):
    rows = whole(batch, count, dtype=dtype)
    for seed in SEEDS[:2] if offset else SEEDS:
        options = {"dim": dim, "batch": batch, "offset": offset, "seed": seed, "nnz": nnz}
        assert same(kernels.sparse_add_, rows, **options)
    assert same(kernels.sparse_add_, rows.T.contiguous().T, **options)


def test_ranges_of_blocks_change_no_integer(monkeypatch):
    monkeypatch.setattr(triton_sparse, "_FEWEST_BLOCKS", 1)
    assert same(kernels.sparse_add_, whole(2, 1000), dim=100, batch=2, offset=77, seed=3)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("nnz", [1, 4])
def test_rows_at_their_own_offsets(dtype, nnz, monkeypatch):
    monkeypatch.setattr(triton_sparse, "_ROWS_AT_ONCE", 2)  # several programs for an example
    index = torch.arange(11)
    given = (whole(11, 30, dtype=dtype), index * index % 3, 2**33 + 30 * (index * 7 % 5))
    assert same(kernels.sparse_add_at_, *given, dim=64, batch=4, seed=1, nnz=nnz)


LAYERS = [  # batch, steps, o, i, k
    (1, 1, 8, 8, 16),  # a single step is multiplied by the kernel
    (3, 1, 40, 9, 60),
    (2, 1, 3, 40, 9000),  # too wide for that
    (2, 17, 40, 9, 60),
    (3, 3, 5, 130, 128),
    (2, 4, 3, 4, 4096),  # less than a block
]
TILES = [(50, 1), (500, 256), (1 << 26, 256)]  # 50: less than a row of some


@pytest.mark.parametrize(
    ("layer", "tile", "rows", "dtype"),  # the interpreter takes its time: every layer in all tiles and in all types
    [(layer, *tile, TYPES[(m + n) % 3]) for m, layer in enumerate(LAYERS) for n, tile in enumerate(TILES)],
)
def test_layers(layer, tile, rows, dtype, monkeypatch):
    batch, steps, o, i, dim = layer
    monkeypatch.setattr(triton_outer, "_FEWEST", tile)
    monkeypatch.setattr(triton_outer, "_MOST", tile)
    monkeypatch.setattr(triton_outer, "_LEAST_ROWS", rows)
    left, right = whole(batch, steps, o, dtype=dtype), whole(batch, steps, i, dtype=dtype, seed=1)
    assert same(kernels.sparse_add_outer_, left, right, dim=dim, batch=batch, offset=2**31 - 9, seed=1)
    turned = left.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(kernels.sparse_add_outer_, turned, right, dim=dim, batch=batch, offset=2**31 - 9, seed=1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [1, 1 << 26])
def test_convolutions(dtype, columns, monkeypatch):
    monkeypatch.setattr(triton_outer, "_COLUMNS", columns)
    left, right = whole(2, 6, 10, dtype=dtype), whole(2, 3, 40, dtype=dtype, seed=1)
    right = right.transpose(0, 2).contiguous().transpose(0, 2)
    taps, windows = torch.tensor([0, 7, 3, 12]), torch.arange(10) * 2
    given = (left, right, taps, windows)
    assert same(kernels.sparse_add_windows_, *given, dim=16, batch=2, offset=2**33 + 1, seed=1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [1, 17, 65, 257])  # tiles of 16 and 64 examples; in half precision 128, 256
def test_dense_signs(batch, dtype, monkeypatch):
    """With k a power of four the factor 1/sqrt(k) is exact."""
    monkeypatch.setattr(triton_rademacher, "_FEWEST", 1)  # several ranges of coordinates
    rows = whole(batch, 70, dtype=dtype)
    for dim in (64, 256) if batch == 1 else (64,):
        assert same(kernels.rademacher_add_, rows, dim=dim, batch=batch, offset=2**40 + 3, seed=1)


def test_float32_keeps_its_precision():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 200, generator=generator)
    signs = kernels.sign_tile(0, 200, 64, seed=1).double()
    out = torch.zeros(3, 64, device=DEVICE)
    kernels.rademacher_add_(out, rows.to(DEVICE), 0, seed=1, backend="triton")
    # A sum of n terms in any order: n roundings of at most half a unit of the terms' size, and one of 1/sqrt(k).
    bound = 201 * torch.finfo(torch.float32).eps / 2 * rows.abs().double().sum(1, keepdim=True) / 8
    assert ((out.cpu().double() - rows.double() @ signs / 8).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")
def test_another_stream_and_another_time_give_the_same_bits():
    rows = torch.randn(7, 50_000, generator=torch.Generator().manual_seed(0)).cuda()
    sums = [torch.zeros(7, 4096, device="cuda") for _ in range(2)]
    kernels.sparse_add_(sums[0], rows, 5, seed=1, backend="triton")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernels.sparse_add_(sums[1], rows, 5, seed=1, backend="triton")
    stream.synchronize()
    assert torch.equal(*sums)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_gives_the_same_bits():
    rows = torch.randn(7, 50_000, generator=torch.Generator().manual_seed(0))
    sums = []
    for device in ("cuda:0", "cuda:1"):
        sums.append(torch.zeros(7, 4096, device=device))
        kernels.sparse_add_(sums[-1], rows.to(device), 5, seed=1, backend="triton")
    assert torch.equal(*[total.cpu() for total in sums])


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("o", "i", "dim"), [(70, 21, 128), (3, 4, 4096), (3, 40, 9000)])
def test_layers_in_a_metric(steps, o, i, dim):
    left, right, scale = whole(2, steps, o), whole(2, steps, i, seed=1), whole(o * i, seed=2)
    add = kernels.sparse_add_outer_
    before = whole(2, dim, seed=9)
    expected, got = before.clone(), before.to(DEVICE)
    add(expected, left, right, 2**40 + 7, seed=3, scale=scale)
    add(got, left.to(DEVICE), right.to(DEVICE), 2**40 + 7, seed=3, scale=scale.to(DEVICE), backend="triton")
    assert torch.equal(got.cpu(), expected)


def test_convolutions_in_a_metric():
    taps = torch.tensor([5 * row + column for row in range(3) for column in range(3)])
    left, right, scale = whole(2, 17, 9), whole(2, 4, 25, seed=1), whole(17 * 4 * 9, seed=2)
    expected, got = torch.zeros(2, 64), torch.zeros(2, 64, device=DEVICE)
    kernels.sparse_add_windows_(expected, left, right, taps, taps, 11, seed=3, scale=scale)
    there = [one.to(DEVICE) for one in (left, right, taps, taps)]
    kernels.sparse_add_windows_(got, *there, 11, seed=3, scale=scale.to(DEVICE), backend="triton")
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_what_is_not_finite_stays_with_its_example(kind):
    rows = whole(3, 200)
    rows[1, 50] = torch.nan
    got = torch.zeros(3, 64, device=DEVICE)
    getattr(kernels, f"{kind}_add_")(got, rows.to(DEVICE), 0, seed=1, backend="triton")
    assert torch.isfinite(got[[0, 2]]).all()
    assert torch.isnan(got[1]).any()
