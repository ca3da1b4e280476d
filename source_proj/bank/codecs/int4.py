"""Two numbers a byte."""

from source_proj.bank.codecs.lloyd_max import LloydMax

__all__ = ["Int4"]


class Int4(LloydMax):
    """Sixteen levels: a row of normal numbers errs by √(.0095 / .9905), a tenth of itself.

    Example:
        >>> Int4().row_bytes(4096)
        2048
    """

    name = "int4"
    bits = 4
    levels = (0.128395, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896)
