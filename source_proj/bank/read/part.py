"""One part of a stage's rows on disk: what is committed, how shards are read and committed, its seal."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from source_proj._errors import BankError, MismatchError, write_remedy
from source_proj._io.files import PARTIAL
from source_proj.bank.audits import decode_audit, total
from source_proj.bank.format import Settings, canonical, sha256
from source_proj.bank.layout import ArraySpec, PartSpec, group_document, part_arrays
from source_proj.bank.read.objects import (
    list_objects,
    object_info,
    read_document,
    read_group,
    read_shard,
    require_array,
)
from source_proj.bank.store import Store

__all__ = ["OtherDataError", "Part", "listed", "part_objects"]


class OtherDataError(MismatchError):
    """Batches are other ones than those that were banked: what differs, and what to do."""

    def __str__(self) -> str:
        return ". ".join(self.args)


class Part:
    """A part of a bank.

    Args:
        store: where the bank lies.
        stage: index of the stage.
        index: index of the part within its stage.
        settings: the bank's settings.

    Raises:
        BankError: its metadata are missing or not those of the format; says what was found.
    """

    def __init__(self, store: Store, stage: int, index: int, settings: Settings) -> None:
        self.store = store
        self.name = part_name(stage, index)
        self.stage_name: str = settings.trajectory.stages[stage].name
        self.steps = list(settings.trajectory.stages[stage].steps)
        self.hashes = [checkpoint.hash for checkpoint in settings.trajectory.stages[stage].checkpoints]
        self._settings = settings
        attributes = read_group(store, self.name)
        try:
            self.spec = PartSpec.from_json(attributes)
        except BankError as error:
            raise BankError(f"{self.location} is no part of a bank: {error}") from error
        ids, seal, self._data, marks = part_arrays(settings, stage, self.spec)
        self._specs = {"ids": ids, "seal": seal}
        for checkpoint in range(len(self.steps)):
            for name, spec in {**self._data[checkpoint], "committed": marks[checkpoint]}.items():
                self._specs[f"checkpoint_{checkpoint}/{name}"] = spec
        for name, spec in self._specs.items():
            require_array(store, f"{self.name}/{name}", spec)
        self.ids: list[Any] = read_shard(store, f"{self.name}/ids", ids, 0).tolist()
        self._sealed_marks: list[np.ndarray] | None = None
        self._compared: dict[str, str] = {}  # the version of each object that was compared with its mark

    @property
    def location(self) -> str:
        """Where the part is, for people."""
        return self.store.location(self.name)

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

    def key(self, checkpoint: int, name: str, shard: int) -> str:
        """The object of a shard of an array."""
        relative = f"checkpoint_{checkpoint}/{name}"
        return f"{self.name}/{relative}/{self._specs[relative].key(shard)}"

    def place(self, checkpoint: int, shard: int) -> str:
        """Say in words where a shard belongs."""
        start, stop = self.spec.span(shard)
        rows = f"rows {self.spec.start + start} to {self.spec.start + stop - 1}"
        return f"shard {shard} ({rows}) of stage {self.stage_name!r} at the checkpoint of step {self.steps[checkpoint]}"

    @property
    def _again(self) -> str:
        """What makes the shards that are missing."""
        return "append again" if self.spec.start else "call build again"

    # Reading ---------------------------------------------------------------------------------------------------

    def read(self, checkpoint: int, name: str, shard: int) -> np.ndarray:
        """Read a shard of an array, as it was committed.

        It is compared with its mark, once for every version of the object.

        Raises:
            BankError: it is missing, truncated, altered, or another one than was committed; names it and the rows.
        """
        key, spec = self.key(checkpoint, name, shard), self._data[checkpoint][name]
        info = object_info(self.store, key)  # before it is read: what is exchanged meanwhile is compared next time
        node = f"{self.name}/checkpoint_{checkpoint}/{name}"
        values = read_shard(self.store, node, spec, shard, lambda: self.place(checkpoint, shard))
        if info is None or self._compared.get(key) != info.version:
            mark = self.mark(checkpoint, shard)[list(self._data[checkpoint]).index(name)]
            if not np.array_equal(content_digest(values), mark):
                raise BankError(
                    f"{self.store.location(key)} is whole, but not what was committed as "
                    f"{self.place(checkpoint, shard)}: it belongs elsewhere, or was altered"
                )
            if info is not None:
                self._compared[key] = info.version
        return values

    def marks(self, checkpoint: int) -> np.ndarray:
        """Commit marks ``(shards, arrays, 32)`` uint8: of a part whose seal was checked, as they were then."""
        if self._sealed_marks is not None:
            return self._sealed_marks[checkpoint]
        marks = np.zeros(self._specs[f"checkpoint_{checkpoint}/committed"].shape, np.uint8)
        for shard in self.committed(checkpoint):
            marks[shard] = self.mark(checkpoint, shard)
        return marks

    def mark(self, checkpoint: int, shard: int) -> np.ndarray:
        """One commit mark ``(arrays, 32)`` uint8; zeros where there is none."""
        if self._sealed_marks is not None:
            return np.asarray(self._sealed_marks[checkpoint][shard])
        name, spec = f"checkpoint_{checkpoint}/committed", self._specs[f"checkpoint_{checkpoint}/committed"]
        if not self.is_done(checkpoint, shard):
            return np.zeros(spec.shape[1:], np.uint8)
        mark: np.ndarray = read_shard(self.store, f"{self.name}/{name}", spec, shard)[0]
        return mark

    def is_done(self, checkpoint: int, shard: int) -> bool:
        """Whether a shard is committed, as it is in the store now."""
        return object_info(self.store, self.key(checkpoint, "committed", shard)) is not None

    def committed(self, checkpoint: int) -> list[int]:
        """The shards that have a mark in the store now; reads none of the marks."""
        there = set(list_objects(self.store, f"{self.name}/checkpoint_{checkpoint}/committed"))
        return [shard for shard in range(self.spec.n_shards) if self.key(checkpoint, "committed", shard) in there]

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

    def audit(self, checkpoint: int) -> dict[str, Any]:
        """What was audited of the committed rows of a checkpoint; see clause 20 of the format."""
        shards = np.flatnonzero(self.done(checkpoint))
        return total(decode_audit(self.read(checkpoint, "audit", int(shard))) for shard in shards)

    # Writing ---------------------------------------------------------------------------------------------------

    def commit(self, checkpoint: int, shard: int, content: Mapping[str, np.ndarray]) -> None:
        """Put a shard's arrays into the store, and then its mark; the first who does it stays.

        However many writers do so, with whatever bits, and whenever they are stopped or killed: their arrays lie under
        names of their own until one of the writers is chosen, and then all of them put the chosen one's where they
        belong. Once there is a mark, nobody puts anything there.

        Raises:
            BankError: they cannot be written; nothing that was committed is harmed.
            MismatchError: another process committed the shard of other data.
        """
        try:
            if not self.is_done(checkpoint, shard):
                self._commit(checkpoint, shard, content)
        except OSError as error:
            if not self.is_done(checkpoint, shard):  # else another one has, and removed what it took for leftovers
                raise BankError(
                    f"cannot write {self.place(checkpoint, shard)} to {self.store.location()}: {error}. What was "
                    f"committed is whole: {write_remedy(error)} and {self._again} to go on from there"
                ) from error
        self.compare_hashes(checkpoint, shard, content["batch_hashes"], checkpoint)

    def _commit(self, checkpoint: int, shard: int, content: Mapping[str, np.ndarray]) -> None:
        data, mine = self._data[checkpoint], uuid.uuid4().hex.encode()
        mark_key, spec = self.key(checkpoint, "committed", shard), self._specs[f"checkpoint_{checkpoint}/committed"]
        mark = spec.encode(shard, np.stack([content_digest(content[name]) for name in data])[None])
        choice = f"{mark_key}.choice{PARTIAL}"
        keys = [self.key(checkpoint, name, shard) for name in data]
        try:
            encoded = [data[name].encode(shard, content[name]) for name in data]
            self.store.put({_staged(key, mine): value for key, value in zip(keys, encoded, strict=True)})
            chosen = mine + mark
            if self.store.put_if_absent({choice: chosen}):
                chosen = self.store.get(choice)
            if self.is_done(checkpoint, shard):  # looked for after the choice was read: it was the only one, then
                return
            self.store.copy({key: _staged(key, chosen[: len(mine)]) for key in keys})
            self.store.put_if_absent({mark_key: chosen[len(mine) :]})
            for key in [*(_staged(key, chosen[: len(mine)]) for key in keys), choice]:
                self.store.delete(key)
        finally:
            with contextlib.suppress(OSError):
                for key in keys:
                    if not self.store.exists(choice) or self.store.get(choice)[: len(mine)] != mine:
                        self.store.delete(_staged(key, mine))

    def check_hashes(self, checkpoint: int, shard: int, hashes: np.ndarray) -> None:
        """Compare the hashes ``(m, 32)`` of a shard's batches with those of another checkpoint that is committed.

        Raises:
            MismatchError: they differ, so the data set gave other examples.
        """
        for other in range(self.n_checkpoints):
            if other != checkpoint and self.is_done(other, shard):
                self.compare_hashes(checkpoint, shard, hashes, other)
                return

    def check_data(self, shard: int, hashes: np.ndarray) -> None:
        """Compare the hashes of a shard's batches with those of any committed checkpoint.

        Raises:
            MismatchError: the data set gave other examples.
        """
        self.check_hashes(-1, shard, hashes)

    def compare_hashes(self, checkpoint: int, shard: int, hashes: np.ndarray, other: int) -> None:
        """Compare the hashes of a shard's batches at a checkpoint, or now (-1), with those of a committed one.

        Raises:
            MismatchError: they differ.
        """
        stored = self.read(other, "batch_hashes", shard)
        if not len(different := np.flatnonzero((stored != hashes).any(axis=1))):
            return
        batch = int(different[0])
        ids = self.ids[self.spec.span(shard)[0] :][batch * self.spec.batch_size :][: self.spec.batch_size]
        now = "now" if checkpoint in (-1, other) else f"at the checkpoint of step {self.steps[checkpoint]}"
        unfit = self.location if self.spec.start else self.store.location()
        raise OtherDataError(
            f"the data of stage {self.stage_name!r} differ in {len(different)} of {len(hashes)} batches of shard "
            f"{shard}, first in that of ids {ids[0]!r} to {ids[-1]!r}: hash "
            f"{hashes[batch].tobytes().hex()[:16]} {now}, {stored[batch].tobytes().hex()[:16]} at that of step "
            f"{self.steps[other]}",
            "Every pass must see the same examples in the same order: switch off shuffling and random augmentation. "
            f"Where no data fit all shards, remove {unfit} and {self._again}",
        )

    # Seal ------------------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Declare the part complete, unless it is.

        Raises:
            BankError: shards are missing; lists them.
            MismatchError: the data differ between checkpoints.
        """
        if self.sealed() is not None:
            return
        missing = self.missing()
        if missing:
            raise BankError(f"{self.store.location()} lacks {listed(missing)}: {self._again}, then finalize")
        self._require_objects()
        for shard in range(self.spec.n_shards):
            hashes = self.read(0, "batch_hashes", shard)
            for checkpoint in range(1, self.n_checkpoints):
                self.compare_hashes(0, shard, hashes, checkpoint)
        spec = self._specs["seal"]
        values = np.frombuffer(self.content_hash() + self.metadata_hash(), np.uint8).reshape(2, 32)
        try:
            self.store.put_if_absent({f"{self.name}/seal/{spec.key(0)}": spec.encode(0, values)})
        except OSError as error:
            if self.sealed() is None:  # else another process did it, and removed what it took for a leftover
                remedy = f"{write_remedy(error)}, then try again"
                raise BankError(f"cannot finalize the bank {self.store.location()}: {error}; {remedy}") from error
        self.check_seal()  # another process may have been first

    def _require_objects(self) -> None:
        """Refuse to seal what has gone since it was committed."""
        there = set(list_objects(self.store, self.name))
        for checkpoint in range(self.n_checkpoints):
            for name in self._data[checkpoint]:
                for shard in range(self.spec.n_shards):
                    if self.key(checkpoint, name, shard) not in there:
                        key = self.key(checkpoint, name, shard)
                        raise BankError(f"{self.store.location(key)} is missing: {self.place(checkpoint, shard)}")

    def sealed(self) -> tuple[bytes, bytes] | None:
        """Return the seal, content hash and metadata hash, as it is in the store now; None before the part is sealed.

        Raises:
            BankError: the seal is damaged.
        """
        if object_info(self.store, f"{self.name}/seal/{self._specs['seal'].key(0)}") is None:
            return None
        values = read_shard(self.store, f"{self.name}/seal", self._specs["seal"], 0)
        return (values[0].tobytes(), values[1].tobytes()) if values.any() else None

    def check_seal(self) -> None:
        """Compare the part's seal, if it has one, with what it seals; the marks are those of this moment from then on.

        Raises:
            BankError: something changed since.
        """
        self._sealed_marks = None
        sealed = self.sealed()
        if sealed is None:
            return
        if sealed[1] != self.metadata_hash():
            raise BankError(f"the metadata of {self.location}, or of the groups above it, changed since it was sealed")
        marks = [self.marks(checkpoint) for checkpoint in range(self.n_checkpoints)]
        if sealed[0] != self.content_hash(marks):
            raise BankError(f"the ids or commit marks of {self.location} changed since it was sealed: verify says more")
        self._sealed_marks = marks

    def content_hash(self, marks: list[np.ndarray] | None = None) -> bytes:
        """Hash all that the part's rows are: settings, attributes, ids, marks."""
        marks = [self.marks(checkpoint) for checkpoint in range(self.n_checkpoints)] if marks is None else marks
        numbers = self.spec.id_type == "int64"
        ids = np.array(self.ids, dtype="<i8").tobytes() if numbers else canonical(self.ids)
        about = canonical([self._settings.identity(), self.name, self.spec.to_json()])
        return sha256(about, ids, *[values.tobytes() for values in marks])

    def metadata_hash(self) -> bytes:
        """Hash the metadata of the root, the weights, the stage and the part.

        Raises:
            BankError: some cannot be read.
        """
        nodes = ["", self.name.split("/")[0]]
        for folder in ("weights", "metrics", "curvature", self.name):
            documents = [key for key in list_objects(self.store, folder) if key.endswith("/zarr.json")]
            nodes += [key.removesuffix("/zarr.json") for key in documents]
        entries = []
        for node in nodes:
            try:
                document = dict(json.loads(read_document(self.store, node)))
            except (TypeError, ValueError, RecursionError) as error:
                raise BankError(f"the metadata of {self.store.location(node)} cannot be read: {error}") from error
            document.pop("consolidated_metadata", None)  # a copy that users may add to the root
            entries.append([node, document])
        return sha256(canonical(entries))


