"""Where the records of a text file lie in its bytes, so that some can be left out and all others stay as they are."""

import codecs
import csv
import io
import json
import re
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["TABLES", "Records", "csv_delimiter", "csv_records", "csv_rows", "json_lines", "json_rows"]

TABLES = (".csv", ".tsv")
"""Files of rows that begin with the columns' names."""

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16's, which begins alike
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_WIDE = {"utf-16-le": "<u2", "utf-16-be": ">u2", "utf-32-le": "<u4", "utf-32-be": ">u4"}
_SIGNS = {chr(code) for code in range(9, 64)} - {'"', "\r", "\n"} | {"|"}
"""What may be a delimiter: no letter, and in the encodings allowed a byte of its own, never a part of another sign."""
_LIMIT = threading.Lock()  # on the length of a field, which csv has one of for the process


class Records(NamedTuple):
    """A text file and its records, the header among none of them.

    Attributes:
        content: the file's bytes.
        spans: first byte and end of each record, the end of its last line included.
        encoding: of the text behind the mark of the byte order, if there is one.
        mark: length of that mark in bytes.
        header: first byte and end of the header; None where there is none.
    """

    content: bytes
    spans: list[tuple[int, int]]
    encoding: str
    mark: int
    header: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.spans)

    def without(self, places: Collection[int]) -> bytes:
        """The file's bytes, those of some records left out: every other byte is there, in order.

        Args:
            places: numbers of the records to leave out, counted from 0.

        Raises:
            IndexError: there is no such record.
        """
        dropped = sorted(set(places))
        if dropped and not 0 <= dropped[0] <= dropped[-1] < len(self.spans):
            raise IndexError(f"there are records 0 to {len(self.spans) - 1}, got {dropped[0]} to {dropped[-1]}")
        pieces, done = [], 0
        for place in dropped:
            start, stop = self.spans[place]
            pieces.append(self.content[done:start])
            done = stop
        return b"".join([*pieces, self.content[done:]])

    def text(self, span: tuple[int, int]) -> str:
        """The text of a span.

        Raises:
            ValueError: it is none in the file's encoding.
        """
        try:
            return self.content[span[0] : span[1]].decode(self.encoding)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"byte {span[0] + error.start} is no {self.encoding} ({error.reason}): name the file's encoding"
            ) from None


def csv_delimiter(path: Path, given: str) -> str:
    r"""What stands between two fields of a file: what was given, and of a ``.tsv`` file by default a tab.

    Example:
        >>> csv_delimiter(Path("x.csv"), ","), csv_delimiter(Path("x.tsv"), ","), csv_delimiter(Path("x.tsv"), ";")
        (',', '\t', ';')
    """
    return "\t" if path.suffix == ".tsv" and given == "," else given


def csv_records(content: bytes, *, encoding: str = "utf-8", delimiter: str = ",", header: bool = True) -> Records:
    r"""Find the records of a CSV file as :class:`csv.reader` does, line breaks within quotes and all.

    Empty lines are no records, and belong to none. A record ends by ``\r\n``, ``\n`` or ``\r``, or with the file.

    Args:
        content: the file's bytes.
        encoding: of a file that begins with no mark of the byte order.
        delimiter: what stands between two fields.
        header: whether the first record names the columns.

    Raises:
        ValueError: the delimiter is no single sign of ASCII, or the encoding is unknown, or one in which bytes of ASCII
            stand for other letters.

    Example:
        >>> records = csv_records(b'text,label\n"two\nlines",0\nlast,1')
        >>> records.spans, records.without([0])
        ([(11, 25), (25, 31)], b'text,label\nlast,1')
    """
    if delimiter not in _SIGNS:
        raise ValueError(f"a delimiter is one sign such as ',' or '\\t', got {delimiter!r}")
    encoding, mark = _encoding(content, encoding)
    units, width = _units(content, encoding, mark)
    other = re.escape(delimiter).encode()
    # A quote is a quote at the beginning of a field only; what follows a closing one is text until the next delimiter.
    field = rb'(?:"(?:[^"]|"")*+(?:"|\Z))?[^\r\n' + other + rb"]*+"
    record = re.compile(field + rb"(?:" + other + field + rb")*+(?:\r\n|\r|\n|\Z)")
    spans, place = [], 0
    while place < len(units):
        stop = record.match(units, place).end()  # type: ignore[union-attr]  # every text begins with a record
        if units[place] not in b"\r\n":
            spans.append((mark + place * width, mark + stop * width))
        place = stop
    return Records(content, spans[1:] if header else spans, encoding, mark, spans[0] if header and spans else None)


