"""Readers of other frameworks' runs, which the room of integrations has: it stands above this one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Literal, cast

from source_proj.trajectory.stages import Stage

__all__ = ["stage_reader"]


def stage_reader(framework: Literal["hf_trainer", "lightning"]) -> Callable[..., Stage]:
    """The function that reads a framework's directory as one stage of training; imported when it is asked for."""
    return cast(Callable[..., Stage], getattr(import_module("source_proj.integrations"), f"{framework}_stage"))
