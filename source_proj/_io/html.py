"""Small pieces of HTML for notebooks: everything that strangers wrote is escaped here."""

import html
from collections.abc import Iterable, Sequence

from source_proj._io.printable import SPELLING, printable

__all__ = ["escape", "facts", "table", "tiles", "wrapped"]

_FONT = "font-family:system-ui,sans-serif;font-size:13px"
_CELL = "padding:2px 8px;text-align:left;vertical-align:top"


def escape(text: object) -> str:
    r"""Text that stands in HTML as it is read, controls and direction marks as escapes.

    Example:
        >>> escape("<b>&\u202e")
        '&lt;b&gt;&amp;\\u202e'
    """
    return html.escape(printable(str(text), keep=SPELLING))


def table(header: Sequence[object], rows: Iterable[Sequence[str]]) -> str:
    """A table; header cells are escaped, the others are HTML already."""
    head = "".join(f'<th style="{_CELL}">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in row) + "</tr>" for row in rows
    )  # fmt: skip
    return f'<table style="{_FONT}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def facts(title: object, pairs: Iterable[tuple[object, object]]) -> str:
    """A title and a list of names with their values; all of it is escaped."""
    rows = "".join(
        f'<tr><th scope="row" style="{_CELL}">{escape(name)}</th><td style="{_CELL}">{escape(value)}</td></tr>'
        for name, value in pairs
    )
    return wrapped(title, f'<table style="{_FONT}"><tbody>{rows}</tbody></table>')


def tiles(contents: Iterable[tuple[str, object]]) -> str:
    """Pieces of HTML side by side, each above a line that is escaped; of one width, so that rows of tiles align."""
    pieces = list(contents)
    width = 150 if all(content.startswith("<img") for content, _ in pieces) else 220  # words need more than pictures
    style = f"{_FONT};flex:0 1 {width}px;overflow-wrap:anywhere"
    each = "".join(f'<div style="{style}">{content}<div>{escape(line)}</div></div>' for content, line in pieces)
    return f'<div style="display:flex;flex-wrap:wrap;gap:6px 14px;margin:4px 0 10px">{each}</div>'


def wrapped(title: object, content: str) -> str:
    """A title above content that is HTML already."""
    return f'<div style="{_FONT}"><strong>{escape(title)}</strong>{content}</div>'
