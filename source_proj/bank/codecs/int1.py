"""Eight numbers a byte."""

from source_proj.bank.codecs.lloyd_max import LloydMax

__all__ = ["Int1"]


class Int1(LloydMax):
    """Signs: a row of normal numbers errs by √(.3634 / .6366), .76 of itself.

    Scores change by less than another sketch changes them only while k is small, about a quarter of the training
    examples (measured); a larger k is better spent on :class:`Int2`.

    Example:
        >>> Int1().row_bytes(4096)
        512
    """

    name = "int1"
    bits = 1
    levels = (0.7978846,)
