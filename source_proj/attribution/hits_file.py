"""The strongest examples of many queries in a file, read query by query."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import zarr

from source_proj._errors import MismatchError, MissingFileError, extra
from source_proj.attribution.hits import Hit, Hits
from source_proj.attribution.score_files import write_scores_csv, write_scores_parquet

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HitsFile", "is_hits_folder", "sealed_facts", "write_hits"]

_FACTS = b"source-proj"  # the key of the file's facts


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

    Raises:
        MissingFileError: there is none.
        MismatchError: it holds no hits, or was damaged; the hits themselves are compared when they are read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reader: _Parquet | _Zarr
        if self.path.is_dir() and is_hits_folder(self.path):
            self._reader = _Zarr(self.path)
        elif self.path.is_file():
            self._reader = _Parquet(self.path)
        else:
            raise MissingFileError(f"there are no hits at {str(path)!r}: write them by top_k(queries, k, out=path)")
        facts = self._reader.facts
        self.unit, self.higher_is_better = str(facts["unit"]), bool(facts["higher_is_better"])
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
        self._path = path
        try:
            self.facts: dict[str, Any] = dict(zarr.open_group(path, mode="r").attrs)
            self._indices, self._scores = (zarr.open_array(path / name, mode="r") for name in ("indices", "scores"))
            self.count, self.k = self._scores.shape
            self.height = self._scores.chunks[0]
            told, shapes = self.facts.pop("sha256"), (self._indices.shape, self._scores.shape)
            if told != _sha256(self.facts) or shapes != ((len(self.facts["query_ids"]), self.k),) * 2:
                raise ValueError("its description is not the one that was written")
        except Exception as error:  # whatever zarr makes of other files
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> MismatchError:
        return MismatchError(
            f"the hits {str(self._path)!r} are damaged ({type(error).__name__}: {str(error).splitlines()[0][:80]}): "
            "bring the folder back from a copy, or write them anew by top_k(queries, k, out=path)"
        )

    def block(self, number: int) -> _Block:
        """Those of the queries from number * height on; they were hashed together, and are compared together."""
        start, train_ids = number * self.height, self.facts["train_ids"]
        try:
            indices, scores = _rows(self._indices, start, self.height), _rows(self._scores, start, self.height)
            if _block_digest(indices, scores) != self.facts["blocks"][number]:
                raise ValueError(f"those of queries {start} to {start + len(scores) - 1} are not as written")
        except Exception as error:  # whatever zarr makes of other bytes
            raise self._damaged(error) from error
        ids = [[train_ids[index] for index in row] for row in indices]
        return _Block(self.facts["query_ids"][start : start + len(scores)], ids, indices, scores)


class _Parquet:
    """Long form; a group of rows is a block of queries."""

    def __init__(self, path: Path) -> None:
        with extra("parquet"):
            import pyarrow.parquet as parquet
        try:
            self._file = parquet.ParquetFile(path)
        except Exception as error:  # whatever the reader makes of other files
            raise MismatchError(f"{str(path)!r} is no Parquet file of hits ({error})") from error
        told = (self._file.schema_arrow.metadata or {}).get(_FACTS)
        if told is None:
            raise MismatchError(f"{str(path)!r} was not written by top_k(queries, k, out=path)")
        self.facts: dict[str, Any] = json.loads(told)
        self.k, self.height = int(self.facts["k"]), int(self.facts["block"])
        self.count = self._file.metadata.num_rows // self.k

    def block(self, number: int) -> _Block:
        """Those of the queries from number * height on."""
        columns = self._file.read_row_group(number).to_pydict()
        starts = range(0, len(columns["score"]), self.k)
        return _Block(
            [columns["query_id"][start] for start in starts],
            [columns["train_id"][start : start + self.k] for start in starts],
            np.array(columns["train_index"], np.int64).reshape(-1, self.k),
            np.array(columns["score"], np.float32).reshape(-1, self.k),
        )


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
    parts = (
        (start, np.asarray(indices[start : start + block]), np.asarray(scores[start : start + block]))
        for start in range(0, count, block)
    )
    if path.suffix == ".csv":
        write_scores_csv(path, parts, query_ids, train_ids, overwrite=overwrite)
        return
    facts = {**{name: facts[name] for name in ("unit", "sign", "higher_is_better")}, "k": k, "block": block}
    told = {_FACTS: json.dumps(facts).encode()}
    write_scores_parquet(path, parts, query_ids, train_ids, overwrite=overwrite, told=told)


def sealed_facts(facts: Mapping[str, Any], indices: zarr.Array[Any], scores: zarr.Array[Any]) -> dict[str, Any]:
    """The facts of hits, with hashes of them and of each block of queries, by which damage and exchange are noticed."""
    height = scores.chunks[0]
    starts = range(0, scores.shape[0], height)
    blocks = [_block_digest(_rows(indices, start, height), _rows(scores, start, height)) for start in starts]
    told = {**facts, "blocks": blocks}
    return {**told, "sha256": _sha256(told)}


def _rows(array: zarr.Array[Any], start: int, height: int) -> np.ndarray:
    return np.ascontiguousarray(array[start : start + height])


def _block_digest(indices: np.ndarray, scores: np.ndarray) -> str:
    digest = hashlib.sha256(indices.astype("<i8", copy=False).data)
    digest.update(scores.astype("<f4", copy=False).data)
    return digest.hexdigest()


def _sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


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
