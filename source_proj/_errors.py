"""The errors that source-proj raises on purpose; each message names the value received and the remedy."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

__all__ = [
    "BankError",
    "ExampleError",
    "GradientError",
    "MismatchError",
    "MissingFileError",
    "SourceProjError",
    "extra",
    "full_disk_named",
    "named_examples",
    "write_remedy",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class SourceProjError(Exception):
    """Base class: catch it to catch everything that this package raises on purpose, bad arguments excepted."""


class MismatchError(SourceProjError, ValueError):
    """Two things that must agree do not, such as a checkpoint and a model, or a bank and a sketch."""


class MissingFileError(SourceProjError, FileNotFoundError):
    """A file that was named, or that another file names, is not there, or is none."""


class BankError(SourceProjError, RuntimeError):
    """A bank is missing, unfinished, corrupt, or of a foreign format."""


class GradientError(SourceProjError, RuntimeError):
    """A gradient is not finite, or a module's per-example gradients cannot be computed."""


class ExampleError(SourceProjError, ValueError):
    """Some examples of a batch are not as they must be.

    Args:
        positions: their places in the batch.
        what: what is wrong with them, and the remedy; "{examples}" stands for their names.
    """

    def __init__(self, positions: Sequence[int], what: str) -> None:
        self.positions, self.what = list(positions), what
        super().__init__(what.format(examples=f"examples {self.positions[:10]} of the batch"))


@contextmanager
def named_examples(ids: Sequence[Any]) -> Iterator[None]:
    """Name examples by their ids in what is raised about their places in a batch."""
    try:
        yield
    except ExampleError as error:
        names = [ids[i] for i in error.positions[:10]]
        raise MismatchError(error.what.format(examples=f"ids {names}")) from None


def write_remedy(error: OSError) -> str:
    """Say what helps against an error in writing, by its cause: room does not where one may not write.

    Example:
        >>> write_remedy(OSError(errno.ENOSPC, "No space left on device"))
        'make room (or lift the limit)'
        >>> write_remedy(PermissionError(errno.EACCES, "Permission denied"))
        'make it writable'
    """
    if error.errno in _FULL:
        return "make room (or lift the limit)"
    return "make it writable" if error.errno in _FORBIDDEN else "mend that"


@contextmanager
def full_disk_named(path: str | PathLike[str], again: str = "try again") -> Iterator[None]:
    """Name what cannot be written for want of room, and the remedy: the system's own error says neither.

    Args:
        path: what is written within the block.
        again: what to do once there is room.

    Raises:
        OSError: as the block's, of the same number.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or str(path) in str(error):  # named already
            raise
        remedy = f"{write_remedy(error)}, then {again}"
        raise OSError(error.errno, f"{error.strerror}: {path} cannot be written; {remedy}") from error


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the optional extra that brings what an import within the block lacks."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{error.name} is missing: pip install "source-proj[{name}]"') from error
