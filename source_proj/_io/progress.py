"""Progress, as a bar or as calls of the user's own function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

from source_proj._io.printable import printable

__all__ = ["Bar", "Progress", "progress_bar", "shared_bar", "tick", "unshared"]

Progress = bool | Callable[[str, int, int], None]
"""True for a bar, False for silence, or a function of (description, done, total), for what a logger shows."""


_IN_LOGS = 10.0
"""Seconds between two states of a bar where nobody watches it: in a file each of them is a line."""


class Bar:
    """What is done of a total; made by :func:`progress_bar`.

    Args:
        description: what is being done.
        total: how much there is to do.
        report: called with (description, done, total) after each step.
        shown: tqdm's bar, if one is shown.
    """

    def __init__(
        self, description: str, total: int, report: Callable[[str, int, int], None] | None = None, shown: Any = None
    ) -> None:
        self.description, self.total, self.done = description, total, 0
        self._report, self._shown = report, shown

    def update(self, count: int = 1) -> None:
        """Count what was done."""
        self.done += count
        if self._shown is not None:
            self._shown.update(count)
        if self._report is not None:
            self._report(self.description, self.done, self.total)

    def expect(self, total: int) -> None:
        """Say that there is more to do than was known; never less."""
        self.total = max(self.total, total)
        if self._shown is not None:
            self._shown.total = self.total

    def describe(self, description: str) -> None:
        """Say what is being done now."""
        self.description = description
        if self._shown is not None:
            self._shown.set_description(printable(description), refresh=False)


@contextmanager
def progress_bar(progress: Progress, description: str, total: int, unit: str) -> Iterator[Bar]:
    """Show a bar of what takes over two seconds, with rate and time left, or tell the user's function.

    Args:
        progress: see :data:`Progress`.
        description: what is being done, as "queries, checkpoint 2 of 4".
        total: how much there is to do.
        unit: what is counted.

    Example:
        >>> with progress_bar(lambda *step: print(*step), "rows", 5, "rows") as bar:
        ...     bar.update(2)
        ...     bar.update(3)
        rows 2 5
        rows 5 5
    """
    if callable(progress):
        yield Bar(description, total, progress)
        return
    if find_spec("ipywidgets"):
        from tqdm.auto import tqdm  # a widget in notebooks; without ipywidgets it would warn of them
    else:
        from tqdm import tqdm

    often = {"mininterval": 0.1 if _is_watched() else _IN_LOGS, "maxinterval": _IN_LOGS}
    bar = tqdm(total=total, desc=printable(description), unit=f" {unit}", delay=2, disable=not progress, **often)
    with bar as shown:
        yield Bar(description, total, shown=shown)


def _is_watched() -> bool:
    """Whether a terminal or a notebook shows the bar; what scripts put in the place of stderr may not know."""
    with suppress(AttributeError, ValueError):
        return "ipykernel" in sys.modules or bool(sys.stderr.isatty())
    return False


_shared: ContextVar[Bar | None] = ContextVar("shared", default=None)


@contextmanager
def shared_bar(progress: Progress, description: str, total: int, unit: str) -> Iterator[None]:
    """As :func:`progress_bar`, for work that tells what it does by :func:`tick`; within another one, that one stays."""
    if _shared.get() is not None:
        yield
        return
    with progress_bar(progress, description, total, unit) as bar:
        token = _shared.set(bar)
        try:
            yield
        finally:
            _shared.reset(token)


@contextmanager
def unshared() -> Iterator[None]:
    """Let no caller's bar count what is done within: whoever hands the work out counts it."""
    token = _shared.set(None)
    try:
        yield
    finally:
        _shared.reset(token)


def tick(count: int) -> None:
    """Count what was done in the bar that a caller opened, if one did."""
    bar = _shared.get()
    if bar is not None:
        bar.update(count)
