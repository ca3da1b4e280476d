"""Rows of texts and labels, from files and from data sets in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from source_proj._errors import MismatchError
from source_proj._io.records import TABLES, csv_delimiter, csv_records, csv_rows, json_lines, json_rows

__all__ = ["lacking", "text_rows"]


def text_rows(data: Any, *, encoding: str = "utf-8", delimiter: str = ",") -> tuple[str, list[Mapping[str, Any]]]:
    """What the data are called in messages, and their rows by the names of the columns.

    Args:
        data: a ``.jsonl`` file (one object a line), a ``.csv`` or ``.tsv`` one (with a header), a ``.parquet`` one, a
            folder that ``datasets`` saved, a ``datasets.Dataset``, a pandas frame, or a list of mappings.
        encoding: of a file of text that begins with no byte order mark.
        delimiter: of a ``.csv`` file; of a ``.tsv`` one it is a tab by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another type.
        MismatchError: it is damaged; the message names the place.
        TypeError: the data have no named columns.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        return repr(str(path)), list(_rows_of_file(path, encoding, delimiter))
    if hasattr(data, "to_dict") and hasattr(data, "iloc"):  # pandas
        return "the frame", data.astype(object).where(data.notna(), None).to_dict(orient="records")
    if isinstance(data, Mapping):
        raise TypeError(f"the data have the splits {list(data)}: give one of them")
    rows = list(data)
    if not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"{type(data).__name__} has no named columns: give a datasets.Dataset, a frame, or dicts")
    return "the data set", rows


def lacking(column: str, row: Mapping[str, Any], example: int, data: str, option: str) -> MismatchError:
    """What to say of a row that has nothing in a column; examples are counted from 1, ``option`` names the column."""
    if column in row:
        return MismatchError(
            f"example {example} of {data} has nothing in its column {column!r}: fill it in, or leave the example out"
        )
    there = sorted(str(name) for name, value in row.items() if value is not None and value != "")
    return MismatchError(
        f"example {example} of {data} has no {column!r}, only {there}; {option} names the column, or give it that name"
    )


def _rows_of_file(path: Path, encoding: str, delimiter: str) -> Iterable[Mapping[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"the data set {str(path)!r} does not exist")
    try:
        if path.is_dir() or path.suffix == ".parquet":
            return _loaded(path)
        if path.suffix in TABLES:
            delimiter = csv_delimiter(path, delimiter)
            records = csv_records(path.read_bytes(), encoding=encoding, delimiter=delimiter)
            return csv_rows(records, delimiter=delimiter)
        if path.suffix in (".jsonl", ".ndjson"):
            return list(json_rows(json_lines(path.read_bytes(), encoding=encoding)))
    except ValueError as error:
        raise MismatchError(f"{str(path)!r}: {error}") from error
    raise ValueError(
        f"the data set {str(path)!r} must be a .jsonl, .csv, .tsv or .parquet file, or a folder of datasets"
    )


def _loaded(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f'{str(path)!r} needs datasets: pip install "source-proj[datasets]"') from error
    if not path.is_dir():
        table: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
        return table
    rows: Iterable[Mapping[str, Any]] = datasets.load_from_disk(str(path))
    if isinstance(rows, Mapping):
        raise ValueError(f"it holds the splits {list(rows)}: give the folder of one, {str(path / next(iter(rows)))!r}")
    return rows
