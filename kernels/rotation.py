"""A fixed random rotation of vectors, which makes the entries of any of them look like draws of a normal.

Signs from Philox, then Walsh-Hadamard matrices over the powers of two that k is a sum of (20 = 16 + 4), divided by
their roots; where there are several, the same once more in another order. Orthogonal, the same on every machine, and
k log₂ k additions a vector. Each entry's sums are taken in one order, whatever the batch.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .backends import choose_backend
from .native import require_library, share_rows
from .philox import philox4x32, sign_bits

__all__ = ["rotate", "rotate_back"]

_BACKENDS = ("native", "torch")
_NANOSECONDS = 1.0  # a number
_STREAM = 0x526F7461  # a counter of these signs alone


def rotate(vectors: Tensor, *, backend: str | None = None) -> Tensor:
    """R v of vectors ``(n, k)`` float32, by the backend "native" or "torch": the same bits.

    Raises:
        ValueError: the backend is not present.

    Example:
        >>> vectors = torch.eye(3)
        >>> torch.allclose(rotate(vectors) @ rotate(vectors).T, vectors)
        True
    """
    if choose_backend(backend, vectors.device.type, _BACKENDS, "rotations") == "native":
        return _rotate_native(vectors, back=False)
    signs = _signs(vectors.shape[1]).to(vectors.device)
    once = _hadamard(vectors * signs)
    if not _is_sum(len(signs)):
        return once
    return _hadamard(once[:, _order(len(signs)).to(vectors.device)] * signs)


def rotate_back(vectors: Tensor, *, backend: str | None = None) -> Tensor:
    """Rᵀ v of vectors ``(n, k)`` float32: undoes :func:`rotate`."""
    if choose_backend(backend, vectors.device.type, _BACKENDS, "rotations") == "native":
        return _rotate_native(vectors, back=True)
    signs = _signs(vectors.shape[1]).to(vectors.device)
    once = _hadamard(vectors) * signs
    if not _is_sum(len(signs)):
        return once
    return _hadamard(once[:, _order(len(signs)).argsort().to(vectors.device)]) * signs


def _rotate_native(vectors: Tensor, *, back: bool) -> Tensor:
    vectors, (n, k), library = vectors.float().contiguous(), vectors.shape, require_library()
    out, signs = torch.empty(n, k, dtype=torch.float32, device="cpu"), _signs(k)
    order = (_order(k).argsort() if back else _order(k)) if _is_sum(k) else None

    def some(first: int, last: int) -> None:
        work = torch.empty(k, dtype=torch.float32, device="cpu")
        library.sp_rotate(
            out.data_ptr() + 4 * k * first, work.data_ptr(), vectors.data_ptr() + 4 * k * first, k, last - first, k,
            signs.data_ptr(), None if order is None else order.data_ptr(), int(back),
        )  # fmt: skip

    if n and k:
        share_rows(n, some, _NANOSECONDS * vectors.numel())
    return out


def _is_sum(k: int) -> bool:
    """Whether there are several blocks, so that an entry of a small one would stay within it: turned twice, then."""
    return k & k - 1 > 0


def _hadamard(vectors: Tensor) -> Tensor:
    """The symmetric blocks H / √size, one for each power of two in k, the largest first."""
    blocks, start, k = [], 0, vectors.shape[1]
    for bit in reversed(range(k.bit_length())):
        size = 1 << bit
        if k & size:
            # H of 2ᵃ⁺ᵇ is that of 2ᵃ times that of 2ᵇ: each along its axis, where sums run over long stretches.
            block = vectors[:, start : start + size].reshape(-1, 1 << bit // 2, 1 << bit - bit // 2)  # (n, 2ᵃ, 2ᵇ)
            block = _sums_and_differences(_sums_and_differences(block).transpose(1, 2).contiguous()).transpose(1, 2)
            blocks.append(block.reshape(-1, size) * size**-0.5)
            start += size
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _sums_and_differences(block: Tensor) -> Tensor:
    """H along the middle axis of ``(n, 2ᵃ, m)``."""
    n, count, m = block.shape
    for width in (1 << bit for bit in range(count.bit_length() - 1)):
        pairs = block.view(n, count // (2 * width), 2, width * m)
        after = torch.empty_like(pairs)
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=after[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=after[:, :, 1])
        block = after.view(n, count, m)
    return block


@lru_cache(maxsize=16)
def _order(k: int) -> Tensor:
    """The entries in random order."""
    words = philox4x32(np.arange(-(-k // 4)), 1, 0, _STREAM, seed=0)  # (⌈k / 4⌉, 4)
    return torch.from_numpy(words.reshape(-1)[:k].argsort(kind="stable"))


@lru_cache(maxsize=16)
def _signs(k: int) -> Tensor:
    words = philox4x32(np.arange(-(-k // 128)), 0, 0, _STREAM, seed=0)  # (⌈k / 128⌉, 4)
    return torch.from_numpy(sign_bits(words).reshape(-1)[:k].astype(np.float32) * 2 - 1)
