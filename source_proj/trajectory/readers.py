"""Readers of other frameworks' runs: the room of integrations, which stands above this one, puts them here."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec

from source_proj.trajectory.stages import Stage

__all__ = ["register_reader", "stage_reader"]

Arguments = ParamSpec("Arguments")

_READERS: dict[str, Callable[..., Stage]] = {}


def register_reader(
    framework: str,
) -> Callable[[Callable[Arguments, Stage]], Callable[Arguments, Stage]]:
    """Decorate the function that reads a framework's directory as one stage of training."""

    def register(reader: Callable[Arguments, Stage]) -> Callable[Arguments, Stage]:
        _READERS[framework] = reader
        return reader

    return register


def stage_reader(framework: str) -> Callable[..., Stage]:
    """The function that was registered for a framework.

    Raises:
        ValueError: there is none.
    """
    if framework not in _READERS:
        raise ValueError(f"no reader of {framework!r} is registered, only of {sorted(_READERS)}: import source_proj")
    return _READERS[framework]
