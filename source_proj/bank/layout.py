"""The arrays of a bank: shapes, types, chunks, codecs. Made from it when written, held to it when read."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from source_proj._errors import BankError
from source_proj.bank.audits import AUDIT_BYTES
from source_proj.bank.codecs import Codec
from source_proj.bank.format import Settings

__all__ = [
    "ArraySpec",
    "PartSpec",
    "crossing_name",
    "curvature_array",
    "default_shard_rows",
    "flat_objects",
    "group_document",
    "metric_array",
    "part_arrays",
    "weights_array",
]

_SHARD_BYTES = 16 << 20
_SHARD_ROWS = 4096
_CHUNK_BYTES = 1 << 20
_WEIGHTS_BYTES = 16 << 20
_CHECKSUM = 4  # bytes of a CRC-32C
_TWIN = "twin"


@dataclass(frozen=True)
class ArraySpec:
    """One zarr array.

    ``shape[0]`` runs over rows, and file ``c.i`` holds ``height`` of them. With ``inner`` such a file is a shard of
    chunks of ``inner`` rows each.

    zstd where it pays: at level 1 it takes int8 rows of trained networks to 50 to 85 % (pure noise: 90 %), for 2 µs a
    row of 4,096 in writing and reading; floating-point rows only to 93 %, at half the reading speed.
    """

    shape: tuple[int, ...]
    dtype: str
    height: int
    inner: int | None = None
    zstd: bool = False

    @property
    def fill_value(self) -> Any:
        """What is read where nothing was written: never a value of a row; packed codes have scales, which show it."""
        return {"int8": -128, "float16": float("nan"), "float32": float("nan"), "string": ""}.get(self.dtype, 0)

    @property
    def n_shards(self) -> int:
        """Number of files."""
        return -(-self.shape[0] // self.height)

    def span(self, shard: int) -> slice:
        """Rows of a shard."""
        return slice(shard * self.height, min(self.shape[0], (shard + 1) * self.height))

    def key(self, shard: int) -> str:
        """Name of a shard's file in the array's folder."""
        return ".".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])

    @property
    def document(self) -> bytes:
        """The array's metadata, as zarr writes them."""
        return _twin(self, threading.get_ident()).document

    def encode(self, shard: int, values: np.ndarray) -> bytes:
        """Return the bytes of a shard's file."""
        twin, key = _twin(self, threading.get_ident()), f"{_TWIN}/{self.key(shard)}"
        twin.array[self.span(shard)] = values
        content: bytes = twin.files.pop(key).to_bytes()
        return content

    def decode(self, shard: int, content: bytes) -> np.ndarray:
        """Return the values of a shard's file, the caller's own.

        Raises:
            Exception: what zarr or a codec raises about damaged content, each of its own kind.
        """
        span = self.span(shard)
        if self.inner is None and not self.zstd and self.dtype != "string":  # as zarr would, many times faster
            body = memoryview(content)[:-_CHECKSUM]
            if google_crc32c.value(bytes(body)) != int.from_bytes(content[-_CHECKSUM:], "little"):
                raise ValueError("its checksum does not match")
            values = np.frombuffer(body, np.dtype(self.dtype).newbyteorder("<")).reshape(-1, *self.shape[1:])
            return values[: span.stop - span.start].astype(self.dtype)
        twin, key = _twin(self, threading.get_ident()), f"{_TWIN}/{self.key(shard)}"
        twin.files[key] = Buffer.from_bytes(content)
        try:
            return np.asarray(twin.array[span])
        finally:
            del twin.files[key]

    def size_range(self, shard: int) -> tuple[int, int]:
        """The fewest and the most bytes that a shard's file can have, known before it is read."""
        span, rows = self.span(shard), self.inner or self.height
        if self.dtype == "string":  # a count, and each string with its length before it
            return 4 + 4 * rows + _CHECKSUM, sys.maxsize
        chunk = rows * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize
        written = -(-(span.stop - span.start) // rows)
        index = 0 if self.inner is None else 16 * (self.height // self.inner) + _CHECKSUM
        # zstd's smallest: a block of 128 KiB in 4 bytes; its largest: 1/256 more than it is given.
        low, high = (chunk >> 15, chunk + (chunk >> 8) + 256) if self.zstd else (chunk, chunk)
        return written * (low + _CHECKSUM) + index, written * (high + _CHECKSUM) + index

    def difference(self, document: bytes) -> str | None:
        """Say how an array's metadata differ from these, if they do.

        Raises:
            Exception: what zarr raises about metadata that are none.
        """
        if _without_attributes(json.loads(document)) == _without_attributes(json.loads(self.document)):
            return None  # and save zarr the parsing
        store = MemoryStore({"zarr.json": Buffer.from_bytes(document)})
        there = zarr.open_array(store, mode="r", zarr_format=3).metadata.to_dict()
        wanted = _twin(self, threading.get_ident()).array.metadata.to_dict()
        wrong = [
            f"{key} is {there.get(key)!r} and must be {wanted[key]!r}"
            for key in wanted
            if key != "attributes" and there.get(key) != wanted[key]
        ]
        return "; ".join(wrong) or None


class _Twin(NamedTuple):
    """An empty array in memory, the dict where its files appear, and its metadata."""

    array: zarr.Array[Any]
    files: dict[str, Any]
    document: bytes


@lru_cache(maxsize=256)
def _twin(spec: ArraySpec, thread: int) -> _Twin:  # noqa: ARG001 (one a thread: files of one name must not meet)
    files: dict[str, Any] = {}
    rest = spec.shape[1:]
    array = zarr.create_group(MemoryStore(files)).create_array(
        _TWIN,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=(spec.inner or spec.height, *rest),
        shards=None if spec.inner is None else (spec.height, *rest),
        compressors=[ZstdCodec(level=1), Crc32cCodec()] if spec.zstd else [Crc32cCodec()],
        fill_value=spec.fill_value,
        chunk_key_encoding={"name": "default", "separator": "."},  # one folder an array
        config={"write_empty_chunks": True},
    )
    return _Twin(array, files, files[f"{_TWIN}/zarr.json"].to_bytes())


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The metadata of a group, as zarr writes them."""
    files: dict[str, Any] = {}
    zarr.create_group(MemoryStore(files), attributes=dict(attributes))
    content: bytes = files["zarr.json"].to_bytes()
    return content


@dataclass(frozen=True)
class PartSpec:
    """One part of a stage's rows; its attributes in the bank.

    Attributes:
        start: rows of the stage before it.
        n: its rows.
        batch_size: examples a batch.
        shard_rows: rows a shard, a multiple of the batch size.
        id_type: "int64" or "string".
    """

    start: int
    n: int
    batch_size: int
    shard_rows: int
    id_type: str

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> PartSpec:
        """Read the attributes back.

        Raises:
            BankError: they are not those of a part.
        """
        names = ["start", "n", "batch_size", "shard_rows", "id_type"]
        if sorted(entries) != sorted(names):
            raise BankError(f"its attributes are {sorted(entries)}, and must be {sorted(names)}")
        numbers = [entries[name] for name in names[:4]]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise BankError(f"its start, n, batch_size and shard_rows are {numbers}, and must be integers")
        spec = cls(**entries)
        if spec.start < 0 or min(spec.n, spec.batch_size, spec.shard_rows) < 1:
            raise BankError(f"its start, n, batch_size and shard_rows are {numbers}, out of range")
        if spec.shard_rows % spec.batch_size:
            raise BankError(f"its shard_rows {spec.shard_rows} is no multiple of its batch_size {spec.batch_size}")
        if spec.id_type not in ("int64", "string"):
            raise BankError(f"its id_type is {spec.id_type!r}, and must be 'int64' or 'string'")
        return spec

    def to_json(self) -> dict[str, Any]:
        """The part's attributes."""
        return asdict(self)

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-self.n // self.shard_rows)

    def span(self, shard: int) -> tuple[int, int]:
        """First row and end of a shard, counted within the part."""
        return shard * self.shard_rows, min(self.n, (shard + 1) * self.shard_rows)


def default_shard_rows(n: int, batch_size: int, settings: Settings, wanted: int | None = None) -> int:
    """Rows a shard: of 16 MiB and 4,096 rows at most, but a batch at least; no more than the rows there are.

    Raises:
        ValueError: the wanted number is no multiple of the batch size.
    """
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
        raise ValueError(f"shard_rows must be an integer of at least 1, got {wanted!r}")
    if wanted is not None and wanted % batch_size:
        raise ValueError(
            f"shard_rows must be a multiple of the batch size {batch_size}, got {wanted}; "
            f"give {max(1, wanted // batch_size) * batch_size}"
        )
    rows = wanted or max(1, min(_SHARD_ROWS, _SHARD_BYTES // settings.row_bytes) // batch_size) * batch_size
    return min(rows, -(-n // batch_size) * batch_size)


def part_arrays(
    settings: Settings, stage: int, part: PartSpec
) -> tuple[ArraySpec, ArraySpec, list[dict[str, ArraySpec]], list[ArraySpec]]:
    """Return a part's arrays: ids, seal, and by checkpoint its data by name in order of the marks, and the marks."""
    ids = ArraySpec((part.n,), part.id_type, part.n)
    seal = ArraySpec((2, 32), "uint8", 2)
    run = settings.trajectory
    count = len(run.stages[stage].checkpoints)
    data = [_checkpoint_arrays(settings, part, run.crossed_metrics(stage, c)) for c in range(count)]
    marks = [ArraySpec((part.n_shards, len(arrays), 32), "uint8", 1) for arrays in data]
    return ids, seal, data, marks


def crossing_name(name: str, metric: int) -> str:
    """Name of the array that holds in another metric what the array ``name`` holds in the checkpoint's own."""
    return f"{name}_metric_{metric}"


def _checkpoint_arrays(settings: Settings, part: PartSpec, crossed: Sequence[int]) -> dict[str, ArraySpec]:
    n, height, draws = part.n, part.shard_rows, settings.sampled_fisher
    numbers = ArraySpec((n,), "float32", height)
    data = {"rows": _rows(settings, settings.codec, n, height)}
    if settings.codec.has_scale:
        data["scale"] = numbers
    data["d1"] = numbers
    if settings.second_derivative:
        data["d2"] = numbers
    if settings.fisher_weight:
        data["fisher_weight"] = numbers
    data["batch_hashes"] = ArraySpec((-(-n // part.batch_size), 32), "uint8", height // part.batch_size)
    data["audit"] = ArraySpec((part.n_shards, AUDIT_BYTES), "uint8", 1)
    if draws:
        data["fisher_rows"] = _rows(settings, settings.sampled_codec, n * draws, height * draws)
        if settings.sampled_codec.has_scale:
            data["fisher_scale"] = ArraySpec((n * draws,), "float32", height * draws)
    again = [name for name in ("rows", "scale", "fisher_rows", "fisher_scale") if name in data]
    return data | {crossing_name(name, metric): data[name] for metric in crossed for name in again}


def flat_objects(node: str, spec: ArraySpec, values: np.ndarray) -> dict[str, bytes]:
    """A whole array of one axis as the objects to write."""
    shards = {f"{node}/{spec.key(i)}": spec.encode(i, values[spec.span(i)]) for i in range(spec.n_shards)}
    return {**shards, f"{node}/zarr.json": spec.document}


def metric_array(count: int) -> ArraySpec:
    """The diagonal of a metric."""
    return ArraySpec((count,), "float32", min(count, _WEIGHTS_BYTES // 4))


def curvature_array(count: int) -> ArraySpec:
    """The entries of a captured segment's Ĥ."""
    return metric_array(count)


def weights_array(count: int) -> ArraySpec:
    """The bytes of a safetensors file."""
    return ArraySpec((count,), "uint8", min(count, _WEIGHTS_BYTES))


def _without_attributes(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "attributes"}


def _rows(settings: Settings, codec: Codec, n: int, height: int) -> ArraySpec:
    k = int(settings.sketch["dim"])
    inner = _inner(n, height, codec.row_bytes(k))
    return ArraySpec((n, codec.width(k)), codec.array_type, height, inner, codec.compressible)


def _inner(n: int, height: int, row_bytes: int) -> int:
    """Rows a chunk: the largest divisor of the shard's that fits 1 MiB and pads the last chunk by 1 % of n at most."""
    fitting = max(1, min(height, _CHUNK_BYTES // row_bytes))
    return next(c for c in range(fitting, 0, -1) if height % c == 0 and (c == 1 or -n % c <= n / 100))
