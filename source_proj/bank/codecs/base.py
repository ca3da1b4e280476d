"""What every codec can do. A new one is a subclass in a file of its own, and an import beside the others."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from source_proj._errors import GradientError
from source_proj.kernels.scoring import Strongest, score

__all__ = ["Codec", "EncodedRows", "codec_names", "find_codec"]

_CODECS: "dict[str, Codec]" = {}


class EncodedRows(NamedTuple):
    """Rows as a codec stores them.

    Attributes:
        codes: ``(n, codec.width(k))`` of the codec's type.
        scale: what decoded codes are times, ``(n,)`` float32; None for 1.
    """

    codes: Tensor
    scale: Tensor | None


class Codec(ABC):
    """A way of storing rows of k float32 numbers.

    Attributes:
        name: what ``storage=`` calls it.
        dtype: torch's type of the codes.
        array_type: zarr's name of this type.
        has_scale: whether every row has a float32 scale.
        packed: whether codes are bits of a byte, and not numbers.
        compressible: whether zstd makes the codes of trained networks so much smaller that it pays.
    """

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    array_type: ClassVar[str]
    has_scale: ClassVar[bool] = True
    packed: ClassVar[bool] = False
    compressible: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):  # else it is the common part of several
            _CODECS[cls.name] = cls()

    def encode(self, rows: Tensor, sizes: Tensor | None = None) -> EncodedRows:
        """Encode finite rows ``(n, k)`` float32, each by itself.

        Args:
            rows: the rows.
            sizes: :meth:`row_sizes` of the rows, where it is known: saves a pass over them.

        Raises:
            GradientError: an entry is NaN or infinite; names the row.
        """
        sizes = self.row_sizes(rows) if sizes is None else sizes
        if not torch.isfinite(sizes).all():
            bad = (~torch.isfinite(sizes)).nonzero()[:, 0].tolist()
            raise GradientError(
                f"rows {bad[:10]} of the {len(rows)} to be stored as {self.name} have entries that are NaN or "
                "infinite: look at these examples and at the weights, or switch autocast off"
            )
        return self._encode(rows, sizes)

    @abstractmethod
    def _encode(self, rows: Tensor, sizes: Tensor) -> EncodedRows:
        """Encode rows whose sizes ``(n,)`` are finite."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor | None, k: int) -> Tensor:
        """Return the rows ``(n, k)`` float32 of what :meth:`encode` made; never shares memory with it."""

    def width(self, k: int) -> int:
        """Codes a row of k numbers."""
        return k

    def row_bytes(self, k: int) -> int:
        """Bytes of the codes of a row of k numbers."""
        return self.width(k) * self.dtype.itemsize

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of n rows of k numbers in memory, scales included."""
        return n * (self.row_bytes(k) + (torch.float32.itemsize if self.has_scale else 0))

    def empty(self, n: int, k: int) -> EncodedRows:
        """Memory for n rows of k numbers, to be filled."""
        codes = torch.empty(n, self.width(k), dtype=self.dtype, device="cpu")
        return EncodedRows(codes, codes.new_empty(n, dtype=torch.float32) if self.has_scale else None)

    def multiply(self, queries: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:
        """Inner products ``(Q, n)`` float32 of queries ``(Q, k)`` float32 with rows that stay encoded."""
        return score(queries, codes, scale)

    def search(self, strongest: Strongest, queries: Tensor, codes: Tensor, scale: Tensor | None, *, first: int) -> None:
        """Offer encoded rows ``first``, ``first`` + 1, … to a search, without the matrix of all products."""
        strongest.add(queries, codes, scale, first=first)

    @staticmethod
    def row_sizes(rows: Tensor) -> Tensor:
        """max|row| of rows ``(n, k)``, as ``(n,)``; NaN or infinite where an entry is, and seen ten times faster so."""
        return rows.abs().amax(dim=1)


def codec_names() -> tuple[str, ...]:
    """Names of all codecs, those of the fewest bytes first."""
    return tuple(sorted(_CODECS, key=lambda name: (_CODECS[name].row_bytes(4096), name)))


def find_codec(storage: str) -> Codec:
    """The codec of a name.

    Raises:
        ValueError: there is none; lists the names.

    Example:
        >>> find_codec("int8").row_bytes(4096)
        4096
    """
    if not isinstance(storage, str) or storage not in _CODECS:
        raise ValueError(f"storage must be one of {', '.join(codec_names())}, got {storage!r}")
    return _CODECS[storage]