def _staged(key: str, writer: bytes) -> str:
    """Where a writer's object lies until it is chosen."""
    return f"{key}.{writer.decode()}{PARTIAL}"


def part_name(stage: int, index: int) -> str:
    """The node of a part."""
    return f"stage_{stage}/part_{index}"


def part_objects(settings: Settings, stage: int, index: int, spec: PartSpec, ids: np.ndarray) -> dict[str, bytes]:
    """An empty part, metadata and ids, as the objects to write: the last one, its group, makes it a part."""
    ids_spec, seal, data, marks = part_arrays(settings, stage, spec)
    name = part_name(stage, index)
    objects = {
        f"{name}/ids/zarr.json": ids_spec.document,
        f"{name}/ids/{ids_spec.key(0)}": ids_spec.encode(0, ids),
        f"{name}/seal/zarr.json": seal.document,
    }
    for checkpoint, reference in enumerate(settings.trajectory.stages[stage].checkpoints):
        node = f"{name}/checkpoint_{checkpoint}"
        objects[f"{node}/zarr.json"] = group_document({"step": reference.step, "hash": reference.hash})
        for array, array_spec in {**data[checkpoint], "committed": marks[checkpoint]}.items():
            objects[f"{node}/{array}/zarr.json"] = array_spec.document
    return {**objects, f"{name}/zarr.json": group_document(spec.to_json())}


def content_digest(values: np.ndarray) -> np.ndarray:
    """SHA-256 ``(32,)`` uint8 of an array's bytes: little-endian, C order."""
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return np.frombuffer(hashlib.sha256(plain.data).digest(), np.uint8)


def listed(texts: list[str], limit: int = 10) -> str:
    """Join texts, cut short."""
    rest = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + rest
