"""Products of one step and rows that are held until one call: the sums are those of the matrix, to the bit if whole."""

import pytest
import torch

from source_proj.kernels import HeldProducts, Piece, TensorMap, products_native, sparse_add_, tensor_add_
from source_proj.kernels.native import native_library

pytestmark = pytest.mark.skipif(native_library() is None, reason="the compiled kernels were not built")

SHAPES = [(5, 7), (40, 30), (1, 1), (3, 200)]
VECTORS = [40, 1, 300]
SEED, FIRST = 2**63 + 3, 2**31 - 50


def whole(*shape, seed=0):
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def parts(batch, k, tensor, make=whole):
    """Factors and rows with their pieces."""
    offset, products, vectors = FIRST, [], []
    for n, (o, i) in enumerate(SHAPES):
        matrix = TensorMap(k, SEED, offset, (o, i)) if tensor else None
        piece = Piece(offset, o * i, k, SEED, matrix)
        products.append((make(batch, o, seed=n), make(batch, i, seed=10 + n), piece))
        offset += o * i
    for n, count in enumerate(VECTORS):
        vectors.append((make(batch, count, seed=20 + n), Piece(offset, count, k, SEED)))
        offset += count
    return products, vectors


def add_held(out, products, vectors):
    held = HeldProducts(out)
    for rows, piece in vectors[:1]:
        assert held.takes_rows(rows, piece)
    for left, right, piece in products:
        assert held.takes_product(left, right, piece)
    for rows, piece in vectors[1:]:
        assert held.takes_rows(rows, piece)
    held.finish_()
    held.finish_()  # nothing is left


def add_each(out, products, vectors):
    """The reference: gradients, one parameter after the other."""
    rows = [((left[:, :, None] * right[:, None]).flatten(1), piece) for left, right, piece in products]
    for gradient, piece in rows + vectors:
        if piece.matrix is None:
            sparse_add_(out, gradient, piece.start, seed=SEED)
        else:
            tensor_add_(out, gradient, piece.start, piece.matrix)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(("batch", "k"), [(1, 64), (5, 37), (16, 128), (19, 1000), (33, 260), (2, 1), (9, 3)])
def test_whole_numbers_are_mapped_to_the_bit(batch, k, tensor, level, at_level):
    at_level(level)
    given = parts(batch, k, tensor)
    out = whole(batch, k + 5, seed=99)[:, :k]  # rows that do not follow each other, and hold something
    expected = out.clone()
    add_held(out, *given)
    add_each(expected, *given)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_example_that_is_not_finite_spoils_no_other(level, at_level):
    at_level(level)
    products, vectors = parts(18, 64, tensor=False)
    products[1][0][4, 2], products[1][1][7, 3], vectors[2][0][9, 5] = torch.nan, torch.inf, torch.nan
    out = torch.zeros(18, 64)
    add_held(out, products, vectors)
    assert [b for b in range(18) if not out[b].isfinite().all()] == [4, 7, 9]


def test_threads_and_room_change_no_sum(monkeypatch):
    given = parts(50, 64, tensor=True, make=lambda *shape, seed: whole(*shape, seed=seed) / 7)

    def sums():
        out = torch.zeros(50, 64)
        add_held(out, *given)
        return out

    usual, threads = sums(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sums(), usual)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(products_native, "_MOST_ENTRIES", 410)  # added in between, too
    assert (sums() - usual).norm() <= 1e-6 * usual.norm()


def test_factors_of_any_strides_and_a_split_of_the_batch():
    products, vectors = parts(21, 64, tensor=False)
    strided = [
        (left.T.contiguous().T, torch.cat([right, right], 1)[:, : right.shape[1]], p) for left, right, p in products
    ]
    out, expected, halves = torch.zeros(21, 64), torch.zeros(21, 64), torch.zeros(21, 64)
    add_held(out, strided, vectors)
    add_each(expected, products, vectors)
    assert torch.equal(out, expected)
    for some in (slice(0, 13), slice(13, 21)):
        own = [(left[some], right[some], p) for left, right, p in products], [(rows[some], p) for rows, p in vectors]
        add_held(halves[some], *own)
    assert torch.equal(halves, expected)


def test_what_is_too_large_is_left_to_others(monkeypatch):
    out = torch.zeros(2, 64)
    held = HeldProducts(out)
    assert not held.takes_rows(whole(2, 5000), Piece(0, 5000, 64, 0))
    assert not held.takes_product(whole(2, 3000), whole(2, 3000), Piece(0, 9_000_000, 64, 0))
    monkeypatch.setattr(products_native, "_MOST_PRODUCTS", 100)
    assert held.takes_product(whole(2, 9), whole(2, 9), Piece(0, 81, 64, 0))
    assert not held.takes_product(whole(2, 9), whole(2, 9), Piece(81, 81, 64, 0))  # in all, over a batch
    wide = HeldProducts(torch.zeros(2, 2**17))
    assert not wide.takes_rows(whole(2, 5), Piece(0, 5, 2**17, 0))