def json_lines(content: bytes, *, encoding: str = "utf-8") -> Records:
    r"""Find the lines of a file of one JSON value each; those of white space alone are no records.

    Lines end by ``\n`` (or ``\r\n``), and by nothing else that a text may hold.

    Raises:
        ValueError: the encoding is unknown.

    Example:
        >>> json_lines(b'{"a": 1}\r\n\n{"a": 2}').spans
        [(0, 10), (11, 19)]
    """
    encoding, mark = _encoding(content, encoding)
    units, width = _units(content, encoding, mark)
    spans = [
        (mark + line.start() * width, mark + line.end() * width)
        for line in re.finditer(rb"[^\n]*\n|[^\n]+\Z", units)
        if line.group().strip()
    ]
    return Records(content, spans, encoding, mark, None)


def csv_rows(records: Records, *, delimiter: str = ",") -> list[dict[str, str | None]]:
    """The records by the names of their columns, of a file that has a header.

    Raises:
        ValueError: there is no header, a column's name is there twice, or a record has more fields than columns.
    """
    if records.header is None:
        raise ValueError("the file is empty: its first line must name the columns")
    names = _fields(records, records.header, delimiter)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the column {twice!r} is there twice: give each a name of its own")
    rows = []
    for number, span in enumerate(records.spans, start=1):
        fields = _fields(records, span, delimiter)
        if len(fields) > len(names):
            raise ValueError(
                f"record {number} has {len(fields)} fields and the header {len(names)}: put a field that holds "
                f"{delimiter!r} into quotes"
            )
        rows.append({**dict.fromkeys(names), **dict(zip(names, fields, strict=False))})
    return rows


def json_rows(records: Records) -> Iterable[dict[str, Any]]:
    """Yield the object of each line.

    Raises:
        ValueError: a line holds none; names it.
    """
    for span in records.spans:
        try:
            row = json.loads(records.text(span))
            if not isinstance(row, dict):
                raise ValueError(f"got {type(row).__name__}")
            yield row
        except (ValueError, RecursionError) as error:
            line = records.text((records.mark, span[0])).count("\n") + 1
            # json counts lines from the record's first, which would be a second number.
            why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f"line {line} is no JSON object: {why}") from error


def _fields(records: Records, span: tuple[int, int], delimiter: str) -> list[str]:
    text = records.text(span)
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        if "field limit" not in str(error):
            raise ValueError(f"a record is none of CSV ({error}): {text!r:.80}") from error
    with _LIMIT:  # csv's own, of all the process, is there against what streams
        before = csv.field_size_limit(max(len(text), csv.field_size_limit()))
        try:
            return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
        finally:
            csv.field_size_limit(before)


def _encoding(content: bytes, encoding: str) -> tuple[str, int]:
    """The encoding that the file's first bytes tell, or else the one that was named; and how many bytes tell it.

    Raises:
        ValueError: bytes of ASCII stand for other letters in it.
    """
    try:
        name, letters = codecs.lookup(encoding).name, "a\n".encode(encoding)
    except LookupError:
        raise ValueError(
            f"there is no encoding of texts {encoding!r}: give one that Python knows, such as 'utf-8'"
        ) from None
    for mark, told in _BYTE_ORDER_MARKS.items():
        # A NUL behind UTF-16's mark looks like UTF-32's: the name decides.
        if content.startswith(mark) and not (told.startswith("utf-32") and name.startswith("utf-16")):
            return told, len(mark)
    name = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(name, name)
    if name.startswith(("iso2022", "hz", "utf-7", "utf_7")) or (name not in _WIDE and letters != b"a\n"):
        raise ValueError(
            f"records cannot be found in {encoding!r}, where a line's end may be part of a letter: use UTF-8"
        )
    return name, 0


def _units(content: bytes, encoding: str, mark: int) -> tuple[bytes, int]:
    """One byte for each unit of the text, those beyond ASCII replaced; and how many bytes a unit takes."""
    if encoding not in _WIDE:
        return content[mark:] if mark else content, 1
    units = np.frombuffer(content, _WIDE[encoding], offset=mark, count=(len(content) - mark) // _width(encoding))
    if (len(content) - mark) % _width(encoding):
        raise ValueError(
            f"the file has {len(content)} bytes, which is no text in {encoding}: it was cut, or is damaged"
        )
    return np.where(units < 128, units, ord("x")).astype(np.uint8).tobytes(), _width(encoding)


def _width(encoding: str) -> int:
    return np.dtype(_WIDE[encoding]).itemsize
