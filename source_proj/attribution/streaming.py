"""Scores and hits of any number of queries, streamed to the disk by blocks of queries.

Blocks are committed one by one in a folder beside the output, which gets its name when it is whole. Whoever asks the
same again after a kill goes on from there: a block counts as done if all that its scores depend on is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from source_proj._errors import extra, full_disk_named
from source_proj._io.files import sync_folder
from source_proj._io.outputs import local_path, name_folder, require_free
from source_proj._io.progress import Bar, Progress, progress_bar
from source_proj._io.unfinished import Unfinished
from source_proj.attribution.features import SketchedQueries
from source_proj.attribution.hits import checked_count
from source_proj.attribution.hits_file import is_hits_folder, sealed_facts, write_hits
from source_proj.attribution.products import Term
from source_proj.attribution.score_files import is_scores_array
from source_proj.attribution.stored_values import sealed_array_facts
from source_proj.bank import Bank

__all__ = ["QueryBlocks", "checked_out", "queries_per_block", "stream_hits", "stream_scores"]

_CHUNK = (64, 16_384)  # queries and examples of a chunk, 4 MiB
_BLOCK_BYTES = 256 << 20  # of a block's features
_MOST_QUERIES = 2048
_AGAIN = "ask the same again, which goes on with the blocks that are done"

_FOLDERS = {"scores": is_scores_array, "hits": is_hits_folder}
_ENDINGS = {"scores": (".zarr",), "hits": (".parquet", ".zarr")}


@dataclass(frozen=True)
class QueryBlocks:
    """The features of any number of queries, block by block.

    Attributes:
        count: Q, the number of queries.
        size: queries of a block.
        passes: passes over a block's queries that making its features takes; 0 where they were given.
        features: makes those of a span of queries, and tells what it does as a :data:`Progress` does.
    """

    count: int
    size: int
    passes: int
    features: Callable[[tuple[int, int], Progress], SketchedQueries]


class Streamable(Protocol):
    """What is asked of an attribution method; see `Attributor`."""

    banks: tuple[Bank, ...]
    progress: Progress

    @property
    def n_rows(self) -> int: ...

    def query_blocks(self, queries: Any) -> QueryBlocks: ...

    def all_terms(self, features: SketchedQueries) -> list[Term]: ...

    def blocks(self, terms: list[Term], count: int) -> Iterator[tuple[int, int, Tensor]]: ...

    def strongest_of(
        self, terms: list[Term], count: int, k: int, *, highest: bool
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def facts_of(self, query_ids: Sequence[Any]) -> dict[str, Any]: ...


def checked_out(out: str | Path, what: str, *, overwrite: bool, more: tuple[str, ...] = (), name: str = "out") -> Path:
    """The path that "scores" or "hits" are streamed to, refused before any work is done for them.

    Args:
        out: the path.
        what: one of the two.
        overwrite: replace what is there.
        more: endings besides those that can be read back.
        name: of the argument, for messages.

    Raises:
        ValueError: they are not written to such an ending.
        FileExistsError: something is there that may not be overwritten.
        ImportError: without pyarrow (extra ``parquet``), where it is needed.
    """
    path, endings = local_path(out), (*_ENDINGS[what], *more)
    if path.suffix not in endings:
        raise ValueError(f"{name} of {what} must end in {' or '.join(endings)}, got {str(out)!r}")
    if path.suffix == ".parquet":
        with extra("parquet"):
            import pyarrow  # noqa: F401 (which writes at the end)
    require_free(path, overwrite=overwrite, replaceable=_FOLDERS[what] if path.suffix == ".zarr" else Path.is_file)
    return path


def queries_per_block(batch_size: int, bytes_per_query: int) -> int:
    """Queries of a block: whole batches, so that their gradients are the same as those of all at once."""
    most = min(_MOST_QUERIES, _BLOCK_BYTES // max(1, bytes_per_query))
    return max(1, most // batch_size) * batch_size


def stream_scores(
    method: Streamable, queries: Any, path: Path, *, overwrite: bool
) -> tuple[zarr.Array[Any], list[Any]]:
    """Write scores ``(Q, N)`` to a zarr array; return it, and the ids of the queries."""
    blocks = method.query_blocks(queries)
    count, size = blocks.count, blocks.size
    ids: list[Any] = []
    with full_disk_named(path, _AGAIN), Unfinished(path, _description("scores", method, count, size)) as made:
        array = _array(made.content, (count, method.n_rows), np.dtype(np.float32))
        for number, features in enumerate(_features(blocks, method.progress)):
            ids += features.ids
            terms = method.all_terms(features)
            digest = _digest(method, features, (term.query for term in terms))
            if not made.is_done(number, digest):
                made.begin(number)
                first = number * size
                for start, stop, values in _wide(method.blocks(terms, len(features.ids)), len(features.ids)):
                    array[first : first + len(values), start:stop] = values
                _sync_rows(made.content, first, len(features.ids))
                made.commit(number, digest)
        array.update_attributes(sealed_array_facts(method.facts_of(ids), array))
        sync_folder(made.content)
        name_folder(made.content, path, overwrite=overwrite, replaceable=is_scores_array)
    return zarr.open_array(path, mode="r"), ids


def stream_hits(method: Streamable, queries: Any, k: int, path: Path, *, highest: bool, overwrite: bool) -> int:
    """Write the k strongest examples of each query, in long form (.parquet, .csv) or as positions and scores (.zarr).

    Returns:
        Q, the number of queries.
    """
    k, blocks = checked_count(k, method.n_rows), method.query_blocks(queries)
    count, size = blocks.count, blocks.size
    ids: list[Any] = []
    description = {**_description("hits", method, count, size), "k": k, "highest": highest}
    with full_disk_named(path, _AGAIN), Unfinished(path, description) as made:
        group = zarr.open_group(made.content, mode="a")
        indices = _array(made.content / "indices", (count, k), np.dtype(np.int64), fill=-1)
        scores = _array(made.content / "scores", (count, k), np.dtype(np.float32))
        for number, features in enumerate(_features(blocks, method.progress)):
            ids += features.ids
            terms = method.all_terms(features)
            digest = _digest(method, features, (term.query for term in terms))
            if not made.is_done(number, digest):
                made.begin(number)
                rows = slice(number * size, number * size + len(features.ids))
                values, where = method.strongest_of(terms, len(features.ids), k, highest=highest)
                indices[rows], scores[rows] = where, values
                for name in ("indices", "scores"):
                    _sync_rows(made.content / name, rows.start, len(features.ids))
                made.commit(number, digest)
        facts = method.facts_of(ids)
        if path.suffix == ".zarr":
            group.update_attributes(sealed_facts(facts, indices, scores))
            sync_folder(made.content)
            name_folder(made.content, path, overwrite=overwrite, replaceable=is_hits_folder)
        else:
            write_hits(path, indices, scores, facts, ids, method.banks[0].ids, size, overwrite=overwrite)
    return count


def _features(blocks: QueryBlocks, progress: Progress) -> Iterator[SketchedQueries]:
    """Features of block after block; a bar for all queries counts a block when the next one is asked for."""
    with progress_bar(progress, "queries", blocks.count, "queries") as bar:
        for start in range(0, blocks.count, blocks.size):
            stop = min(blocks.count, start + blocks.size)
            yield blocks.features((start, stop), _Passes(bar, start, stop, blocks.passes))
            bar.update(stop - bar.done)


class _Passes:
    """Moves the bar of all queries while a block's are passed over; the last share of the way is left for its scores.

    Args:
        bar: counts queries.
        start: first query of the block.
        stop: its end.
        passes: over its queries.
    """

    def __init__(self, bar: Bar, start: int, stop: int, passes: int) -> None:
        self._bar, self._start, self._stop, self._passes = bar, start, stop, passes
        self._whole = 0  # passes that are over

    def __call__(self, _: str, done: int, total: int) -> None:
        way = min(self._whole + done / total, self._passes) / (self._passes + 1)
        self._whole += done == total
        steps = self._start + int(way * (self._stop - self._start)) - self._bar.done
        if steps > 0:  # a pass that is made again moves nothing
            self._bar.update(steps)


def _description(what: str, method: Streamable, count: int, size: int) -> dict[str, Any]:
    banks = [bank.fingerprint for bank in method.banks]
    return {"what": what, "banks": banks, "queries": count, "examples": method.n_rows, "block": size}


def _digest(method: Streamable, features: SketchedQueries, queries: Iterator[Tensor]) -> str:
    """SHA-256, in hex, of what a block's scores depend on besides the banks: queries as training rows meet them."""
    digest = hashlib.sha256(json.dumps([type(method).__name__, repr(features.ids)]).encode())
    for query in queries:
        digest.update(query.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _array(folder: Path, shape: tuple[int, int], dtype: np.dtype[Any], fill: float = np.nan) -> zarr.Array[Any]:
    """The array in a folder, made where it is missing; a chunk that gets lost reads as what no chunk holds."""
    if (folder / "zarr.json").is_file():
        return zarr.open_array(folder, mode="r+")
    chunks = (min(max(shape[0], 1), _CHUNK[0]), min(shape[1], _CHUNK[1]))  # of no queries, too
    return zarr.create_array(
        str(folder), shape=shape, dtype=dtype, chunks=chunks, compressors=[Crc32cCodec()], fill_value=fill,
        overwrite=True,
    )  # fmt: skip


def _wide(blocks: Iterator[tuple[int, int, Tensor]], count: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Blocks of scores ``(Q, n)`` put together to whole chunks, so that each chunk is written once."""
    wide, begin, end = np.empty((count, 0), np.float32), 0, 0
    for start, stop, values in blocks:
        if start > end:  # rows that no term covers score 0
            wide = np.concatenate([wide, np.zeros((count, start - end), np.float32)], axis=1)
        wide, end = np.concatenate([wide, values.numpy()], axis=1), stop
        whole = wide.shape[1] // _CHUNK[1] * _CHUNK[1]
        if whole:
            yield begin, begin + whole, wide[:, :whole]
            wide, begin = wide[:, whole:], begin + whole
    if wide.shape[1]:
        yield begin, end, wide


def _sync_rows(folder: Path, first: int, count: int) -> None:
    """Return when the chunks of some rows are on the disk."""
    height = zarr.open_array(folder, mode="r").chunks[0]
    for place in range(first // height, -(-(first + count) // height)):
        if (folder / "c" / str(place)).is_dir():
            sync_folder(folder / "c" / str(place))
