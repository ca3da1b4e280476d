"""Four numbers a byte."""

from source_proj.bank.codecs.lloyd_max import LloydMax

__all__ = ["Int2"]


class Int2(LloydMax):
    """Four levels: a row of normal numbers errs by √(.1175 / .8825), .36 of itself.

    Example:
        >>> Int2().row_bytes(4096)
        1024
    """

    name = "int2"
    bits = 2
    levels = (0.45278, 1.5104176)
