"""One part of a stage's rows on disk: what is committed, how shards are read and committed, its seal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from source_proj._errors import BankError, MismatchError
from source_proj._io.files import write_files
from source_proj.bank.format import Settings, canonical, sha256
from source_proj.bank.layout import ArraySpec, PartSpec, part_arrays

__all__ = ["Part", "create_part", "read_array"]


class Part:
    """A part of a bank.

    Args:
        bank: the bank's folder.
        stage: index of the stage.
        index: index of the part within its stage.
        settings: the bank's settings.

    Raises:
        BankError: its metadata are missing or not those of the format; says what was found.
    """

    def __init__(self, bank: Path, stage: int, index: int, settings: Settings) -> None:
        self.bank = bank
        self.name = f"stage_{stage}/part_{index}"
        self.stage_name: str = settings.trajectory.stages[stage].name
        self.steps = list(settings.trajectory.stages[stage].steps)
        self.hashes = [checkpoint.hash for checkpoint in settings.trajectory.stages[stage].checkpoints]
        self._settings = settings
        group = open_node(bank, self.name)
        if not isinstance(group, zarr.Group):
            raise BankError(f"{bank / self.name} is a zarr array and must be a group")
        try:
            self.spec = PartSpec.from_json(group.attrs.asdict())
        except BankError as error:
            raise BankError(f"{bank / self.name} is no part of a bank: {error}") from error
        ids, seal, self._data, marks = part_arrays(settings, stage, self.spec)
        self._specs = {"ids": ids, "seal": seal}
        for checkpoint in range(len(self.steps)):
            for name, spec in {**self._data[checkpoint], "committed": marks[checkpoint]}.items():
                self._specs[f"checkpoint_{checkpoint}/{name}"] = spec
        self._opened: dict[str, zarr.Array[Any]] = {}
        for name in self._specs:
            self._check(name)
        self.ids: list[Any] = read_array(self._array("ids"), slice(None), self.path / "ids").tolist()

    @property
    def path(self) -> Path:
        """The part's folder."""
        return self.bank / self.name

    @property
    def n_checkpoints(self) -> int:
        """Number of checkpoints of the stage."""
        return len(self.steps)

    def data(self, checkpoint: int) -> Mapping[str, ArraySpec]:
        """The arrays of a checkpoint by name, in order of the marks."""
        return self._data[checkpoint]

    def arrays(self) -> Mapping[str, ArraySpec]:
        """All arrays of the part by their names in it."""
        return self._specs

    def file(self, checkpoint: int, name: str, shard: int) -> Path:
        """The file of a shard of an array."""
        relative = f"checkpoint_{checkpoint}/{name}"
        return self.path / relative / self._specs[relative].key(shard)

    def place(self, checkpoint: int, shard: int) -> str:
        """Say in words where a shard belongs."""
        start, stop = self.spec.span(shard)
        rows = f"rows {self.spec.start + start} to {self.spec.start + stop - 1}"
        return f"shard {shard} ({rows}) of stage {self.stage_name!r} at the checkpoint of step {self.steps[checkpoint]}"

    # Reading ---------------------------------------------------------------------------------------------------

    def read(self, checkpoint: int, name: str, shard: int) -> np.ndarray:
        """Read a shard of an array.

        Raises:
            BankError: its file is missing, truncated or altered; names the file and the rows.
        """
        file = self.file(checkpoint, name, shard)
        if not file.is_file() or not file.stat().st_size:  # zarr would read the fill value from either
            state = "truncated to nothing" if file.is_file() else "missing"
            raise BankError(f"{file} is {state}: {self.place(checkpoint, shard)}")
        span = self._data[checkpoint][name].span(shard)
        array = self._array(f"checkpoint_{checkpoint}/{name}")
        return read_array(array, span, file, lambda: self.place(checkpoint, shard))

    def marks(self, checkpoint: int) -> np.ndarray:
        """Read the commit marks ``(shards, arrays, 32)`` uint8, as they are on disk now."""
        name = f"checkpoint_{checkpoint}/committed"
        return read_array(self._array(name), slice(None), self.path / name)

    def mark(self, checkpoint: int, shard: int) -> np.ndarray:
        """Read one commit mark ``(arrays, 32)`` uint8."""
        array = self._array(f"checkpoint_{checkpoint}/committed")
        mark: np.ndarray = read_array(array, slice(shard, shard + 1), self.file(checkpoint, "committed", shard))[0]
        return mark

    def done(self, checkpoint: int) -> np.ndarray:
        """Which shards of a checkpoint are committed, ``(shards,)`` bool."""
        return np.asarray(self.marks(checkpoint).any(axis=(1, 2)))

    def missing(self) -> list[str]:
        """Say in words which shards are not committed."""
        return [
            self.place(checkpoint, int(shard))
            for checkpoint in range(self.n_checkpoints)
            for shard in np.flatnonzero(~self.done(checkpoint))
        ]

    # Writing ---------------------------------------------------------------------------------------------------

    def commit(self, checkpoint: int, shard: int, content: Mapping[str, np.ndarray]) -> None:
        """Put a shard's arrays on the disk, and then its mark.

        Raises:
            BankError: they cannot be written; nothing that was committed is harmed.
        """
        data = self._data[checkpoint]
        mark = np.stack([content_digest(content[name]) for name in data])[None]
        spec = self._specs[f"checkpoint_{checkpoint}/committed"]
        try:
            write_files({self.file(checkpoint, name, shard): data[name].encode(shard, content[name]) for name in data})
            write_files({self.file(checkpoint, "committed", shard): spec.encode(shard, mark)})
        except OSError as error:
            if self._is_done(checkpoint, shard):
                return  # by another process, which finished the part and removed what it took for a leftover
            raise BankError(
                f"cannot write {self.place(checkpoint, shard)} to {self.bank}: {error}. What was committed is whole: "
                "make room (or lift the limit) and call build again to go on from there"
            ) from error

    def check_hashes(self, checkpoint: int, shard: int, hashes: np.ndarray) -> None:
        """Compare the hashes ``(m, 32)`` of a shard's batches with those of another checkpoint that is committed.

        Raises:
            MismatchError: they differ, so the data set gave other examples.
        """
        for other in range(self.n_checkpoints):
            if other != checkpoint and self._is_done(other, shard):
                self._compare_hashes(checkpoint, shard, hashes, other)
                return

    def check_data(self, shard: int, hashes: np.ndarray) -> None:
        """Compare the hashes of a shard's batches with those of any committed checkpoint.

        Raises:
            MismatchError: the data set gave other examples.
        """
        self.check_hashes(-1, shard, hashes)

    def _is_done(self, checkpoint: int, shard: int) -> bool:
        return self.file(checkpoint, "committed", shard).is_file()

    def _compare_hashes(self, checkpoint: int, shard: int, hashes: np.ndarray, other: int) -> None:
        stored = self.read(other, "batch_hashes", shard)
        different = np.flatnonzero((stored != hashes).any(axis=1))
        if not len(different):
            return
        batch = int(different[0])
        start = self.spec.span(shard)[0] + batch * self.spec.batch_size
        stop = min(self.spec.n, start + self.spec.batch_size)
        now = "now" if checkpoint < 0 else f"at the checkpoint of step {self.steps[checkpoint]}"
        raise MismatchError(
            f"the data of stage {self.stage_name!r} differ in {len(different)} of {len(hashes)} batches of shard "
            f"{shard}, first in that of ids {self.ids[start]!r} to {self.ids[stop - 1]!r}: hash "
            f"{hashes[batch].tobytes().hex()[:16]} {now}, {stored[batch].tobytes().hex()[:16]} at that of step "
            f"{self.steps[other]}. Every pass must see the same examples in the same order: switch off shuffling and "
            "random augmentation, or build another bank"
        )

    # Seal ------------------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Declare the part complete.

        Raises:
            BankError: shards are missing; lists them.
            MismatchError: the data differ between checkpoints.
        """
        missing = self.missing()
        if missing:
            raise BankError(f"{self.bank} lacks {listed(missing)}: build them, then finalize again")
        for shard in range(self.spec.n_shards):
            hashes = self.read(0, "batch_hashes", shard)
            for checkpoint in range(1, self.n_checkpoints):
                self._compare_hashes(0, shard, hashes, checkpoint)
        spec = self._specs["seal"]
        values = np.frombuffer(self.content_hash() + self.metadata_hash(), np.uint8).reshape(2, 32)
        try:
            write_files({self.path / "seal" / spec.key(0): spec.encode(0, values)})
        except OSError as error:
            if self.sealed() is None:  # else another process did it, and removed what it took for a leftover
                raise BankError(f"cannot finalize the bank {self.bank}: {error}; make room, then try again") from error

    def sealed(self) -> tuple[bytes, bytes] | None:
        """Return the seal, content hash and metadata hash, as it is on disk now; None before the part is sealed."""
        if not (self.path / "seal" / self._specs["seal"].key(0)).is_file():
            return None
        values = read_array(self._array("seal"), slice(None), self.path / "seal")
        return (values[0].tobytes(), values[1].tobytes()) if values.any() else None

    def content_hash(self) -> bytes:
        """Hash all that the part's rows are: settings, attributes, ids, marks."""
        marks = [self.marks(checkpoint).tobytes() for checkpoint in range(self.n_checkpoints)]
        numbers = self.spec.id_type == "int64"
        ids = np.array(self.ids, dtype="<i8").tobytes() if numbers else canonical(self.ids)
        return sha256(canonical([self._settings.identity(), self.name, self.spec.to_json()]), ids, *marks)

    def metadata_hash(self) -> bytes:
        """Hash the metadata of the root, the weights, the stage and the part.

        Raises:
            BankError: some cannot be read.
        """
        weights = self.bank / "weights"
        files = [self.bank / "zarr.json", self.path.parent / "zarr.json"]
        files += sorted(weights.rglob("zarr.json")) + sorted((self.bank / "metrics").rglob("zarr.json"))
        files += sorted(self.path.rglob("zarr.json"))
        found = []
        for file in files:
            try:
                document = dict(json.loads(file.read_bytes()))
            except (OSError, TypeError, ValueError) as error:
                raise BankError(f"the metadata {file} cannot be read: {error}") from error
            document.pop("consolidated_metadata", None)  # a copy that users may add to the root
            found.append([file.relative_to(self.bank).as_posix(), document])
        return sha256(canonical(found))

    def _check(self, name: str) -> None:
        """Hold an array's metadata to the layout."""
        file, spec = self.path / name / "zarr.json", self._specs[name]
        try:
            if spec.is_spelled(json.loads(file.read_bytes())):
                return  # and save zarr the parsing
        except (OSError, AttributeError, ValueError):
            pass  # zarr says what is wrong
        difference = spec.difference(self._array(name))
        if difference:
            raise BankError(f"the array {self.path / name} is not as the bank's settings want it: its {difference}")

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._opened:
            array = open_node(self.bank, f"{self.name}/{name}")
            if not isinstance(array, zarr.Array):
                raise BankError(f"{self.path / name} is a zarr group and must be an array")
            self._opened[name] = array
        return self._opened[name]


