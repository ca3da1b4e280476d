"""The rows of a stage, as everything that reads them sees them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from source_proj._io.printable import counted
from source_proj._io.progress import tick
from source_proj.bank.codecs import Codec
from source_proj.bank.format import Settings
from source_proj.bank.layout import crossing_name
from source_proj.bank.read.curvature import panels_of, read_curvature
from source_proj.bank.read.part import Part
from source_proj.bank.store import Store
from source_proj.kernels.gram import mirrored
from source_proj.sketch import Sketch
from source_proj.sketch.columns import Columns, kept_blocks
from source_proj.trajectory import CapturedCurvature, CaptureRecord

__all__ = ["DECODED_NUMBERS", "EncodedBlock", "RowBlock", "StageBank"]

What = Literal["output", "sampled_fisher"]

DECODED_NUMBERS = 1 << 24  # of a block, 64 MiB in float32: those of a shard's rows of one byte a number


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Rows of one shard, or some of them, decoded; the tensors are the caller's own.

    Attributes:
        start: first row, counted within the stage; of sampled-Fisher rows, draw j of row z is row z·draws + j.
        stop: end of the rows.
        rows: sketched gradients ``(n, k)`` float32.
        d1: ℓ' of each row, ``(n,)`` float32; -1 for sampled-Fisher rows.
        d2: ℓ'' of each row, ``(n,)`` float32; None where the task has none, and for sampled-Fisher rows.
        fisher_weight: what ℓ' is times in the empirical Fisher, ``(n,)`` float32; None for 1.
    """

    start: int
    stop: int
    rows: Tensor
    d1: Tensor
    d2: Tensor | None
    fisher_weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EncodedBlock:
    """Rows of one shard as they are stored; the tensors are the caller's own.

    Attributes:
        start: first row, counted as in :class:`RowBlock`.
        stop: end of the rows.
        rows: ``(n, codec.width(k))`` codes.
        scale: what they are times to be sketched gradients, ``(n,)`` float32; None for 1.
        d1: as in :class:`RowBlock`.
        codec: how they are encoded.
        d2: as in :class:`RowBlock`.
        fisher_weight: as in :class:`RowBlock`.
    """

    start: int
    stop: int
    rows: Tensor
    scale: Tensor | None
    d1: Tensor
    codec: Codec
    d2: Tensor | None = None
    fisher_weight: Tensor | None = None

    def decoded(self, dim: int) -> Iterator[RowBlock]:
        """Yield the rows ``(n, k)`` decoded: in pieces of at most 64 MiB, as codes of a few bits need."""
        height = max(1, DECODED_NUMBERS // dim)
        for start in range(0, len(self.rows), height):
            own = slice(start, start + height)
            rows = self.codec.decode(self.rows[own], _part(self.scale, own), dim)
            first = self.start + start
            yield RowBlock(
                first, first + len(rows), rows, self.d1[own], _part(self.d2, own), _part(self.fisher_weight, own)
            )  # fmt: skip


class Owner(Protocol):
    """The bank that a stage is of."""

    @property
    def stages(self) -> "tuple[StageBank, ...]":
        """Its stages."""

    def require_finalized(self) -> None:
        """Refuse to go on with an unfinished bank."""


class StageBank:
    """The rows of one stage of training.

    It is sent to another process as its bank is: by the bank's place.

    Attributes:
        name: the stage's name.
        record: the stage's record.
        draws: draws of sampled labels; 0 if the bank has none.
        parts: its parts, in order of rows.
    """

    def __init__(self, settings: Settings, index: int, parts: Sequence[Part], bank: Owner, store: Store) -> None:
        self._store = store
        self._settings = settings
        self._index = index
        self._bank = bank
        self.record = settings.trajectory.stages[index]
        self.name = self.record.name
        self.draws = settings.sampled_fisher
        self.parts = tuple(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _stage_of, (self._bank, self._index)

    def __repr__(self) -> str:
        return f"StageBank({self.name!r}: {self.n} rows x {self.counted_rows()})"

    def counted_rows(self) -> str:
        """What an example has a row of: so many checkpoints, or segments of training, as condensed or captured."""
        return counted(self.n_checkpoints, "whole segment" if self.captured else "checkpoint")

    @property
    def n(self) -> int:
        """Number of training examples."""
        return sum(part.spec.n for part in self.parts)

    @property
    def dim(self) -> int:
        """Numbers of a row, the sketch's k."""
        return int(self._settings.sketch["dim"])

    @cached_property
    def ids(self) -> list[Any]:
        """Ids of the training examples."""
        return [row_id for part in self.parts for row_id in part.ids]

    @cached_property
    def shard_spans(self) -> list[tuple[int, int]]:
        """First row and end of each shard, in order, counted within the stage."""
        return [
            (part.spec.start + start, part.spec.start + stop)
            for part, shard in self._shards
            for start, stop in [part.spec.span(shard)]
        ]

    @cached_property
    def _shards(self) -> list[tuple[Part, int]]:
        return [(part, shard) for part in self.parts for shard in range(part.spec.n_shards)]

    @property
    def n_checkpoints(self) -> int:
        """Number of checkpoints."""
        return len(self.record.checkpoints)

    def first_batches(self) -> tuple[int, np.ndarray] | None:
        """Examples in a batch, and hashes ``(m, 32)`` of the first shard's batches; None where no pass was made."""
        if self.captured or not self.parts:
            return None
        part = self.parts[0]
        return part.spec.batch_size, part.read(0, "batch_hashes", 0)

    @property
    def captured(self) -> bool:
        """Whether its rows are loss gradients captured in training: a row a segment, not a checkpoint."""
        return self.record.capture is not None

    @property
    def captured_kind(self) -> CapturedCurvature:
        """Which curvature was captured with its rows; raises ValueError where they were not captured."""
        return self._capture.kind

    @property
    def captured_blocks(self) -> tuple[Columns, ...]:
        """The blocks of the sketch's columns that have an Ĥ of their own where curvature was captured."""
        return kept_blocks(Sketch.from_spec(self._settings.sketch))

    def captured_curvature(self, segment: int) -> tuple[Tensor, ...]:
        """The Ĥ ``(k', k')`` float32 that was captured in a segment, of that kind, of each of the blocks of columns.

        Raises:
            BankError: the bank is not finalized, or the matrices are missing or damaged.
            ValueError: the stage was not captured.
        """
        self._bank.require_finalized()
        flat = read_curvature(self._store, self._capture.curvature[segment])
        return tuple(mirrored(panels) for panels in panels_of(flat, self.captured_blocks))

    @property
    def _capture(self) -> CaptureRecord:
        if self.record.capture is None:
            raise ValueError(f"stage {self.name!r} has rows of checkpoints: make its curvature of them")
        return self.record.capture

    def metric(self, checkpoint: int) -> int:
        """Index of the metric that a checkpoint's rows are in; 0 in a bank of plain gradients."""
        return self.record.metrics[checkpoint]

    def iter_rows(
        self, checkpoint: int, what: What = "output", metric: int | None = None, shards: range | None = None
    ) -> Iterator[RowBlock]:
        """Yield the rows at one checkpoint, a block per shard, always in the same order.

        Several blocks where a shard's rows would take more than 64 MiB in float32, as codes of a few bits do.

        Args:
            checkpoint: index of the checkpoint; negative ones count from the last.
            what: "output" for gradients of the task's output, "sampled_fisher" for those of sampled labels.
            metric: the metric of the rows; default: the checkpoint's own. Those of earlier checkpoints are there too.
            shards: which of :attr:`shard_spans`; default: all.

        Raises:
            BankError: the bank is not finalized, or a shard is missing or damaged; says which.
            IndexError: there is no such checkpoint.
            ValueError: there are no sampled-Fisher rows, or none in this metric.
        """
        encoded = self.iter_encoded(checkpoint, shards, what, metric)  # refuses at once
        return (rows for block in encoded for rows in block.decoded(self.dim))

    def iter_encoded(
        self, checkpoint: int, shards: range | None = None, what: What = "output", metric: int | None = None
    ) -> Iterator[EncodedBlock]:
        """Yield the rows at one checkpoint as they are stored: a block per shard, in order.

        Args:
            checkpoint: as for :meth:`iter_rows`.
            shards: as for :meth:`iter_rows`.
            what: as for :meth:`iter_rows`.
            metric: as for :meth:`iter_rows`.

        Raises:
            BankError, IndexError, ValueError: as :meth:`iter_rows`.
        """
        self._bank.require_finalized()
        if not -self.n_checkpoints <= checkpoint < self.n_checkpoints:
            raise IndexError(f"stage {self.name!r} has {self.n_checkpoints} checkpoints, got index {checkpoint}")
        if what not in ("output", "sampled_fisher"):
            raise ValueError(f"what must be 'output' or 'sampled_fisher', got {what!r}")
        if what == "sampled_fisher" and not self.draws:
            raise ValueError("the bank has no sampled-Fisher rows; build one with sampled_fisher=1")
        place = checkpoint % self.n_checkpoints
        own, crossed = self.metric(place), self._settings.trajectory.crossed_metrics(self._index, place)
        if metric is not None and metric not in (own, *crossed):
            raise ValueError(
                f"checkpoint {place} of stage {self.name!r} has rows in its own metric {own}, and in those of earlier "
                f"checkpoints, {crossed}; got {metric}"
            )
        return self._blocks(shards, place, what, None if metric == own else metric)

    def _blocks(self, shards: range | None, checkpoint: int, what: What, metric: int | None) -> Iterator[EncodedBlock]:
        for part, shard in self._chosen(shards):
            block = self._block(part, checkpoint, shard, what, metric)
            yield block
            tick(block.stop - block.start)

    def _chosen(self, shards: range | None) -> list[tuple[Part, int]]:
        return self._shards if shards is None else [self._shards[number] for number in shards]

    def _block(self, part: Part, checkpoint: int, shard: int, what: What, metric: int | None) -> EncodedBlock:
        settings = self._settings
        prefix, factor, codec = (
            ("", 1, settings.codec) if what == "output" else ("fisher_", self.draws, settings.sampled_codec)
        )
        names = [f"{prefix}rows", f"{prefix}scale"]
        rows_name, scale_name = names if metric is None else [crossing_name(name, metric) for name in names]
        codes = torch.from_numpy(part.read(checkpoint, rows_name, shard))
        d1, d2, fisher_weight = torch.full((len(codes),), -1.0, dtype=torch.float32, device="cpu"), None, None
        if what == "output":
            d1 = torch.from_numpy(part.read(checkpoint, "d1", shard))
            if settings.second_derivative:
                d2 = torch.from_numpy(part.read(checkpoint, "d2", shard))
            if settings.fisher_weight:
                fisher_weight = torch.from_numpy(part.read(checkpoint, "fisher_weight", shard))
        first, stop = (factor * (part.spec.start + end) for end in part.spec.span(shard))
        scale = torch.from_numpy(part.read(checkpoint, scale_name, shard)) if codec.has_scale else None
        return EncodedBlock(first, stop, codes, scale, d1, codec, d2, fisher_weight)


def _part(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _stage_of(bank: Owner, index: int) -> StageBank:
    return bank.stages[index]
