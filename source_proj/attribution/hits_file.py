"""The strongest examples of many queries in a file, read query by query."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import zarr

from source_proj._errors import MismatchError, MissingFileError, extra
from source_proj._io.outputs import from_home
from source_proj.attribution.hits import Hit, Hits
from source_proj.attribution.score_files import (
    Part,
    id_words,
    long_columns,
    write_scores_csv,
    write_scores_parquet,
)
from source_proj.attribution.seals import SEAL, digest_of, opened, replaced_or_damaged, sealed
from source_proj.attribution.words import id_of, sign_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HitsFile", "is_hits_folder", "sealed_facts", "write_hits"]

_FACTS = b"source-proj"  # the key of the file's facts
_MOST_FACTS = 2**31 - 1  # bytes of them that are read back; ids in words of their own take most
_REMEDY = "write them anew by top_k(queries, k, out=path)"


class HitsFile:
    """The k strongest examples of each query, as ``top_k(queries, k, out=path)`` wrote them; read where they are asked.

    ``hits[q]`` lists the :class:`Hit` s of the query at place q, a slice reads :class:`Hits` of several queries, and
    iteration yields ``(query id, hits)``.

    Args:
        path: a .parquet file in long form (query_id, train_id, rank, score, train_index), or a .zarr folder.

    Attributes:
        path: the file.
        k: examples of each query.
        unit: unit of the scores.
        higher_is_better: whether a rise of the measurement is an improvement.
        additive: whether scores are changes of the measurement, and no similarities.

    Raises:
        MissingFileError: there is none.
        MismatchError: it holds no hits, or was damaged; the hits themselves are compared when they are read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = from_home(path)
        self._reader: _Parquet | _Zarr
        if self.path.is_dir() and is_hits_folder(self.path):
            self._reader = _Zarr(self.path)
        elif self.path.is_file():
            self._reader = _Parquet(self.path)
        else:
            raise MissingFileError(f"there are no hits at {str(path)!r}: write them by top_k(queries, k, out=path)")
        facts = self._reader.facts
        self.unit, self.higher_is_better = str(facts["unit"]), bool(facts["higher_is_better"])
        self.additive = facts["sign"] == sign_of(self.unit, additive=True)
        self.k, self._count = self._reader.k, self._reader.count

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"HitsFile({str(self.path)!r}: {len(self)} queries x {self.k} training examples, in the {self.unit})"

    @overload
    def __getitem__(self, query: int) -> list[Hit]: ...
    @overload
    def __getitem__(self, query: slice) -> Hits: ...
    def __getitem__(self, query: int | slice) -> list[Hit] | Hits:
        if isinstance(query, slice):
            return self._at(range(len(self))[query])
        try:
            place = range(len(self))[query]
        except IndexError:
            raise IndexError(f"there are {len(self)} queries, got {query}") from None
        except TypeError:
            raise TypeError(f"hits are asked for by a query's place or a slice of places, got {query!r}") from None
        return self._at([place])[0]

    def __iter__(self) -> Iterator[tuple[Any, list[Hit]]]:
        for start in range(0, len(self), self._reader.height):
            yield from self._at(range(start, min(start + self._reader.height, len(self))))

    def _at(self, places: Sequence[int]) -> Hits:
        """Those of the queries at some places, in their order; each block that holds one of them is read once."""
        height = self._reader.height
        blocks = {number: self._reader.block(number) for number in sorted({place // height for place in places})}
        rows = [(blocks[place // height], place % height) for place in places]
        shape = (len(rows), self.k)
        return Hits(
            [block.ids[row] for block, row in rows],
            np.array([block.scores[row] for block, row in rows], np.float32).reshape(shape),
            np.array([block.indices[row] for block, row in rows], np.int64).reshape(shape),
            [block.query_ids[row] for block, row in rows],
            self.unit,
            self.higher_is_better,
            additive=self.additive,
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return one line for each query and example: query_id, train_id, rank (from 1), score (``pandas`` extra)."""
        with extra("pandas"):
            import pandas as pd
        lines = [
            (query_id, hit.id, rank, hit.score) for query_id, hits in self for rank, hit in enumerate(hits, start=1)
        ]
        return pd.DataFrame(lines, columns=["query_id", "train_id", "rank", "score"])


class _Block(NamedTuple):
    """The hits of some queries that follow each other; what `Hits` calls by the same names."""

    query_ids: list[Any]
    ids: list[list[Any]]
    indices: np.ndarray
    scores: np.ndarray


class _Zarr:
    """Positions and scores, and all ids in the attributes; a row of chunks is a block of queries."""

    def __init__(self, path: Path) -> None:
        self._path, self._seal = path, None
        try:
            self.facts = opened(dict(zarr.open_group(path, mode="r").attrs))
            self._seal = self.facts[SEAL]
            self._indices, self._scores = (zarr.open_array(path / name, mode="r") for name in ("indices", "scores"))
            self.count, self.k = self._scores.shape
            self.height = self._scores.chunks[0]
            if {self._indices.shape, self._scores.shape} != {(len(self.facts["query_ids"]), self.k)}:
                raise ValueError("its numbers are of another shape than its description")
            self._query_ids, self._train_ids = (
                [id_of(plain) for plain in self.facts[name]] for name in ("query_ids", "train_ids")
            )
        except Exception as error:  # whatever zarr makes of other files
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> MismatchError:
        try:
            now = opened(dict(zarr.open_group(self._path, mode="r").attrs))[SEAL]
        except Exception:  # whatever is left there
            now = None
        return replaced_or_damaged("hits", self._path, error, self._seal, now, _REMEDY)

    def block(self, number: int) -> _Block:
        """Those of the queries from number * height on; they were hashed together, and are compared together."""
        start = number * self.height
        try:
            indices, scores = _rows(self._indices, start, self.height), _rows(self._scores, start, self.height)
            if _block_digest(indices, scores) != self.facts["blocks"][number]:
                raise ValueError(f"those of queries {start} to {start + len(scores) - 1} are not as written")
        except Exception as error:  # whatever zarr makes of other bytes
            raise self._damaged(error) from error
        ids = [[self._train_ids[index] for index in row] for row in indices]
        return _Block(self._query_ids[start : start + len(scores)], ids, indices, scores)


class _Parquet:
    """Long form; a group of rows is a block of queries. The file stays open: another in its place changes nothing."""

    def __init__(self, path: Path) -> None:
        with extra("parquet"):
            import pyarrow.parquet as parquet
        self._path = path
        try:
            self._file = parquet.ParquetFile(path, thrift_string_size_limit=_MOST_FACTS)
            told = (self._file.metadata.metadata or {}).get(_FACTS)
        except Exception as error:  # whatever the reader makes of other files
            raise MismatchError(f"{str(path)!r} is no Parquet file of hits ({error})") from error
        if told is None:
            raise MismatchError(f"{str(path)!r} was not written by top_k(queries, k, out=path)")
        try:
            self.facts = opened(json.loads(told))
            self.k, self.height, self.count = (int(self.facts[name]) for name in ("k", "block", "count"))
            # Where the columns hold words for them, the ids themselves.
            self._query_ids, self._train_ids = (
                None if self.facts[name] is None else [id_of(plain) for plain in self.facts[name]]
                for name in ("query_ids", "train_ids")
            )
        except Exception as error:  # whatever stands in the facts
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> MismatchError:
        return replaced_or_damaged("hits", self._path, error, None, None, _REMEDY)

    def block(self, number: int) -> _Block:
        """Those of the queries from number * height on, compared as a whole."""
        try:
            table = self._file.read_row_group(number)
            words = [table.column(name).to_pylist() for name in ("query_id", "train_id")]
            rank, scores, indices = (
                np.asarray(table.column(name), kind)
                for name, kind in (("rank", np.int64), ("score", np.float32), ("train_index", np.int64))
            )
            if digest_of(*words, rank, scores, indices) != self.facts["blocks"][number]:
                raise ValueError(f"those of queries {number * self.height} and after are not as written")
        except Exception as error:  # whatever the reader makes of other bytes
            raise self._damaged(error) from error
        query_ids = words[0][:: self.k]
        if self._query_ids is not None:
            start = number * self.height
            query_ids = self._query_ids[start : start + len(query_ids)]
        train_ids = words[1]
        if self._train_ids is not None:
            train_ids = [self._train_ids[index] for index in indices]
        ids = [train_ids[start : start + self.k] for start in range(0, len(train_ids), self.k)]
        return _Block(query_ids, ids, indices.reshape(-1, self.k), scores.reshape(-1, self.k))


def write_hits(
    path: Path,
    indices: zarr.Array[Any],
    scores: zarr.Array[Any],
    facts: Mapping[str, Any],
    query_ids: Sequence[Any],
    train_ids: Sequence[Any],
    block: int,
    *,
    overwrite: bool,
) -> None:
    """Write hits in long form, as .csv, or as .parquet with a group of rows for each block of queries."""
    count, k = scores.shape

    def parts() -> Iterator[Part]:
        for start in range(0, count, block):
            yield start, _rows(indices, start, block), _rows(scores, start, block)

    if path.suffix == ".csv":
        write_scores_csv(path, parts(), query_ids, train_ids, overwrite=overwrite)
        return
    (query_words, queries_told), (train_words, train_told) = id_words(query_ids), id_words(train_ids)
    told = {
        **facts,
        "query_ids": None if queries_told else facts["query_ids"],
        "train_ids": None if train_told else facts["train_ids"],
        "k": k,
        "block": block,
        "count": count,
        "blocks": [digest_of(*columns) for columns in long_columns(parts(), query_words, train_words)],
    }
    written = {_FACTS: json.dumps(sealed(told)).encode()}
    write_scores_parquet(path, parts(), query_ids, train_ids, overwrite=overwrite, told=written)


def sealed_facts(facts: Mapping[str, Any], indices: zarr.Array[Any], scores: zarr.Array[Any]) -> dict[str, Any]:
    """The facts of hits, with hashes of them and of each block of queries, by which damage and exchange are noticed."""
    height = scores.chunks[0]
    starts = range(0, scores.shape[0], height)
    blocks = [_block_digest(_rows(indices, start, height), _rows(scores, start, height)) for start in starts]
    return sealed({**facts, "blocks": blocks})


def _rows(array: zarr.Array[Any], start: int, height: int) -> np.ndarray:
    return np.ascontiguousarray(array[start : start + height])


def _block_digest(indices: np.ndarray, scores: np.ndarray) -> str:
    return digest_of(indices.astype(np.int64, copy=False), scores.astype(np.float32, copy=False))


def is_hits_folder(folder: Path) -> bool:
    """Whether a folder holds hits that were streamed there."""
    try:
        document = json.loads((folder / "zarr.json").read_bytes())
        return bool(
            document["node_type"] == "group"
            and {"query_ids", "train_ids", "unit", "sign", "higher_is_better"} <= set(document["attributes"])
            and {entry.name for entry in folder.iterdir()} == {"zarr.json", "indices", "scores"}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
