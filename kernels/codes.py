"""Codes of 4, 2 or 1 bits: which levels rows are nearest to, packed, and back; `scoring` multiplies them as they are.

Row r, of k numbers and of the root mean square m, has for its number i the code of the level nearest to row[i] / m, the
higher one where two are as near. With ``per`` = 8 / bits codes a byte, code j is in byte j // per, from bit
bits (j % per) on; what the last byte has left is 0.

Compiled code serves the CPU, torch every device. Codes and unpacked levels are the same; the sums of a row, taken in
float64, differ by their rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import choose_backend
from .native import aligned_scratch, require_library, share_rows

__all__ = ["Encoding", "PackedRows", "encode_rows", "unpack_rows"]

_BACKENDS = ("native", "torch")
_NANOSECONDS = (2.0, 0.15)  # a number, to encode and to unpack


@dataclass(frozen=True)
class PackedRows:
    """Rows of k levels each, packed.

    Attributes:
        codes: ``(n, ⌈k bits / 8⌉)`` uint8.
        k: numbers a row.
        levels: the 2, 4 or 16 levels that they name, ascending.

    Raises:
        ValueError: the codes have another width or type, or there is another number of levels.

    Example:
        >>> rows = PackedRows(torch.tensor([[5], [6]], dtype=torch.uint8), 3, (-0.5, 0.5))
        >>> len(rows), rows.shape, rows[1:].unpacked().tolist()
        (2, (2, 3), [[-0.5, 0.5, 0.5]])
    """

    codes: Tensor
    k: int
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.levels) not in (2, 4, 16):
            raise ValueError(f"levels must be 2, 4 or 16 (of 1, 2 or 4 bits), got {len(self.levels)}")
        width = -(-self.k * self.bits // 8)
        if self.codes.dtype != torch.uint8 or self.codes.shape[1:] != (width,):
            raise ValueError(
                f"codes of {self.k} numbers of {self.bits} bits must be uint8 of shape (n, {width}), "
                f"got {self.codes.dtype} of shape {tuple(self.codes.shape)}"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice) -> "PackedRows":
        return replace(self, codes=self.codes[rows])

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return len(self.levels).bit_length() - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and numbers of each."""
        return len(self), self.k

    @property
    def device(self) -> torch.device:
        """Of the codes."""
        return self.codes.device

    def unpacked(self, *, kept: bool = True) -> Tensor:
        """The levels ``(n, k)`` float32; see :func:`unpack_rows`."""
        return unpack_rows(self.codes, self.k, self.levels, kept=kept)

    def blocks(self, height: int) -> Iterator[tuple[int, Tensor]]:
        """Start and levels of so many rows at a time, each in memory that the next one may use again."""
        for start in range(0, len(self), height):
            yield start, self[start : start + height].unpacked(kept=False)


class Encoding(NamedTuple):
    """What became of rows.

    Attributes:
        codes: ``(n, ⌈k bits / 8⌉)`` uint8.
        length: √(Σ row²), ``(n,)`` float64.
        along: Σ row · level, ``(n,)`` float64, not negative.
    """

    codes: Tensor
    length: Tensor
    along: Tensor


def encode_rows(rows: Tensor, levels: tuple[float, ...], *, backend: str | None = None) -> Encoding:
    """Encode rows ``(n, k)`` float32 by 2, 4 or 16 ascending levels.

    Args:
        rows: finite numbers.
        levels: of numbers whose root mean square is 1.
        backend: "native", "torch", or None for the fastest on this device.

    Raises:
        ValueError: the backend is not present.

    Example:
        >>> encode_rows(torch.tensor([[1.0, -1.0, 1.0]]), (-0.8, 0.8)).codes.tolist()
        [[5]]
    """
    bits = len(levels).bit_length() - 1
    numbers = torch.tensor(levels, device=rows.device, dtype=torch.float32)
    edges = (numbers[1:] + numbers[:-1]) / 2
    if choose_backend(backend, rows.device.type, _BACKENDS, "codes") == "native":
        return _encode_native(rows.contiguous(), numbers, edges, bits)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    rms = (length / rows.shape[1] ** 0.5).float()
    codes = torch.bucketize(rows / torch.where(rms > 0, rms, torch.inf), edges, out_int32=True, right=True)
    along = (rows * numbers[codes]).sum(1, dtype=torch.float64)
    per = 8 // bits
    width = -(-codes.shape[1] // per)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per)).view(len(codes), width, per).to(torch.uint8)
    packed = padded[:, :, 0].clone()
    for place in range(1, per):
        packed |= padded[:, :, place] << place * bits
    return Encoding(packed, length[:, 0], along)


def unpack_rows(
    codes: Tensor, k: int, levels: tuple[float, ...], *, backend: str | None = None, kept: bool = True
) -> Tensor:
    """Levels ``(n, k)`` float32 of packed codes; arguments and errors as for :func:`encode_rows`.

    Args:
        codes: the codes.
        k: numbers a row.
        levels: as they were encoded by.
        backend: as for :func:`encode_rows`.
        kept: False for rows that are read before this thread unpacks others: their memory may be used again.

    Example:
        >>> unpack_rows(torch.tensor([[5]], dtype=torch.uint8), 3, (-0.5, 0.5)).tolist()
        [[0.5, -0.5, 0.5]]
    """
    table = _table(levels, codes.device)
    if choose_backend(backend, codes.device.type, _BACKENDS, "codes") == "torch":
        rows = torch.nn.functional.embedding(codes.int(), table)  # (n, width, per)
        return rows.flatten(1)[:, :k].contiguous()
    codes, library = codes.contiguous(), require_library()
    size = len(codes) * k
    memory = torch.empty(size, dtype=torch.float32, device="cpu") if kept else aligned_scratch("codes", size)
    out = memory.view(len(codes), k)
    width, bits = codes.shape[1], 8 // table.shape[1]

    def some(first: int, last: int) -> None:
        library.sp_unpack(
            out.data_ptr() + 4 * k * first, k, codes.data_ptr() + width * first, width, last - first, k, bits,
            table.data_ptr(),
        )  # fmt: skip

    if out.numel():
        share_rows(len(codes), some, _NANOSECONDS[1] * out.numel())
    return out


def _encode_native(rows: Tensor, levels: Tensor, edges: Tensor, bits: int) -> Encoding:
    (n, k), library = rows.shape, require_library()
    codes = torch.empty(n, -(-k * bits // 8), dtype=torch.uint8, device="cpu")
    length, along = torch.empty(n, dtype=torch.float64, device="cpu"), torch.empty(n, dtype=torch.float64, device="cpu")

    def some(first: int, last: int) -> None:
        library.sp_encode(
            codes.data_ptr() + codes.shape[1] * first, codes.shape[1], length.data_ptr() + 8 * first,
            along.data_ptr() + 8 * first, rows.data_ptr() + 4 * k * first, k, last - first, k, bits,
            edges.data_ptr(), levels.data_ptr(),
        )  # fmt: skip

    if n:
        share_rows(n, some, _NANOSECONDS[0] * rows.numel())
    return Encoding(codes, length, along)


@lru_cache(maxsize=16)
def _table(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Levels ``(256, per)`` of each byte."""
    bits = len(levels).bit_length() - 1
    shifts = torch.arange(0, 8, bits, device=device)
    places = torch.arange(256, device=device)[:, None] >> shifts & (1 << bits) - 1
    return torch.tensor(levels, device=device, dtype=torch.float32)[places]
