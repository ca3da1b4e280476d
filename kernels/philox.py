"""Philox4x32-10: a counter in, 128 random bits out; no state, hence the same bits on every machine.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011
(https://doi.org/10.1145/2063384.2063405). This is the plain reference that every faster generator is held to.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["philox4x32", "sign_bits"]

_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(x0: ArrayLike, x1: ArrayLike, x2: ArrayLike, x3: ArrayLike, *, seed: int) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32 on counters (x0, x1, x2, x3) under the key (low, high word of seed).

    Each word is an integer or an array in [0, 2^32); the four are broadcast against each other.
    Returns an array of their common shape with one more axis, of the four output words.

    >>> [f"{word:08x}" for word in philox4x32(0, 0, 0, 0, seed=0)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    # Words are kept in uint64, so that a 32 x 32 bit product has room.
    words = np.broadcast_arrays(*(np.asarray(x, np.uint64) for x in (x0, x1, x2, x3)))
    c0, c1, c2, c3 = words
    for round_ in range(_ROUNDS):
        key0 = np.uint64(((seed & 0xFFFFFFFF) + round_ * _WEYL[0]) & 0xFFFFFFFF)
        key1 = np.uint64(((seed >> 32) + round_ * _WEYL[1]) & 0xFFFFFFFF)
        product0, product1 = _MULTIPLIER[0] * c0, _MULTIPLIER[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ key0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ key1,
            product0 & _LOW,
        )
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def sign_bits(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The bits of (..., n) words, least significant first, as (..., 32 n) zeros and ones."""
    return np.unpackbits(np.ascontiguousarray(words, dtype="<u4").view(np.uint8), axis=-1, bitorder="little")
