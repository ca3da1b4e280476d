"""A bank of one row for each example and segment of training, with the segments' curvature beside it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from source_proj._errors import SourceProjError
from source_proj.bank.audits import encode_audit
from source_proj.bank.bank import Bank
from source_proj.bank.build.at_work import at_work, is_bank
from source_proj.bank.build.create import create_bank, not_written, require_same_part, require_same_settings
from source_proj.bank.format import Settings
from source_proj.bank.layout import PartSpec, default_shard_rows
from source_proj.bank.notes import Notes
from source_proj.bank.read.part import Part
from source_proj.bank.store import Store, open_store
from source_proj.trajectory import Checkpoint, Scale

__all__ = ["SegmentRows", "Segments", "require_room", "write_segments"]

_BATCH = 64  # rows; nothing is read in batches, and shards are made of some


class SegmentRows(Protocol):
    """The rows of a stage."""

    @property
    def ids(self) -> np.ndarray:
        """Ids of its examples, in order."""

    def rows(self, segment: int, start: int, stop: int) -> Tensor:
        """Loss gradients ``(stop - start, k)`` float32 of some examples in a segment, the caller's own."""

    def audit(self, segment: int) -> Mapping[str, Any]:
        """What was audited of a segment's rows."""


@dataclass(frozen=True)
class Segments:
    """What such a bank holds besides its rows.

    Attributes:
        settings: its settings; each stage's record is a captured one.
        notes: on its model and data.
        weights: the checkpoints that the record names, of which those that lie in no file are copied into the bank.
        curvature: of each stage and segment Ĥ, flat, in the order of the records' hashes.
        scales: the metrics of the rows, by hash.
    """

    settings: Settings
    notes: Notes
    weights: Iterable[Checkpoint]
    curvature: Sequence[Sequence[Tensor]]
    scales: Mapping[str, Scale]


def require_room(store: Store) -> None:
    """Refuse a folder that cannot be made or written, before what goes there is computed; a bank that is there may be.

    Raises:
        BankError: says what keeps it from being written.
    """
    with at_work(store):  # makes the folder, if it can be, and takes it away again
        if (folder := store.folder) is None or is_bank(store):
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        except OSError as error:
            raise not_written(store, error) from error


def write_segments(path: str | Path, content: Segments, stages: Sequence[SegmentRows]) -> Bank:
    """Write a finalized bank; a killed call goes on when it is repeated.

    Args:
        path: the bank's folder, or the URL of one in an object store.
        content: all but the rows.
        stages: the rows of each stage.

    Raises:
        BankError: something else is at the path, or it cannot be written.
        MismatchError: a bank of other settings or ids is there.
    """
    store = open_store(path)
    try:
        return _written(path, store, content, stages)
    except OSError as error:
        if isinstance(error, SourceProjError):  # of a checkpoint that is gone
            raise
        raise not_written(store, error) from error


def _written(path: str | Path, store: Store, content: Segments, stages: Sequence[SegmentRows]) -> Bank:
    settings = content.settings
    specs = [_spec(stage.ids, settings) for stage in stages]
    with at_work(store) as work:
        work.remove_begun()
        work.share()
        if not store.exists("zarr.json"):
            captures = [stage.capture for stage in settings.trajectory.stages]
            hashes = chain.from_iterable(capture.curvature for capture in captures if capture is not None)
            matrices = dict(zip(hashes, chain(*content.curvature), strict=True))
            parts = [(spec, stage.ids) for spec, stage in zip(specs, stages, strict=True)]
            create_bank(store, settings, content.weights, content.scales, parts, content.notes, matrices)
        bank = Bank(path)
        require_same_settings(bank.path, bank.settings, settings)
        written = []
        for own, stage, spec in zip(bank.stages, stages, specs, strict=True):
            (part,) = own.parts
            require_same_part(part, spec, stage.ids)
            for segment in range(own.n_checkpoints):
                for shard, arrays in _shards(part, segment, stage, settings):
                    part.commit(segment, shard, arrays)
            written.append(part)
    bank.seal(written)
    return bank


def _spec(ids: np.ndarray, settings: Settings) -> PartSpec:
    height = default_shard_rows(len(ids), _BATCH, settings)
    return PartSpec(0, len(ids), _BATCH, height, "string" if ids.dtype == object else "int64")


def _shards(
    part: Part, segment: int, stage: SegmentRows, settings: Settings
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The arrays of each shard of a segment that is not committed yet."""
    nothing = {"examples": 0, "audited_batches": 0, "audited_examples": 0, "worst_error": 0.0, "general": {}}
    for shard in range(part.spec.n_shards):
        if part.is_done(segment, shard):
            continue
        rows = stage.rows(segment, *part.spec.span(shard))
        codes, scale = settings.codec.encode(rows)
        arrays = {
            "rows": codes.numpy(),
            "d1": np.ones(len(rows), np.float32),
            "batch_hashes": np.zeros((-(-len(rows) // part.spec.batch_size), 32), np.uint8),
            "audit": encode_audit(stage.audit(segment) if shard == 0 else nothing),
        }
        yield shard, arrays if scale is None else {**arrays, "scale": scale.numpy()}
