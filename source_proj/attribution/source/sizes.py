"""What fits and searches take, before there are any: bytes on disk and in memory."""

from collections.abc import Sequence
from typing import NamedTuple

from source_proj.attribution.moments import takes_spectrum
from source_proj.attribution.source.memory import parse_memory
from source_proj.bank.codecs import Codec, find_codec
from source_proj.bank.read.stage_bank import DECODED_NUMBERS
from source_proj.kernels.gram import packed_size

__all__ = ["SegmentSize", "fit_peak", "fitted_bytes", "search_peak"]

_SINGLE, _DOUBLE = 4, 8  # bytes of a number
# k x k doubles that are in memory at once: an eigendecomposition, its input and its work space, or Ĥ and a factor.
_SPECTRUM_MATRICES, _FACTOR_MATRICES = 5, 3
_BLOCK_BYTES = 64 << 20  # of a block's scores, and of the rows that they are made of


class SegmentSize(NamedTuple):
    """What a segment's sizes depend on.

    Attributes:
        rows: N, examples of its stage.
        checkpoints: how many it averages.
        crossed: to how many other metrics of earlier segments a query is carried.
    """

    rows: int
    checkpoints: int
    crossed: int = 0

    @property
    def factors(self) -> int:
        """Factors of its Ĥ, one for each example and checkpoint."""
        return self.rows * self.checkpoints

    def decomposed(self, dim: int) -> bool:
        """Whether the eigenvectors of its Ĥ are computed at once."""
        return takes_spectrum(dim, self.factors)


def fitted_bytes(segments: Sequence[SegmentSize], dim: int) -> int:
    """Bytes on disk of Source's fits: of each segment a spectrum, or half of Ĥ and of a factor of it, some 6 k².

    Example:
        >>> fitted_bytes([SegmentSize(10**6, 2)], dim=4096) / 4096**2
        6.55078125
    """
    total = 0
    for segment in segments:
        if segment.decomposed(dim):
            total += _DOUBLE * min(dim, segment.factors) * (dim + 1)
        else:  # Ĥ in single precision, and a factor that may need double
            total += (_SINGLE + _DOUBLE) * packed_size(dim)
        total += segment.crossed * _DOUBLE * dim**2
    return total


def fit_peak(segments: Sequence[SegmentSize], dim: int, shard_rows: int) -> int:
    """Bytes of memory while Source is fitted: some k x k matrices, and a block of rows as they are read and decoded.

    With Source's own damping; without any, the spectrum of a large Ĥ may be needed, which takes more.
    """
    decomposed = any(segment.decomposed(dim) for segment in segments)
    matrices = _SPECTRUM_MATRICES if decomposed else _FACTOR_MATRICES
    return matrices * _DOUBLE * dim**2 + 2 * _SINGLE * min(shard_rows * dim, max(dim, DECODED_NUMBERS))


def search_peak(
    segments: Sequence[SegmentSize], dim: int, shard_rows: int, codec: Codec, memory: int | str | None = None
) -> int:
    """Bytes of memory while queries are scored: rows that are held, shards that are read, and blocks of scores.

    Args:
        segments: all segments.
        dim: the sketch's dimension k.
        shard_rows: rows of the largest shard.
        codec: how rows are stored.
        memory: as for :class:`source_proj.Source`.
    """
    limit, held, read = parse_memory(memory) // 2, 0, 0
    for segment in segments:
        kept = codec if segment.checkpoints == 1 else find_codec("float32")  # means are made anew
        nbytes = kept.nbytes(segment.rows, dim)
        held += nbytes if held + nbytes <= limit else 0
        codes = codec.nbytes(shard_rows, dim)
        decoded = 0 if segment.checkpoints == 1 else _SINGLE * shard_rows * dim * segment.checkpoints
        read = max(read, codes + decoded)
    return held + read + _BLOCK_BYTES
