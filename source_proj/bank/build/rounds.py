"""Batches of a model that several processes run together, so that each makes as many passes as the others.

The leader hands out shards, one to each process, in rounds. Who gets none makes the last one's rows once more and drops
them; who has fewer batches than others repeats its last one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from source_proj.bank.build.data import Batch, BatchSource
from source_proj.bank.layout import PartSpec
from source_proj.trajectory.placement import Lockstep

__all__ = ["Loaded", "loaded_in_rounds"]


@dataclass(frozen=True)
class Loaded:
    """A batch to make rows of.

    Attributes:
        start: its first row.
        stop: behind its last row.
        batch: the examples.
        rows: how many rows all processes make and keep with this batch.
        kept: whether this process keeps its own.
    """

    start: int
    stop: int
    batch: Batch
    rows: int
    kept: bool = True


def loaded_in_rounds(
    source: BatchSource, spec: PartSpec, shards: Iterator[int], lockstep: Lockstep
) -> Iterator[Loaded]:
    """The batches of the shards that are this process's.

    Args:
        source: the examples.
        spec: the part's.
        shards: the shards to make; the leader's count.
        lockstep: the processes.
    """
    if lockstep.size == 1:
        for start, stop, batch in source.load(map(spec.span, shards)):
            yield Loaded(start, stop, batch, stop - start)
        return
    for dealt in lockstep.followed(iter(lambda: list(islice(shards, lockstep.size)), [])):
        heights = [[stop - start for start, stop in _batches(spec, shard)] for shard in dealt]
        kept = lockstep.rank < len(dealt)
        own = dealt[lockstep.rank] if kept else dealt[-1]
        batches = source.load([spec.span(own)])
        start, stop, batch = 0, 0, None
        for place in range(max(map(len, heights))):
            start, stop, batch = next(batches, (start, stop, batch))
            rows = sum(height[place] for height in heights if place < len(height))
            again = place >= len(_batches(spec, own))
            yield Loaded(start, stop, batch, rows, kept=kept and not again)


def _batches(spec: PartSpec, shard: int) -> list[tuple[int, int]]:
    start, stop = spec.span(shard)
    return [(low, min(stop, low + spec.batch_size)) for low in range(start, stop, spec.batch_size)]
