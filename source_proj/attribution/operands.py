"""Training operands: banked rows as loss gradients, at their place among the rows of all stages."""

import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from source_proj.bank import Bank
from source_proj.bank.codecs import Codec, find_codec

__all__ = [
    "HeldOperands",
    "Operand",
    "aligned",
    "checked_rows",
    "encoded_gradients",
    "gradient_bytes",
    "loss_gradients",
    "mean_gradients",
    "picked",
    "stage_start",
]

_PLAIN = find_codec("float32")


class Operand(NamedTuple):
    """Training rows start to stop of a term.

    Attributes:
        start: first row, counted over the rows of all stages.
        stop: end of the rows.
        rows: ``(stop - start, k)`` float32, or the codes of a codec.
        scale: what each row is times, ``(stop - start,)`` float32; None for 1.
        weights: what a method's ``_combine`` wants to know of each row; None for nothing.
        codec: how the rows are encoded.
    """

    start: int
    stop: int
    rows: Tensor
    scale: Tensor | None = None
    weights: Tensor | None = None
    codec: Codec = _PLAIN

    def cut(self, start: int, stop: int) -> "Operand":
        """Return the part between two absolute rows."""
        part = slice(start - self.start, stop - self.start)
        scale, weights = (None if values is None else values[part] for values in (self.scale, self.weights))
        return Operand(start, stop, self.rows[part], scale, weights, self.codec)


def stage_start(bank: Bank, stage: int) -> int:
    """Return the first row of a stage among the rows of all stages."""
    return sum(earlier.n for earlier in bank.stages[:stage])


def loss_gradients(
    bank: Bank, stage: int, checkpoint: int, device: torch.device | str | None, metric: int | None = None
) -> Iterator[Operand]:
    """Loss gradients g = ℓ'φ of a stage's examples at one checkpoint, at their rows among all stages.

    They are in the checkpoint's own metric, unless another one is named.
    """
    start = stage_start(bank, stage)
    for block in bank.stages[stage].iter_rows(checkpoint, metric=metric):
        rows = block.rows.to(device or "cpu").mul_(block.d1.to(device or "cpu")[:, None])
        yield Operand(start + block.start, start + block.stop, rows)


def encoded_gradients(
    bank: Bank, stage: int, checkpoints: Sequence[int], device: torch.device | str | None
) -> Iterator[Operand]:
    """ḡ_l as :func:`mean_gradients`; of one checkpoint the banked rows as they are, ℓ' and the scale as one factor.

    What multiplies them once has no use for a float32 copy.
    """
    if len(checkpoints) > 1:
        yield from mean_gradients(bank, stage, checkpoints, device)
        return
    start, target = stage_start(bank, stage), device or "cpu"
    for block in bank.stages[stage].iter_encoded(checkpoints[0]):
        scale = block.d1 if block.scale is None else block.d1 * block.scale
        rows = block.rows.to(target)
        yield Operand(start + block.start, start + block.stop, rows, scale.to(target), codec=block.codec)


def mean_gradients(
    bank: Bank,
    stage: int,
    checkpoints: Sequence[int],
    device: torch.device | str | None,
    metric: int | None = None,
) -> Iterator[Operand]:
    """ḡ_l: the loss gradients averaged over checkpoints of its stage; see `loss_gradients` for the metric."""
    streams = [loss_gradients(bank, stage, checkpoint, device, metric) for checkpoint in checkpoints]
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
    """Streams of operands that stay in memory, as long as they fit; what does not is read each time.

    Args:
        limit: bytes that may be held.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[Hashable, list[Operand]] = {}
        self._used = 0
        self._lock = threading.Lock()  # a stream is read once, however many threads ask

    def stream(self, key: Hashable, nbytes: int, read: Callable[[], Iterator[Operand]]) -> Iterator[Operand]:
        """The operands of a key, from memory or by reading (and then holding) them.

        Args:
            key: names what is read, once and for all.
            nbytes: bytes that it takes in memory.
            read: reads it.
        """
        with self._lock:
            if key not in self._held and self._used + nbytes <= self._limit:
                self._held[key] = list(read())
                self._used += nbytes
            held = self._held.get(key)
        return read() if held is None else iter(held)


def checked_rows(rows: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
    """Positions of training examples ``(m,)`` once each and ascending, and where each of those given stands among them.

    Raises:
        ValueError: one lies outside of 0..n-1.
    """
    given = torch.as_tensor([operator.index(row) for row in rows], dtype=torch.int64)
    outside = given[(given < 0) | (given >= n)].tolist()
    if outside:
        raise ValueError(f"rows are positions among the {n} training examples, 0..{n - 1}, got {outside[:5]}")
    wanted, order = torch.unique(given, return_inverse=True)
    return wanted, order


def picked(stream: Iterator[Operand], rows: Tensor) -> Iterator[Operand]:
    """Some rows of a stream alone, counted by their places among those.

    Args:
        stream: operands at their rows among all stages.
        rows: the rows wanted, ``(n,)`` int64 on the CPU, ascending.
    """
    for operand in stream:
        low, high = torch.searchsorted(rows, torch.tensor([operand.start, operand.stop])).tolist()
        if low < high:
            own = (rows[low:high] - operand.start).to(operand.rows.device)
            scale, weights = (None if values is None else values[own] for values in (operand.scale, operand.weights))
            yield Operand(low, high, operand.rows[own], scale, weights, operand.codec)


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
