"""Shards of banks in groups, each of them one task of an executor, whose results are added up in order.

Which shards make a group depends on how many there are, never on who does the work: one process and any number of
workers add the same numbers in the same order. Up to 256 shards each are a group.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from source_proj._io.executors import Executor, map_in_order
from source_proj._io.progress import tick, unshared
from source_proj.bank import Bank, StageBank

__all__ = ["ShardGroup", "Span", "map_shards", "map_spans", "row_spans", "shard_groups"]

_GROUPS = 256

ShardGroup = list[tuple[int, range]]
"""Checkpoints, and shards of the stage at each."""

Span = tuple[int, int]
"""First row and end, among the rows of all stages."""

Result = TypeVar("Result")


def shard_groups(stage: StageBank, checkpoints: Sequence[int], most: int | None = None) -> list[ShardGroup]:
    """The shards of a stage at some checkpoints, which follow each other, in at most 256 groups or another number."""
    count = len(stage.shard_spans)
    total = count * len(checkpoints)
    size = max(1, -(-total // (most or _GROUPS)))
    return [
        [
            (checkpoint, range(max(0, start - place * count), min(count, start + size - place * count)))
            for place, checkpoint in enumerate(checkpoints)
            if start < (place + 1) * count and place * count < start + size
        ]
        for start in range(0, total, size)
    ]


def row_spans(bank: Bank, stages: Sequence[int] | None = None, *, row_bytes: int = 0, limit: int = 1) -> list[Span]:
    """The rows of some stages, by default all, in spans of whole shards.

    There are at most 256, or more where results of ``row_bytes`` for each row would exceed the limit.
    """
    spans, first = [], 0
    for index, stage in enumerate(bank.stages):
        if stages is None or index in stages:
            spans += [(first + start, first + stop) for start, stop in stage.shard_spans]
        first += stage.n
    rows = sum(stop - start for start, stop in spans)
    size = max(1, min(-(-len(spans) // _GROUPS), len(spans) // max(1, -(-rows * row_bytes // limit))))
    groups = (spans[start : start + size] for start in range(0, len(spans), size))
    return [(group[0][0], group[-1][1]) for group in groups]


def map_shards(
    executor: Executor | None,
    function: Callable[[ShardGroup], Result],
    stage: StageBank,
    groups: Sequence[ShardGroup],
    *,
    nbytes: int = 0,
) -> Iterator[Result]:
    """Yield ``function(group)`` of each group of shards, in order; see :func:`map_in_order`."""
    rows = [
        sum(stop - start for _, shards in group for start, stop in stage.shard_spans[shards.start : shards.stop])
        for group in groups
    ]
    return _counted(executor, function, groups, rows, nbytes)


def map_spans(
    executor: Executor | None, function: Callable[[Span], Result], spans: Sequence[Span], *, row_bytes: int = 0
) -> Iterator[Result]:
    """Yield ``function(span)`` of each span of rows, in order; see :func:`map_in_order`."""
    rows = [stop - start for start, stop in spans]
    return _counted(executor, function, spans, rows, row_bytes * max(rows, default=0))


def _counted(
    executor: Executor | None, function: Callable[[Any], Result], tasks: Sequence[Any], rows: Sequence[int], nbytes: int
) -> Iterator[Result]:
    """The results, on the CPU if others made them; their rows are then counted here, and not where they are read."""
    if executor is None:
        yield from map(function, tasks)
        return
    for count, result in zip(rows, map_in_order(executor, partial(_sent, function), tasks, nbytes=nbytes), strict=True):
        tick(count)
        yield result


def _sent(function: Callable[[Any], Any], task: Any) -> Any:
    with unshared():
        return _on_cpu(function(task))


def _on_cpu(result: Any) -> Any:
    """Tensors in lists and tuples as other machines can read them."""
    if isinstance(result, Tensor):
        return result.detach().cpu()
    if isinstance(result, list | tuple):
        return type(result)(map(_on_cpu, result))
    return result
