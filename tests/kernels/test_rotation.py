"""The rotation against matrices made entry by entry."""

import pytest
import torch

from source_proj.kernels.rotation import rotate, rotate_back


def naive_hadamard(size):
    """Entry (i, j) is (-1)^(number of bits that i and j share) / sqrt(size)."""
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


@pytest.mark.parametrize("k", [1, 2, 3, 16, 20, 63, 127, 128, 200])
def test_it_is_signs_and_hadamard_blocks_and_of_several_blocks_so_twice(k):
    sizes = [1 << bit for bit in reversed(range(8)) if k >> bit & 1]
    signs = (rotate(torch.eye(256))[:k, 0] * 16).double()  # column 0 of H is positive
    once = torch.block_diag(*map(naive_hadamard, sizes)) * signs
    between = once.T @ rotate(torch.eye(k)).T.double() @ once.T if len(sizes) > 1 else torch.eye(k)  # a permutation
    assert torch.equal(between.round().sum(0), torch.ones(k).double())
    assert torch.equal(between.round().sum(1), torch.ones(k).double())
    torch.testing.assert_close(between, between.round(), rtol=0, atol=2e-6)
    if len(sizes) == 1:
        torch.testing.assert_close(rotate(torch.eye(k)).T.double(), once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 20, 64, 129])
def test_back_undoes_it_and_inputs_stay(k):
    vectors = torch.randn(7, k, generator=torch.Generator().manual_seed(k))
    kept = vectors.clone()
    rotated = rotate(vectors)
    turned = rotated.clone()
    torch.testing.assert_close(rotate_back(rotated), vectors, rtol=0, atol=2e-6)
    assert torch.equal(vectors, kept)
    assert torch.equal(rotated, turned)


def test_signs_are_even_unlike_and_the_same_for_every_k():
    signs = rotate(torch.eye(4096))[:, 0] * 64  # column 0 of H is positive
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.sum()) <= 5 * 64
    for shift in (1, 2, 32, 128):
        assert abs((signs[shift:] * signs[:-shift]).sum()) <= 5 * 64
    assert torch.equal(rotate(torch.eye(1024))[:, 0] * 32, signs[:1024])


def test_a_row_is_rotated_alike_in_every_batch():
    vectors = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    whole = rotate(vectors)
    for i in range(9):
        assert torch.equal(rotate(vectors[i : i + 1])[0], whole[i])
    assert rotate(vectors[:0]).shape == (0, 300)
