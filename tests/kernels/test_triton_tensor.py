"""The tensor map's Triton kernels alone, in the interpreter or on a GPU: the integers of the plain reference."""

import importlib

import pytest
import torch

from source_proj.kernels import TensorMap, tensor_add_, tensor_add_at_, tensor_add_outer_, tensor_add_windows_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = (torch.float32, torch.float16, torch.bfloat16)

pytest.importorskip("triton")
triton_tensor = importlib.import_module("source_proj.kernels.triton_tensor")

SHAPES = [  # batch, steps, o, i, k
    (3, 5, 12, 25, 64),
    (2, 3, 30, 70, 40),  # blocks of a side; k no power of two
    (2, 2, 90, 7, 128),  # the first axis lies along the rows
    (3, 1, 5, 200, 50),
]


def whole(*shape, seed=0):
    """Integers whose sums float32 holds, and halves, too: any order of summation gives the same bits."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def same(add, *operands, matrix, batch, dtype=torch.float32, **options):
    """Whether triton adds what torch adds, bit for bit, to the same numbers."""
    before = whole(batch, matrix.dim, seed=9)
    expected, got = before.clone(), before.to(DEVICE)
    add(expected, *operands, matrix, backend="torch", **options)
    there = [x.to(DEVICE, dtype if n < 2 and x.is_floating_point() else None) for n, x in enumerate(operands)]
    scale = options.pop("scale", None)
    options |= {} if scale is None else {"scale": scale.to(DEVICE)}
    add(got, *there, matrix, backend="triton", **options)
    return torch.equal(got.cpu(), expected)


@pytest.fixture(params=[False, True], ids=["narrow", "wide"])
def wide(request, monkeypatch):
    """Both kernels: with all sums of an example in one program, and with a piece of them in each."""
    if request.param:
        monkeypatch.setattr(triton_tensor, "MOST_COLUMNS", 4)
    return request.param


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_outer_products_by_rows(number, wide):
    (batch, steps, o, i, k), dtype = SHAPES[number], TYPES[(number + wide) % 3]
    matrix = TensorMap(k, 7, 2**33 + 5, (o, i))
    left, right, scale = whole(batch, steps, o), whole(batch, steps, i, seed=1), whole(o * i, seed=2)
    for own in (None, scale):
        assert same(tensor_add_outer_, left, right, matrix=matrix, batch=batch, dtype=dtype, spectral=False, scale=own)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("batch", "steps", "o", "i", "k"), SHAPES)
def test_outer_products_by_transforms(batch, steps, o, i, k, dtype):
    matrix = TensorMap(k, 7, 2**33 + 5, (o, i))
    left, right = 1e-20 * whole(batch, steps, o), whole(batch, steps, i, seed=1)
    left = left.to(dtype) if dtype == torch.float32 else whole(batch, steps, o).to(dtype)
    expected, got = torch.zeros(batch, k), torch.zeros(batch, k, device=DEVICE)
    tensor_add_outer_(expected, left.float(), right, matrix, spectral=False)
    there = (left.to(DEVICE), right.to(DEVICE, dtype))
    tensor_add_outer_(got, *there, matrix, backend="triton", spectral=True)
    size = torch.einsum("bto,bti->boi", left.float().abs(), right.abs()).flatten(1).norm(dim=1)
    assert ((got.cpu() - expected).norm(dim=1) <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
@pytest.mark.parametrize(("k", "o", "i"), [(1024, 300, 1500), (2048, 40, 700), (4096, 4097, 30), (8192, 9, 8)])
def test_transforms_of_halves_round_no_more_than_halves_do(k, o, i, dtype):
    """One kernel makes them; zeros, and factors of very different sizes, are no trouble to it."""
    generator = torch.Generator().manual_seed(k)
    left, right = (torch.randn(2, 3, n, generator=generator) for n in (o, i))
    left[0, 1], right[1, 2] = 0, 0
    left, right = (1e-3 * left).to(DEVICE, dtype), (100 * right).to(DEVICE, dtype)
    matrix = TensorMap(k, 7, 2**33 + 5, (o, i))
    expected, got = torch.zeros(2, k), torch.ones(2, k, device=DEVICE)
    tensor_add_outer_(expected, left.float().cpu(), right.float().cpu(), matrix, spectral=False)
    tensor_add_outer_(got, left, right, matrix, backend="triton", spectral=True)
    assert ((got.cpu() - 1 - expected).norm(dim=1) <= 2e-3 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_given_rows_from_the_middle_of_one_to_that_of_another(dtype, wide):
    matrix, rows = TensorMap(40, 1, 2**40, (12, 70)), whole(5, 600)
    before = whole(5, 40, seed=9)
    expected, got = before.clone(), before.to(DEVICE)
    tensor_add_(expected, rows, 2**40 + 95, matrix)
    tensor_add_(got, rows.T.contiguous().T.to(DEVICE, dtype), 2**40 + 95, matrix, backend="triton")
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("length", [9, 70])
def test_rows_of_a_table(length):
    values, examples, index = whole(50, length), torch.arange(50) * 3 % 4, torch.arange(50) * 7 % 20
    matrix = TensorMap(32, 1, 5, (20, length))
    assert same(tensor_add_at_, values, examples, index, matrix=matrix, batch=4)


def test_windows():
    left, right = whole(3, 6, 4), whole(3, 5, 25, seed=1)
    taps, windows = torch.tensor([0, 1, 5, 6]), torch.tensor([0, 2, 10, 12])
    matrix = TensorMap(16, 1, 2**33 + 1, (6, 20))
    assert same(tensor_add_windows_, left, right, taps, windows, matrix=matrix, batch=3, spectral=False)
