"""An amount of memory, as people write it."""

import re

__all__ = ["parse_memory"]

_DEFAULT = 2 * 10**9
_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


def parse_memory(memory: int | str | None) -> int:
    """Bytes of ``memory=``.

    Raises:
        TypeError: it is neither a whole number nor a text.
        ValueError: it is not above 0, or no number with a unit.

    Example:
        >>> parse_memory("1.5 GB"), parse_memory("512MiB"), parse_memory(10**9), parse_memory(None)
        (1500000000, 536870912, 1000000000, 2000000000)
    """
    if memory is None:
        return _DEFAULT
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise TypeError(f"memory must be bytes, or a text such as '4GB', got {memory!r}")
    if isinstance(memory, int):
        size = memory
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", memory, re.IGNORECASE | re.ASCII)
        units = {name.lower(): factor for name, factor in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise ValueError(f"memory must be a number and one of {', '.join(_UNITS)}, such as '4GB', got {memory!r}")
        size = int(float(match[1]) * units[match[2].lower()])
    if size <= 0:
        raise ValueError(f"memory must be above 0 bytes, got {memory!r}")
    return size
