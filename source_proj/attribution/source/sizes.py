"""What fits and searches take, before there are any: bytes on disk and in memory."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from source_proj.attribution.moments import takes_gram, takes_spectrum
from source_proj.attribution.source.memory import parse_memory
from source_proj.bank.codecs import Codec, find_codec
from source_proj.bank.read.stage_bank import DECODED_NUMBERS
from source_proj.kernels.gram import packed_size
from source_proj.sketch.columns import Columns

__all__ = ["SegmentSize", "fit_peak", "fitted_bytes", "search_peak"]

_SINGLE, _DOUBLE = 4, 8  # bytes of a number
# k x k doubles that are in memory at once, one of which stays: an eigendecomposition, its input and its work space, or
# Ĥ and a factor.
_SPECTRUM_MATRICES, _FACTOR_MATRICES = 5, 3
_BLOCK_BYTES = 64 << 20  # of a block's scores, and of the rows that they are made of


class SegmentSize(NamedTuple):
    """What a segment's sizes depend on.

    Attributes:
        rows: N, examples of its stage.
        checkpoints: how many it averages.
        crossed: to how many other metrics of earlier segments a query is carried.
        draws: sampled labels of an example at a checkpoint, where Ĥ is made of them.
    """

    rows: int
    checkpoints: int
    crossed: int = 0
    draws: int = 1

    @property
    def factors(self) -> int:
        """Factors of its Ĥ, one for each example, checkpoint and draw."""
        return self.rows * self.checkpoints * self.draws

    def takes_gram(self, dim: int) -> bool:
        """Whether a Gram matrix stands in for its Ĥ, whose eigenvectors are not computed at once."""
        return not takes_spectrum(dim) and takes_gram(dim, self.factors)


def fitted_bytes(segments: Sequence[SegmentSize], blocks: Sequence[Columns]) -> int:
    """Bytes on disk of Source's fits: of each segment a spectrum, or half of Ĥ and of a factor of it, some 6 k².

    Where there are fewer factors than columns, half of a factor of their Gram matrix; all for each block of columns.

    Example:
        >>> from source_proj.sketch.columns import blocks_of
        >>> fitted_bytes([SegmentSize(10**6, 2)], blocks_of(4096, 1)) / 4096**2
        6.55078125
    """
    total = 0
    for segment, width in product(segments, (columns.width for columns in blocks)):
        if takes_spectrum(width):
            total += _DOUBLE * min(width, segment.factors) * (width + 1)
        elif segment.takes_gram(width):
            total += _DOUBLE * packed_size(segment.factors)
        else:  # Ĥ in single precision, and a factor that may need double
            total += (_SINGLE + _DOUBLE) * packed_size(width)
        total += segment.crossed * _DOUBLE * width**2
    return total


def fit_peak(segments: Sequence[SegmentSize], blocks: Sequence[Columns], shard_rows: int) -> int:
    """Bytes of memory while Source is fitted: what queries are to go through, of all segments and blocks of columns.

    Besides, the matrices that the last of it is made of, and a block of rows as they are read and decoded. With
    Source's own damping; without any, the spectrum of a large Ĥ may be needed, which takes more.
    """
    dim, width = blocks[0].dim, max(columns.width for columns in blocks)
    block = 2 * _SINGLE * min(shard_rows * dim, max(dim, DECODED_NUMBERS))
    matrices = _SPECTRUM_MATRICES if takes_spectrum(width) else _FACTOR_MATRICES
    by_gram = [segment.factors for segment in segments if segment.takes_gram(width)]
    # Their factors are kept in memory, of a block twice while they are joined.
    rows = _SINGLE * (dim * sum(by_gram) + width * max(by_gram, default=0))
    sides = [segment.factors if segment.takes_gram(width) else width for segment in segments]
    held = sum(side**2 + segment.crossed * width**2 for side, segment in zip(sides, segments, strict=True))
    largest = max((width if s.crossed else side for side, s in zip(sides, segments, strict=True)), default=width)
    return _DOUBLE * (len(blocks) * held + (matrices - 1) * largest**2) + rows + block


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
