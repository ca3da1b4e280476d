"""Scores in files: what is written with an array of them, and the long form of one line a score."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from source_proj._errors import extra
from source_proj._io.outputs import write_output
from source_proj._io.printable import csv_cell
from source_proj.attribution.seals import SEAL
from source_proj.attribution.words import id_word, plain_ids, sign_of

__all__ = [
    "FACTS", "Part", "id_words", "is_scores_array", "long_columns", "require_told_apart", "scores_facts",
    "write_scores_csv", "write_scores_parquet",
]  # fmt: skip

Part = tuple[int, np.ndarray, np.ndarray]
"""Place of the first of some queries, and positions and scores ``(q, k)`` of their examples, best first."""

Columns = list[list[Any] | np.ndarray]

_COLUMNS = ["query_id", "train_id", "rank", "score", "train_index"]

FACTS = frozenset({"query_ids", "train_ids", "unit", "sign", "higher_is_better"})
"""The names of what is written with the values, by which an array of scores is known again."""


def scores_facts(
    query_ids: Sequence[Any], train_ids: Sequence[Any], unit: str, *, higher_is_better: bool, additive: bool = True
) -> dict[str, Any]:
    """What is written with an array of scores, by the names of :data:`FACTS`."""
    return {
        "query_ids": plain_ids(query_ids),
        "train_ids": plain_ids(train_ids),
        "unit": unit,
        "sign": sign_of(unit, additive=additive),
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


def id_words(ids: Iterable[Any]) -> tuple[list[Any], bool]:
    """Ids as a column of a table holds them, whole numbers or words, and whether these are the ids themselves.

    Example:
        >>> id_words([3, 4]), id_words([("s", 3), "a"])
        (([3, 4], True), (['s/3', 'a'], False))
    """
    given_ids = list(ids)
    plain = [id_word(given) for given in given_ids]
    if all(type(given) is int and -(2**63) <= given < 2**63 for given in plain):
        return plain, True
    words = [str(given).encode("utf-8", "backslashreplace").decode() for given in plain]  # half surrogate pairs, too
    return words, all(isinstance(given, str) and given == word for given, word in zip(given_ids, words, strict=True))


def require_told_apart(*axes: Sequence[Any]) -> None:
    """Refuse ids that a table's words would make one, along each of its axes.

    Raises:
        ValueError: two ids are written alike, as 1 and "1" are; names them.
    """
    for ids in axes:
        first: dict[str, Any] = {}
        for given in ids:
            word = str(id_word(given))
            other = first.setdefault(word, given)
            if other is not given and (type(other) is not type(given) or other != given):
                raise ValueError(
                    f"the ids {other!r} and {given!r} would both be {word!r} in a table: give others, ids=, or keep "
                    "the scores by to_zarr, which holds ids as they are"
                )


def long_columns(parts: Iterable[Part], query_words: Sequence[Any], train_words: Sequence[Any]) -> Iterator[Columns]:
    """Each part's query_id, train_id, rank, score and train_index, a line a score."""
    for start, where, values in parts:
        count, k = where.shape
        yield [
            [word for word in query_words[start : start + count] for _ in range(k)],
            [train_words[place] for place in where.flat],
            np.tile(np.arange(1, k + 1, dtype=np.int64), count),
            values.reshape(-1).astype(np.float32, copy=False),
            where.reshape(-1).astype(np.int64, copy=False),
        ]


def write_scores_parquet(
    path: Path,
    parts: Iterable[Part],
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
        told: facts for the file's metadata, as of hits, which are read back: with them, the examples' positions are
            written, too.

    Raises:
        FileExistsError: something is there that may not be overwritten.
        ValueError: two ids would be one word.
    """
    with extra("parquet"):
        import pyarrow
        from pyarrow import parquet
    if not told:
        require_told_apart(query_ids, train_ids)
    words = [id_words(ids)[0] for ids in (query_ids, train_ids)]
    kinds = [pyarrow.string() if own and isinstance(own[0], str) else pyarrow.int64() for own in words]
    kinds += [pyarrow.int64(), pyarrow.float32(), pyarrow.int64()]
    names = _COLUMNS if told else _COLUMNS[:-1]
    schema = pyarrow.schema(list(zip(names, kinds, strict=False)))

    def write(file: BinaryIO) -> None:
        with parquet.ParquetWriter(file, schema, write_page_checksum=True) as writer:  # for others: hits have hashes
            if told:
                writer.add_key_value_metadata(told)  # of the file: within the schema they would be written twice
            for columns in long_columns(parts, *words):
                table = pyarrow.table(columns[: len(names)], schema=schema)
                writer.write_table(table, row_group_size=max(1, len(table)))

    write_output(path, write, overwrite=overwrite)


def write_scores_csv(
    path: Path,
    parts: Iterable[Part],
    query_ids: Sequence[Any],
    train_ids: Sequence[Any],
    *,
    overwrite: bool,
) -> None:
    """Write ranked examples in long form for a spreadsheet; arguments as for :func:`write_scores_parquet`."""
    require_told_apart(query_ids, train_ids)

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        lines = csv.writer(text)
        lines.writerow(_COLUMNS[:-1])
        for start, where, values in parts:
            for place, (row, scores) in enumerate(zip(where.tolist(), values, strict=True), start=start):
                query = csv_cell(id_word(query_ids[place]))
                for rank, (train, score) in enumerate(zip(row, scores, strict=True), start=1):
                    lines.writerow([query, csv_cell(id_word(train_ids[train])), rank, score])
        text.flush()
        text.detach()

    write_output(path, write, overwrite=overwrite)
