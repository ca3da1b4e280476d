"""Uniform random numbers for sampled labels: a function of seed, place and draw, for any split into batches."""

import torch
from torch import Tensor

from source_proj.kernels.philox import philox4x32

__all__ = ["Uniforms"]

_TAG = 0x46495348  # keeps these counters apart from the sketch's, which share the seed
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


class Uniforms:
    """``uniforms(n)`` gives ``(B, n)`` numbers in [0, 1) for the B rows of a batch; each call gives fresh ones.

    The key of a draw is a Philox4x32-10 block of the counter (stage, checkpoint, draw, tag) under the seed. A row's
    numbers are the blocks of the counters (low and high word of its position, index of the block, index of the call)
    under that key, as multiples of 2⁻²⁴. All is done in torch, because tasks call it inside ``torch.func.vmap``.

    Args:
        positions: positions ``(B,)`` int64 of the rows in their stage's training set.
        seed: the sketch's seed.
        stage: index of the stage.
        checkpoint: index of the checkpoint in its stage.
        draw: index of the draw.
    """

    def __init__(self, positions: Tensor, *, seed: int, stage: int, checkpoint: int, draw: int) -> None:
        words = philox4x32(stage, checkpoint, draw, _TAG, seed=seed)
        self._key = int(words[0]), int(words[1])
        self._positions = positions
        self._calls = 0

    def __call__(self, n: int) -> Tensor:
        """Numbers ``(B, n)`` float32 in [0, 1)."""
        call, self._calls = self._calls, self._calls + 1
        rows = self._positions[:, None]  # (B, 1)
        blocks = torch.arange(-(-n // 4), device=rows.device)[None]  # (1, n/4)
        zero = torch.zeros_like(rows + blocks)
        words = _philox((rows & _WORD) + zero, (rows >> 32) + zero, blocks + zero, call + zero, self._key)
        return (torch.stack(words, dim=-1).flatten(1)[:, :n] >> 8).float() * 2.0**-24


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]) -> tuple[Tensor, ...]:
    for round_ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIER[0], c0)
        high1, low1 = _product(_MULTIPLIER[1], c2)
        key0, key1 = ((key[i] + round_ * _WEYL[i]) & _WORD for i in range(2))
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, by halves of b: the whole does not fit signed 64 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD
