"""What is held for all layers of a batch adds the same numbers as each layer by itself."""

import pytest
import torch

from source_proj.kernels import (
    BACKENDS,
    HeldSums,
    TensorMap,
    available_backends,
    products_native,
    sparse_add_,
    tensor_add_outer_,
    tensor_held,
)
from source_proj.kernels.native import native_library
from source_proj.kernels.small_rows import Piece, add_by_table_
from source_proj.kernels.tensor_native import NativeSpectra

BACKENDS_HERE = [name for name in BACKENDS if name in available_backends("cpu")]
OUTERS = [
    ((300, 200), 3),
    ((20, 30), 1),
    ((400, 90), 1),
    ((6, 9), 5),
]  # with steps; two are small
SMALLER = [((90, 70), 3), ((20, 30), 1), ((130, 40), 1), ((6, 9), 5)]  # the same routes, for Triton's interpreter


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(batch, k, shapes=OUTERS):
    """Factors of each matrix with its map, and rows of vectors with their offsets."""
    offset, outers, vectors = 2**33, [], []
    for n, ((o, i), steps) in enumerate(shapes):
        outers.append((normal(batch, steps, o, seed=n), normal(batch, steps, i, seed=9 + n), offset, (o, i)))
        offset += o * i
        vectors.append((normal(batch, o, seed=20 + n), offset))
        offset += o
    return [(left, right, TensorMap(k, 3, at, shape)) for left, right, at, shape in outers], vectors


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize(("batch", "k"), [(1, 64), (19, 64), (11, 48), (33, 1024)])
def test_held_sums_are_those_of_each_layer(backend, batch, k):
    outers, vectors = layers(batch, k, SMALLER if backend == "triton" else OUTERS)
    expected, out = torch.ones(batch, k), torch.ones(batch, k)
    held = HeldSums(out, backend, seed=3)
    taken = 0
    for left, right, matrix in outers:
        tensor_add_outer_(expected, left, right, matrix, spectral=False)
        if held.takes_outer(left, right, matrix):
            taken += 1
        else:
            tensor_add_outer_(out, left, right, matrix, backend=backend, spectral=False)
    for rows, offset in vectors:
        sparse_add_(expected, rows, offset, seed=3)
        assert held.takes_rows(rows, offset)
    assert taken >= 2  # the two small ones at least
    assert not torch.equal(out, expected)
    held.finish_()
    assert ((out - expected).norm(dim=1) <= 2e-6 * expected.norm(dim=1)).all()
    held.finish_()  # nothing is left
    assert ((out - expected).norm(dim=1) <= 2e-6 * expected.norm(dim=1)).all()


@pytest.mark.skipif(native_library() is None, reason="the compiled kernels were not built")
@pytest.mark.parametrize("k", [256, 1024, 2048, 4096])
@pytest.mark.parametrize("steps", [(1,), (1, 2), (40,), (1, 40, 2)])
def test_products_that_are_kept_share_the_way_back_of_those_that_are_summed(k, steps):
    """Those of 40 steps are summed at once, as so many factors would take more memory than the sums."""
    out = normal(19, k + 3, seed=50)[:, :k]  # rows that do not follow each other, and hold something
    expected, spectra = out.clone(), NativeSpectra(out)
    for n, count in enumerate(steps):
        left, right = normal(19, count, 150, seed=n), normal(19, count, 90, seed=9 + n)
        matrix = TensorMap(k, 3, 2**33 + n * 13_500, (150, 90))
        spectra.add_outer(left, right, matrix)
        tensor_add_outer_(expected, left, right, matrix, spectral=False)
    for _ in range(2):  # nothing is left for the second time
        spectra.finish_()
        assert ((out - expected).norm(dim=1) <= 2e-6 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_whole_numbers_of_small_parameters_are_mapped_to_the_bit(backend, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(-9, 10, (17, n), generator=generator).float() for n in (700, 1, 64, 129)]
    expected, out = torch.zeros(17, 64), torch.zeros(17, 64)
    monkeypatch.setattr(tensor_held, "_MOST_ROWS", 17 * 750)  # added in between, too
    monkeypatch.setattr(products_native, "_MOST_ENTRIES", 750)
    held = HeldSums(out, backend, seed=5)
    for n, piece in enumerate(rows):
        sparse_add_(expected, piece, 1000 * n + 7, seed=5)
        assert held.takes_rows(piece, 1000 * n + 7)
    assert bool(out.any())
    held.finish_()
    assert torch.equal(out, expected)


def test_large_parameters_are_left_to_others():
    held = HeldSums(torch.zeros(2, 2048), "torch", seed=0)
    assert not held.takes_rows(torch.zeros(2, 1 << 13), 0)
    assert not held.takes_outer(torch.zeros(2, 1, 80), torch.zeros(2, 1, 80), TensorMap(2048, 0, 0, (80, 80)))


@pytest.mark.skipif("native" not in BACKENDS_HERE, reason="the compiled kernels are not there")
def test_threads_change_no_bit_of_what_is_held():
    outers, vectors = layers(33, 256)

    def sums():
        out = torch.zeros(33, 256)
        held = HeldSums(out, "native", seed=3)
        for left, right, matrix in outers:
            held.takes_outer(left, right, matrix)
        for rows, offset in vectors:
            held.takes_rows(rows, offset)
        held.finish_()
        return out

    usual, threads = sums(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sums(), usual)
    finally:
        torch.set_num_threads(threads)


def test_a_table_adds_what_the_map_says():
    rows, out, expected = normal(4, 100), torch.zeros(4, 7), torch.zeros(4, 7)
    add_by_table_(out, rows, (Piece(13, 60, 7, 2), Piece(2**40, 40, 7, 2)))
    sparse_add_(expected, rows[:, :60], 13, seed=2)
    sparse_add_(expected, rows[:, 60:], 2**40, seed=2)
    assert (out - expected).norm() <= 1e-6 * rows.norm()
