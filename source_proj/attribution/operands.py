"""Training operands: banked rows as loss gradients, at their place among the rows of all stages."""

import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, SupportsIndex

import torch
from torch import Tensor

from source_proj.bank import Bank
from source_proj.bank.codecs import Codec, find_codec

__all__ = [
    "HeldOperands",
    "Operand",
    "Operands",
    "Picked",
    "RowsInMemory",
    "StageOperands",
    "aligned",
    "checked_rows",
    "encoded_gradients",
    "gradient_bytes",
    "loss_gradients",
    "mean_gradients",
    "stage_start",
    "unit_rows",
]

_PLAIN = find_codec("float32")


class Operand(NamedTuple):
    """Training rows start to stop of a term.

    Attributes:
        start: first row, counted over the rows of all stages.
        stop: end of the rows.
        rows: ``(stop - start, k)`` float32, or the codes of a codec.
        scale: what each row is times, ``(stop - start,)`` float32; None for 1.
        weights: a factor of each row that is averaged over several runs by itself; None for 1.
        codec: how the rows are encoded.
    """

    start: int
    stop: int
    rows: Tensor
    scale: Tensor | None = None
    weights: Tensor | None = None
    codec: Codec = _PLAIN

    def decoded(self, k: int) -> Tensor:
        """The rows ``(stop - start, k)`` float32, times their scale."""
        return self.codec.decode(self.rows, self.scale, k)

    def cut(self, start: int, stop: int) -> "Operand":
        """Return the part between two absolute rows."""
        part = slice(start - self.start, stop - self.start)
        scale, weights = (None if values is None else values[part] for values in (self.scale, self.weights))
        return Operand(start, stop, self.rows[part], scale, weights, self.codec)


class Operands(Protocol):
    """The training operands of a term."""

    def between(self, start: int, stop: int) -> Iterator[Operand]:
        """Those of some rows, in order."""


@dataclass(frozen=True)
class RowsInMemory:
    """Operands that are there, in order of rows."""

    operands: Sequence[Operand]

    def between(self, start: int, stop: int) -> Iterator[Operand]:
        """Those of some rows, in order."""
        for operand in self.operands:
            if operand.start < stop and start < operand.stop:
                yield operand.cut(max(start, operand.start), min(stop, operand.stop))


@dataclass(frozen=True)
class StageOperands:
    """Operands of a stage's rows that are read when they are asked for, here or in the process they were sent to.

    Attributes:
        bank: whose rows.
        stage: index of the stage.
        read: ``read(bank, stage, shards=)`` yields the operands of some shards.
    """

    bank: Bank
    stage: int
    read: Callable[..., Iterator[Operand]]

    def between(self, start: int, stop: int) -> Iterator[Operand]:
        """Those of some rows, in order."""
        first = stage_start(self.bank, self.stage)
        inside = [
            number
            for number, (low, high) in enumerate(self.bank.stages[self.stage].shard_spans)
            if first + low < stop and start < first + high
        ]
        if inside:
            for operand in self.read(self.bank, self.stage, shards=range(inside[0], inside[-1] + 1)):
                yield operand.cut(max(start, operand.start), min(stop, operand.stop))


@dataclass(frozen=True)
class Picked:
    """Operands of some rows alone, counted by their places among those.

    Attributes:
        operands: those of all rows.
        rows: the rows wanted, ``(n,)`` int64 on the CPU, ascending.
    """

    operands: Operands
    rows: Tensor

    def between(self, start: int, stop: int) -> Iterator[Operand]:
        """Those of the rows at some places, in order."""
        wanted = self.rows[start:stop]
        if not len(wanted):
            return
        for operand in self.operands.between(int(wanted[0]), int(wanted[-1]) + 1):
            ends = torch.tensor([operand.start, operand.stop], dtype=torch.int64, device="cpu")
            low, high = torch.searchsorted(wanted, ends).tolist()
            if low < high:
                own = (wanted[low:high] - operand.start).to(operand.rows.device)
                scale, weights = (
                    None if values is None else values[own] for values in (operand.scale, operand.weights)
                )
                yield Operand(start + low, start + high, operand.rows[own], scale, weights, operand.codec)


def stage_start(bank: Bank, stage: int) -> int:
    """Return the first row of a stage among the rows of all stages."""
    return sum(earlier.n for earlier in bank.stages[:stage])


def loss_gradients(
    bank: Bank,
    stage: int,
    checkpoint: int,
    device: torch.device | str | None,
    metric: int | None = None,
    shards: range | None = None,
) -> Iterator[Operand]:
    """Loss gradients g = ℓ'φ of a stage's examples at one checkpoint, at their rows among all stages.

    They are in the checkpoint's own metric, unless another one is named; of all shards, or of some.
    """
    start = stage_start(bank, stage)
    for block in bank.stages[stage].iter_rows(checkpoint, metric=metric, shards=shards):
        rows = block.rows.to(device or "cpu").mul_(block.d1.to(device or "cpu")[:, None])
        yield Operand(start + block.start, start + block.stop, rows)


