"""What commands print: JSON alone for scripts, tables for people, one line for an error."""

import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec

import typer

from source_proj._errors import MissingFileError, SourceProjError
from source_proj._io.printable import printable

__all__ = ["debug", "emit", "reports_errors", "say", "table"]

P = ParamSpec("P")

debug: ContextVar[bool] = ContextVar("debug", default=False)
"""Whether errors show their traceback."""


def emit(value: Any) -> None:
    """Print a value as JSON on standard output; a number that is not finite is null there, as JSON knows none."""
    plain = json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)
    typer.echo(json.dumps(plain, indent=2))


def say(text: str) -> None:
    """Print lines for people on standard output, ids and names in them made harmless for the terminal."""
    typer.echo(printable(text, keep="\n"))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out rows under a header; columns that hold only numbers are set to the right.

    Example:
        >>> print(table(["id", "score"], [["a", "+1.5"], ["bb", "-12.0"]]))
        id  score
        a    +1.5
        bb  -12.0
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    lines = []
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(header))]
    for row in [list(header), *cells]:
        fields = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(fields).rstrip())
    return "\n".join(lines)


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors of a command into one line on standard error and an exit code; ``--debug`` lets them through.

    Exit code 2: the command was not understood: an option is unknown or out of range, or what it names is missing or
    in the way. Exit code 1: it was understood and refused, or failed: the bank, the data or the checkpoints are at
    fault, a disk is full, an extra is not installed.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if kwargs.get("progress") is False:
            _hide_loading_bars()
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _say_warning
                command(*args, **kwargs)
        except BrokenPipeError:  # who reads, as head does, has seen enough: typer ends in silence
            raise
        except (SourceProjError, ValueError, TypeError, OSError, ImportError) as error:
            if debug.get():
                raise
            print(f"error: {printable(' '.join(str(error).split())) or type(error).__name__}", file=sys.stderr)
            raise typer.Exit(2 if _is_misused(error) else 1) from error

    wrapped.__doc__ = _flowing(inspect.getdoc(command) or "")
    return wrapped


def _flowing(text: str) -> str:
    """Paragraphs of one line each: ``--help`` keeps the source's line breaks in all but the first."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _hide_loading_bars() -> None:
    """Switch off the bars of transformers, which says so when it is imported; most commands never import it."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in a line, as an error is."""
    print(f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def _is_misused(error: Exception) -> bool:
    """Whether the command itself is at fault."""
    if isinstance(error, SourceProjError):
        return isinstance(error, MissingFileError)
    return isinstance(error, ValueError | TypeError | FileNotFoundError | FileExistsError)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # arrays of NumPy and their numbers, which are not imported for this
        return value.tolist()
    if hasattr(value, "__fspath__"):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
