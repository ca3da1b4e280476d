"""Scores in a zarr array, read where they are asked for; what is read is compared with what was written."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from source_proj.attribution.score_files import FACTS
from source_proj.attribution.seals import SEAL, digest_of, opened, replaced_or_damaged, sealed

__all__ = ["StoredValues", "sealed_array_facts"]

_REMEDY = "write them anew by score(queries, out=path)"


class StoredValues:
    """The values ``(Q, N)`` of scores in an array, each chunk of which has a hash in the array's attributes.

    An array without these attributes, which somebody else made, is read as it is.

    Args:
        array: the array.

    Raises:
        MismatchError: its attributes are not as they were written.
    """

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array
        self._digests: list[str] | None = None
        self._seal: str | None = None
        facts: dict[str, Any] = dict(array.attrs)
        if set(facts) >= FACTS or SEAL in facts or "blocks" in facts:
            try:
                self._digests, self._seal = opened(facts)["blocks"], facts[SEAL]
                if len(self._digests or []) != len(_chunks(array)):
                    raise ValueError("it has another shape than was written")
            except Exception as error:  # whatever stands in the attributes
                raise replaced_or_damaged("scores", self.place, error, None, None, _REMEDY) from error

    @property
    def array(self) -> zarr.Array[Any]:
        """The array itself."""
        return self._array

    @property
    def place(self) -> str:
        """Where the array is, for people."""
        root = getattr(self._array.store, "root", None)
        return str(self._array.store_path) if root is None else str(Path(root) / self._array.path)

    @property
    def shape(self) -> tuple[int, int]:
        """``(Q, N)``."""
        queries, rows = self._array.shape
        return queries, rows

    @property
    def height(self) -> int:
        """Queries of a chunk."""
        return int(self._array.chunks[0])

    def __getitem__(self, index: Any) -> np.ndarray:
        """What NumPy would give; of numbers and slices, and of a list of queries, only their chunks are read."""
        parts = index if isinstance(index, tuple) else (index,)
        basic = [isinstance(part, slice | int | np.integer) and not isinstance(part, bool) for part in parts]
        if len(parts) > 2 or not all(basic):
            if len(parts) == 1 and np.ndim(parts[0]) == 1:
                rows = np.arange(self.shape[0])[parts[0]]
                return (
                    np.stack([self[int(row)] for row in rows]) if len(rows) else self._box((0, 0), (0, self.shape[1]))
                )
            whole: np.ndarray = self._box((0, self.shape[0]), (0, self.shape[1]))[index]
            return whole
        ranges = [np.arange(size)[part] for size, part in zip(self.shape, (*parts, slice(None))[:2], strict=True)]
        spans = [(int(places.min()), int(places.max()) + 1) if places.size else (0, 0) for places in ranges]
        box = self._box(*spans)
        rows, columns = (places - low for places, (low, _) in zip(ranges, spans, strict=True))
        part: np.ndarray = box[rows][..., columns]
        return part

    def _box(self, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Values of some rows and columns, from their chunks."""
        box = np.empty((rows[1] - rows[0], columns[1] - columns[0]), self._array.dtype)
        spans = [_spans(span, size) for span, size in zip((rows, columns), self._array.chunks, strict=True)]
        for (row, top, bottom), (column, left, right) in itertools.product(*spans):
            chunk = self._chunk(row, column)
            box[max(top - rows[0], 0) : bottom - rows[0], max(left - columns[0], 0) : right - columns[0]] = chunk[
                max(rows[0] - top, 0) : rows[1] - top, max(columns[0] - left, 0) : columns[1] - left
            ]
        return box

    def _chunk(self, row: int, column: int) -> np.ndarray:
        height, width = self._array.chunks
        start, left = row * height, column * width
        try:
            values = np.asarray(self._array[start : start + height, left : left + width])
            if self._digests is not None:
                wide = -(-self.shape[1] // width)
                if digest_of(values) != self._digests[row * wide + column]:
                    raise ValueError(f"those of queries {start} to {start + len(values) - 1} are not as written")
        except Exception as error:  # whatever zarr makes of other bytes
            raise replaced_or_damaged("scores", self.place, error, self._seal, self._seal_now(), _REMEDY) from error
        return values

    def _seal_now(self) -> str | None:
        """The hash of the facts in the array's place now."""
        try:
            return str(opened(dict(zarr.open_array(self._array.store, path=self._array.path, mode="r").attrs))[SEAL])
        except Exception:  # whatever is left there
            return None


def _spans(span: tuple[int, int], size: int) -> list[tuple[int, int, int]]:
    """Number, start and end of the chunks that a span touches."""
    start, stop = span
    if start >= stop:
        return []
    return [(number, number * size, (number + 1) * size) for number in range(start // size, -(-stop // size))]


def _chunks(array: zarr.Array[Any]) -> list[tuple[slice, slice]]:
    """The regions of the chunks, row by row."""
    starts = (range(0, length, size) for length, size in zip(array.shape, array.chunks, strict=True))
    height, width = array.chunks
    return [(slice(row, row + height), slice(left, left + width)) for row, left in itertools.product(*starts)]


def sealed_array_facts(facts: dict[str, Any], array: zarr.Array[Any]) -> dict[str, Any]:
    """The facts of scores, with a hash of each chunk that was written, and one of the facts."""
    return sealed({**facts, "blocks": [digest_of(np.asarray(array[region])) for region in _chunks(array)]})
