"""Readers of other frameworks' runs: entry points, so that this room need not know the one of integrations above it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from source_proj._errors import MissingFileError
from source_proj.trajectory.stages import Stage

__all__ = ["stage_reader"]

_GROUP = "source_proj_readers"


def stage_reader(framework: str) -> Callable[..., Stage]:
    """The function that reads a framework's directory as one stage of training; imported when it is asked for.

    Raises:
        MissingFileError: the package was installed without it.
    """
    for point in entry_points(group=_GROUP, name=framework):
        reader: Callable[..., Stage] = point.load()
        return reader
    raise MissingFileError(f"the installed package has no entry point {framework!r} in {_GROUP}: install it again")
