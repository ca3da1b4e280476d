"""The arrays of a bank: shapes, types, chunks, codecs. Made from it when written, held to it when read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from source_proj._errors import BankError
from source_proj.bank.format import Settings
from source_proj.bank.quantize import has_scale

__all__ = [
    "ArraySpec",
    "PartSpec",
    "crossing_name",
    "default_shard_rows",
    "metric_array",
    "part_arrays",
    "weights_array",
]

_SHARD_BYTES = 16 << 20
_SHARD_ROWS = 4096
_CHUNK_BYTES = 1 << 20
_WEIGHTS_BYTES = 16 << 20


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
        """What is read where nothing was written: never a value of a row."""
        return {"int8": -128, "float16": float("nan"), "float32": float("nan"), "string": ""}.get(self.dtype, 0)

    @cached_property
    def twin(self) -> tuple[zarr.Array[Any], dict[str, Any]]:
        """An empty array of this kind in memory, and the dict where its files appear."""
        files: dict[str, Any] = {}
        return self.create(zarr.create_group(MemoryStore(files)), "twin"), files

    def create(self, group: zarr.Group, name: str) -> zarr.Array[Any]:
        """Create the array in a group."""
        rest = self.shape[1:]
        compressors = [ZstdCodec(level=1), Crc32cCodec()] if self.zstd else [Crc32cCodec()]
        return group.create_array(
            name,
            shape=self.shape,
            dtype=self.dtype,
            chunks=(self.inner or self.height, *rest),
            shards=None if self.inner is None else (self.height, *rest),
            compressors=compressors,
            fill_value=self.fill_value,
            chunk_key_encoding={"name": "default", "separator": "."},  # one folder an array
            config={"write_empty_chunks": True},
        )

    def span(self, shard: int) -> slice:
        """Rows of a shard."""
        return slice(shard * self.height, min(self.shape[0], (shard + 1) * self.height))

    def key(self, shard: int) -> str:
        """Name of a shard's file in the array's folder."""
        return ".".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])

    def encode(self, shard: int, values: np.ndarray) -> bytes:
        """Return the bytes of a shard's file."""
        # In memory first, so that the file can be flushed before it gets its name: zarr's own store renames first.
        array, files = self.twin
        array[self.span(shard)] = values
        content: bytes = files.pop(f"twin/{self.key(shard)}").to_bytes()
        return content

    def is_spelled(self, document: Mapping[str, Any]) -> bool:
        """Whether a metadata document is, but for attributes, the very one that this zarr writes for these."""
        return _without_attributes(document) == _document(self)

    def difference(self, array: zarr.Array[Any]) -> str | None:
        """Say how an array's metadata differ from these, if they do."""
        expected, found = self.twin[0].metadata.to_dict(), array.metadata.to_dict()
        wrong = [
            f"{key} is {found.get(key)!r} and must be {expected[key]!r}"
            for key in expected
            if key != "attributes" and found.get(key) != expected[key]
        ]
        return "; ".join(wrong) or None


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
    def from_json(cls, found: Mapping[str, Any]) -> PartSpec:
        """Read the attributes back.

        Raises:
            BankError: they are not those of a part.
        """
        names = ["start", "n", "batch_size", "shard_rows", "id_type"]
        if sorted(found) != sorted(names):
            raise BankError(f"its attributes are {sorted(found)}, and must be {sorted(names)}")
        numbers = [found[name] for name in names[:4]]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in numbers):
            raise BankError(f"its start, n, batch_size and shard_rows are {numbers}, and must be integers")
        spec = cls(**found)
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
    row_bytes = settings.sketch["dim"] * np.dtype(settings.storage).itemsize * max(1, settings.sampled_fisher)
    rows = wanted or max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes) // batch_size) * batch_size
    return min(rows, -(-n // batch_size) * batch_size)


def part_arrays(
    settings: Settings, stage: int, part: PartSpec
) -> tuple[ArraySpec, ArraySpec, list[dict[str, ArraySpec]], list[ArraySpec]]:
    """Return a part's arrays: ids, seal, and by checkpoint its data by name in order of the marks, and the marks."""
    ids = ArraySpec((part.n,), part.id_type, part.n, zstd=True)
    seal = ArraySpec((2, 32), "uint8", 2)
    run = settings.trajectory
    count = len(run.stages[stage].checkpoints)
    data = [_checkpoint_arrays(settings, part, run.crossed_metrics(stage, c)) for c in range(count)]
    marks = [ArraySpec((part.n_shards, len(one), 32), "uint8", 1) for one in data]
    return ids, seal, data, marks


def crossing_name(name: str, metric: int) -> str:
    """Name of the array that holds in another metric what the array ``name`` holds in the checkpoint's own."""
    return f"{name}_metric_{metric}"


def _checkpoint_arrays(settings: Settings, part: PartSpec, crossed: Sequence[int]) -> dict[str, ArraySpec]:
    n, height, draws = part.n, part.shard_rows, settings.sampled_fisher
    numbers = ArraySpec((n,), "float32", height)
    data = {"rows": _rows(settings, n, height)}
    if has_scale(settings.storage):
        data["scale"] = numbers
    data["d1"] = numbers
    if settings.second_derivative:
        data["d2"] = numbers
    data["batch_hashes"] = ArraySpec((-(-n // part.batch_size), 32), "uint8", height // part.batch_size)
    if draws:
        data["fisher_rows"] = _rows(settings, n * draws, height * draws)
        if has_scale(settings.storage):
            data["fisher_scale"] = ArraySpec((n * draws,), "float32", height * draws)
    again = [name for name in ("rows", "scale", "fisher_rows", "fisher_scale") if name in data]
    return data | {crossing_name(name, metric): data[name] for metric in crossed for name in again}


def metric_array(count: int) -> ArraySpec:
    """The diagonal of a metric."""
    return ArraySpec((count,), "float32", min(count, _WEIGHTS_BYTES // 4))


def weights_array(count: int) -> ArraySpec:
    """The bytes of a safetensors file."""
    return ArraySpec((count,), "uint8", min(count, _WEIGHTS_BYTES))


@lru_cache(maxsize=256)
def _document(spec: ArraySpec) -> dict[str, Any]:
    files: dict[str, Any] = {}
    spec.create(zarr.create_group(MemoryStore(files)), "twin")
    return _without_attributes(json.loads(files["twin/zarr.json"].to_bytes()))


def _without_attributes(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "attributes"}


def _rows(settings: Settings, n: int, height: int) -> ArraySpec:
    k = int(settings.sketch["dim"])
    row_bytes = k * np.dtype(settings.storage).itemsize
    return ArraySpec((n, k), settings.storage, height, _inner(n, height, row_bytes), settings.storage == "int8")


def _inner(n: int, height: int, row_bytes: int) -> int:
    """Rows a chunk: the largest divisor of the shard's that fits 1 MiB and pads the last chunk by 1 % of n at most."""
    fitting = max(1, min(height, _CHUNK_BYTES // row_bytes))
    return next(c for c in range(fitting, 0, -1) if height % c == 0 and (c == 1 or -n % c <= n / 100))
