"""Markdown tables of numbers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

__all__ = ["ABSENT", "between", "bold", "grid", "plain", "short", "whole"]

ABSENT = "–"


def short(value: float) -> str:
    """Three decimals without the leading zero, and a true minus: ``.397``, ``−.020``."""
    if pd.isna(value):
        return ABSENT
    text = f"{abs(value):.3f}"
    return ("−" if value < 0 and float(text) else "") + (text[1:] if text[0] == "0" else text)


def plain(value: float) -> str:
    """Two decimals and a true minus."""
    return ABSENT if pd.isna(value) else f"{value:.2f}".replace("-", "−")


def whole(value: Any) -> str:
    """A count with separators."""
    return ABSENT if value is None else f"{value:,}"


def bold(text: str, strong: bool) -> str:
    """The text, bold if it is to be strong."""
    return f"**{text}**" if strong else text


def between(low: float, high: float, form: Callable[[float], str]) -> str:
    """An interval for the line below its value; nothing where there is none."""
    return "" if pd.isna(low) or pd.isna(high) else f"<br><sub>{form(low)} to {form(high)}</sub>"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a markdown table; all columns but the first ``left`` are centred."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    marks = ["---"] * left + [":---:"] * (len(header) - left)
    return [line(header), line(marks), *map(line, rows)]