def create_part(folder: Path, settings: Settings, stage: int, spec: PartSpec, ids: np.ndarray) -> None:
    """Write an empty part: metadata and ids."""
    ids_spec, seal, data, marks = part_arrays(settings, stage, spec)
    group = zarr.create_group(folder, attributes=spec.to_json())
    ids_spec.create(group, "ids")[:] = ids
    seal.create(group, "seal")
    for index, entry in enumerate(settings.trajectory.stages[stage].checkpoints):
        attributes = {"step": entry.step, "hash": entry.hash}
        checkpoint = group.create_group(f"checkpoint_{index}", attributes=attributes)
        for name, array in {**data[index], "committed": marks[index]}.items():
            array.create(checkpoint, name)


def content_digest(values: np.ndarray) -> np.ndarray:
    """SHA-256 ``(32,)`` uint8 of an array's bytes: little-endian, C order."""
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return np.frombuffer(hashlib.sha256(plain.data).digest(), np.uint8)


def open_node(bank: Path, name: str) -> zarr.Array[Any] | zarr.Group:
    """Open a node of a bank for reading.

    Raises:
        BankError: it is missing or unreadable.
    """
    folder = bank / name
    if not (folder / "zarr.json").is_file():
        raise BankError(f"{folder} is missing from the bank, or is no zarr v3 node (it has no zarr.json)")
    try:
        return zarr.open(store=folder, mode="r", zarr_format=3)
    except Exception as error:  # whatever zarr and JSON raise about metadata
        raise BankError(f"the metadata of {folder} cannot be read ({type(error).__name__}: {error})") from error


def read_array(array: zarr.Array[Any], span: slice, file: Path, place: Callable[[], str] | None = None) -> np.ndarray:
    """Read rows of an array.

    Raises:
        BankError: the file is truncated or altered.
    """
    try:
        return np.asarray(array[span])
    except Exception as error:  # checksum, decompressor, shard index: each has its own kind
        where = f": {place()}" if place is not None else ""
        raise BankError(f"{file} is truncated or altered ({error}){where}") from error


def listed(texts: list[str], limit: int = 10) -> str:
    """Join texts, cut short."""
    rest = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + rest
