"""Scores in files: what is written with an array of them, and the long form of one line a score."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from source_proj._errors import extra
from source_proj._io.outputs import write_output
from source_proj._io.printable import csv_cell
from source_proj.attribution.seals import SEAL
from source_proj.attribution.words import id_word, plain_ids

__all__ = ["FACTS", "is_scores_array", "long_form", "scores_facts", "write_scores_csv", "write_scores_parquet"]

_COLUMNS = ["query_id", "train_id", "rank", "score"]

FACTS = frozenset({"query_ids", "train_ids", "unit", "sign", "higher_is_better"})
"""The names of what is written with the values, by which an array of scores is known again."""


def scores_facts(
    query_ids: Sequence[Any], train_ids: Sequence[Any], unit: str, *, higher_is_better: bool
) -> dict[str, Any]:
    """What is written with an array of scores, by the names of :data:`FACTS`."""
    return {
        "query_ids": plain_ids(query_ids),
        "train_ids": plain_ids(train_ids),
        "unit": unit,
        "sign": "positive: including the example raised the measurement",
        "higher_is_better": higher_is_better,
    }


def is_scores_array(folder: Path) -> bool:
    """Whether a folder is an array that :meth:`Scores.to_zarr` wrote, and holds nothing else."""
    try:
        metadata = json.loads((folder / "zarr.json").read_bytes())
    except (OSError, ValueError):
        return False
    if not isinstance(metadata, dict) or metadata.get("node_type") != "array":
        return False
    attributes = metadata.get("attributes")
    if not isinstance(attributes, dict) or not FACTS <= set(attributes) <= FACTS | {"blocks", SEAL}:
        return False
    return all(
        re.fullmatch(r"zarr\.json|c(/\d+)*", path.relative_to(folder).as_posix()) and not path.is_symlink()
        for path in folder.rglob("*")
    )


def long_form(query_ids: Sequence[Any], train_ids: Sequence[Any], told: dict[bytes, bytes] | None = None) -> Any:
    """The schema of Arrow of query_id, train_id, rank and score; ids are whole numbers, or words.

    With facts told, as of hits, which are read back: train_index, too, an example's position in the training set.
    """
    with extra("parquet"):
        import pyarrow

    def type_of(ids: Sequence[Any]) -> Any:
        numbers = all(isinstance(id_word(given), int) for given in ids)
        return pyarrow.int64() if numbers else pyarrow.string()

    types = [type_of(query_ids), type_of(train_ids), pyarrow.int64(), pyarrow.float32()]
    columns = [*zip(_COLUMNS, types, strict=True), *([("train_index", pyarrow.int64())] if told else [])]
    return pyarrow.schema(columns, metadata=told)


def write_scores_parquet(
    path: Path,
    parts: Iterable[tuple[int, np.ndarray, np.ndarray]],
    query_ids: Sequence[Any],
    train_ids: Sequence[Any],
    *,
    overwrite: bool,
    told: dict[bytes, bytes] | None = None,
) -> None:
    """Write ranked examples in long form, a group of rows a part, whole or not at all.

    Args:
        path: the file.
        parts: place of the first query, and positions and scores ``(q, k)`` of the examples, best first.
        query_ids: Q ids.
        train_ids: N ids.
        overwrite: replace a file that is there.
        told: facts for the file's metadata.

    Raises:
        FileExistsError: something is there that may not be overwritten.
    """
    schema = long_form(query_ids, train_ids, told)
    import pyarrow
    from pyarrow import parquet

    def words(ids: Iterable[Any], kind: Any) -> Any:
        plain = map(id_word, ids)
        return pyarrow.array(list(plain if kind == pyarrow.int64() else map(str, plain)), kind)

    def write(file: BinaryIO) -> None:
        with parquet.ParquetWriter(file, schema) as writer:
            for start, where, values in parts:
                count, k = where.shape
                asked = (query_id for query_id in query_ids[start : start + count] for _ in range(k))
                columns = [
                    words(asked, schema.types[0]),
                    words((train_ids[place] for place in where.flat), schema.types[1]),
                    np.tile(np.arange(1, k + 1), count),
                    values.reshape(-1).astype(np.float32, copy=False),
                    *([where.reshape(-1)] if told else []),
                ]
                writer.write_table(pyarrow.table(columns, schema=schema), row_group_size=max(1, count * k))

    write_output(path, write, overwrite=overwrite)


def write_scores_csv(
    path: Path,
    parts: Iterable[tuple[int, np.ndarray, np.ndarray]],
    query_ids: Sequence[Any],
    train_ids: Sequence[Any],
    *,
    overwrite: bool,
) -> None:
    """Write ranked examples in long form for a spreadsheet; arguments as for :func:`write_scores_parquet`."""

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        lines = csv.writer(text)
        lines.writerow(_COLUMNS)
        for start, where, values in parts:
            for place, (row, scores) in enumerate(zip(where.tolist(), values, strict=True), start=start):
                query = csv_cell(id_word(query_ids[place]))
                for rank, (train, score) in enumerate(zip(row, scores, strict=True), start=1):
                    lines.writerow([query, csv_cell(id_word(train_ids[train])), rank, score])
        text.flush()
        text.detach()

    write_output(path, write, overwrite=overwrite)
