"""Segments: which checkpoints stand for which stretch of training."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate, pairwise

__all__ = ["Segments", "split_segments"]

Segments = int | Sequence[Sequence[int]]
"""How many segments, or the checkpoint indices of each."""


def split_segments(count: int, segments: Segments) -> list[list[int]]:
    """Cut ``count`` checkpoints into segments.

    Args:
        count: number of checkpoints.
        segments: number of contiguous groups, as equal as possible, longer ones first; or the groups themselves.

    Raises:
        ValueError: the groups are no partition of the checkpoints in order; the message names the culprit.
        TypeError: neither a number nor lists of indices.

    Example:
        >>> split_segments(5, 2)
        [[0, 1, 2], [3, 4]]
        >>> split_segments(3, [[0], [1, 2]])
        [[0], [1, 2]]
    """
    number = _number(segments)
    if number is not None:
        if isinstance(segments, bool) or not 1 <= number <= count:
            raise ValueError(f"{count} checkpoints can be cut into 1 to {count} segments, got segments={segments}")
        short, longer = divmod(count, number)
        ends = accumulate([short + (i < longer) for i in range(number)], initial=0)
        return [list(range(begin, end)) for begin, end in pairwise(ends)]
    if isinstance(segments, int) or not all(map(_is_list, [segments, *(segments if _is_list(segments) else [])])):
        raise TypeError(
            f"segments must be a whole number, or lists of checkpoint indices such as [[0, 1], [2]]: got {segments!r}"
        )
    groups = [list(group) for group in segments]
    if [] in groups:
        raise ValueError(f"segment {groups.index([])} of {groups} has no checkpoint: leave it out")
    for expected, index in enumerate(index for group in groups for index in group):
        if isinstance(index, bool) or index != expected or expected == count:
            raise ValueError(
                f"segments must name the checkpoints 0 to {count - 1} once each and in order, "
                f"but {groups} has {index!r} where {expected if expected < count else 'the end'} should be"
            )
    named = sum(map(len, groups))
    if named < count:
        raise ValueError(
            f"segments {groups} leave out the checkpoints from {named} to {count - 1}: give each its place"
        )
    return [[int(index) for index in group] for group in groups]


def _is_list(given: object) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


def _number(segments: object) -> int | None:
    """A whole number of any type, as an int; None for all else."""
    try:
        return operator.index(segments)  # type: ignore[arg-type]
    except TypeError:
        return None