def encoded_gradients(
    bank: Bank,
    stage: int,
    checkpoints: Sequence[int],
    device: torch.device | str | None,
    shards: range | None = None,
) -> Iterator[Operand]:
    """ḡ_l as :func:`mean_gradients`; of one checkpoint the banked rows as they are, ℓ' and the scale as one factor.

    What multiplies them once has no use for a float32 copy.
    """
    if len(checkpoints) > 1:
        yield from mean_gradients(bank, stage, checkpoints, device, shards=shards)
        return
    start, target = stage_start(bank, stage), device or "cpu"
    for block in bank.stages[stage].iter_encoded(checkpoints[0], shards):
        scale = block.d1 if block.scale is None else block.d1 * block.scale
        rows = block.rows.to(target)
        yield Operand(start + block.start, start + block.stop, rows, scale.to(target), codec=block.codec)


def mean_gradients(
    bank: Bank,
    stage: int,
    checkpoints: Sequence[int],
    device: torch.device | str | None,
    metric: int | None = None,
    shards: range | None = None,
) -> Iterator[Operand]:
    """ḡ_l: the loss gradients averaged over checkpoints of its stage; see `loss_gradients` for metric and shards."""
    streams = [loss_gradients(bank, stage, checkpoint, device, metric, shards) for checkpoint in checkpoints]
    for blocks in zip(*streams, strict=True):
        mean = blocks[0].rows
        for block in blocks[1:]:
            mean += block.rows
        yield Operand(blocks[0].start, blocks[0].stop, mean.div_(len(blocks)))


def gradient_bytes(bank: Bank, stage: int, checkpoints: Sequence[int]) -> int:
    """Bytes in memory of what :func:`encoded_gradients` yields in all."""
    codec = bank.settings.codec if len(checkpoints) == 1 else _PLAIN
    return codec.nbytes(bank.stages[stage].n, bank.sketch.dim)


class HeldOperands:
    """Operands that stay in memory, as long as they fit; what does not is read each time.

    Args:
        limit: bytes that may be held.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: dict[Hashable, RowsInMemory] = {}
        self._used = 0
        self._lock = threading.Lock()  # they are read once, however many threads ask

    def __reduce__(self) -> "tuple[type[HeldOperands], tuple[int]]":
        return HeldOperands, (self.limit,)  # a copy, and another process, read them anew

    def of(self, key: Hashable, nbytes: int, operands: StageOperands) -> Operands:
        """The operands of a key, from memory or to be read (and held, if they fit).

        Args:
            key: names what is read, once and for all.
            nbytes: bytes that it takes in memory.
            operands: reads it.
        """
        with self._lock:
            if key not in self._held and self._used + nbytes <= self.limit:
                self._held[key] = RowsInMemory(list(operands.between(0, operands.bank.n_rows)))
                self._used += nbytes
            return self._held.get(key, operands)


def checked_rows(rows: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
    """Positions of training examples ``(m,)`` once each and ascending, and where each of those given stands among them.

    Raises:
        TypeError: one is no whole number, as those of a mask aren't.
        ValueError: one lies outside of 0..n-1.
    """
    given = torch.tensor([_position(row) for row in rows], dtype=torch.int64, device="cpu")
    outside = given[(given < 0) | (given >= n)].tolist()
    if outside:
        raise ValueError(f"rows are positions among the {n} training examples, 0..{n - 1}, got {outside[:5]}")
    wanted, order = torch.unique(given, return_inverse=True)
    return wanted, order


def _position(row: SupportsIndex) -> int:
    try:
        if isinstance(row, bool) or getattr(row, "dtype", None) is torch.bool:  # True would pass for the place 1
            raise TypeError
        return operator.index(row)
    except TypeError:
        raise TypeError(
            f"rows are positions of training examples, whole numbers, got {row!r}; np.flatnonzero makes them of a mask"
        ) from None


def unit_rows(rows: Tensor) -> Tensor:
    """Rows ``(n, k)`` of length 1, however short or long they were; those of zeros stay.

    Example:
        >>> unit_rows(torch.tensor([[3e-30, 4e-30], [0.0, -2e30], [0.0, 0.0]]))
        tensor([[ 0.6000,  0.8000],
                [ 0.0000, -1.0000],
                [ 0.0000,  0.0000]])
    """
    largest = rows.abs().amax(1, keepdim=True)  # by which nothing is squared that has no square in float32
    return torch.nn.functional.normalize(rows / largest.where(largest > 0, 1.0))


def aligned(streams: Sequence[Iterator[Operand]], height: int) -> Iterator[tuple[int, int, list[tuple[int, Operand]]]]:
    """Walk several streams of operands together, cut to common rows of at most ``height``.

    Streams may cover different rows (a stage's) and be cut at different places (other shard sizes). Yields
    ``(start, stop, [(stream, operand cut to these rows), ...])`` with at least one operand.
    """
    heads = [next(stream, None) for stream in streams]
    while any(head is not None for head in heads):
        start = min(head.start for head in heads if head is not None)
        stop = start + height
        for head in heads:
            if head is not None:
                stop = min(stop, head.stop if head.start == start else head.start)
        active = [
            (index, head.cut(start, stop))
            for index, head in enumerate(heads)
            if head is not None and head.start == start
        ]
        yield start, stop, active
        for index, _ in active:
            head = heads[index]
            if head is not None:
                heads[index] = head.cut(stop, head.stop) if stop < head.stop else next(streams[index], None)
