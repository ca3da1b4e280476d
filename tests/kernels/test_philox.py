"""The generator against the vectors that its authors publish, and against itself one word at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from source_proj.kernels import philox4x32
from source_proj.kernels.philox import sign_bits

word = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    got = philox4x32(*counter, seed=key[0] | key[1] << 32)
    assert " ".join(f"{int(w):08x}" for w in got) == expected


def philox_by_hand(counter, seed):
    """The rounds as the paper writes them, in unbounded integers."""
    x0, x1, x2, x3 = counter
    k0, k1 = seed % 2**32, seed // 2**32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


@given(counter=st.tuples(word, word, word, word), seed=st.integers(0, 2**64 - 1))
def test_equals_the_rounds_by_hand(counter, seed):
    assert tuple(int(w) for w in philox4x32(*counter, seed=seed)) == philox_by_hand(counter, seed)


def test_words_are_broadcast():
    grid = philox4x32(np.arange(3)[:, None], 7, np.arange(2), 9, seed=5)
    assert grid.shape == (3, 2, 4)
    assert grid.dtype == np.uint32
    for i in range(3):
        for j in range(2):
            np.testing.assert_array_equal(grid[i, j], philox4x32(i, 7, j, 9, seed=5))


def test_bits_come_least_significant_first():
    bits = sign_bits(np.array([[1, 2**31]], np.uint32))
    assert bits.shape == (1, 64)
    assert np.flatnonzero(bits[0]).tolist() == [0, 63]
