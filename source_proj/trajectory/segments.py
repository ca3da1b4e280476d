"""Segments: which checkpoints stand for which stretch of training, and how long each stretch was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from source_proj.trajectory.optimizers import optimizer_from_spec

__all__ = ["Segments", "segment_decays", "segment_times", "split_segments"]

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
    if isinstance(segments, int):
        if isinstance(segments, bool) or not 1 <= segments <= count:
            raise ValueError(f"{count} checkpoints can be cut into 1 to {count} segments, got segments={segments}")
        short, longer = divmod(count, segments)
        ends = accumulate([short + (i < longer) for i in range(segments)], initial=0)
        return [list(range(begin, end)) for begin, end in pairwise(ends)]
    if not all(isinstance(group, Sequence) and not isinstance(group, str) for group in segments):
        raise TypeError(
            f"segments must be a number, or lists of checkpoint indices such as [[0, 1], [2]]: {segments!r}"
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


def segment_times(stage_spec: Mapping[str, Any], segments: Segments) -> list[float]:
    r"""Time scale of each segment, :math:`s_l = \sum_t η_t` times the optimizer's ``time_factor``.

    Where the stage's preconditioner was replaced by one number a checkpoint, ``scalars``, each interval between
    checkpoints counts times the number of the checkpoint that ends it.

    Args:
        stage_spec: what ``Stage.spec()`` gave.
        segments: the stage's segments, or others to look at it by.

    Example:
        >>> spec = {"optimizer": {"name": "SGD", "momentum": 0.5}, "lr_integrals": [1.0, 1.5, 4.0]}
        >>> segment_times(spec, [[0, 1], [2]])
        [3.0, 5.0]
    """
    integrals = stage_spec["lr_integrals"]
    factor = optimizer_from_spec(stage_spec["optimizer"]).time_factor
    groups = split_segments(len(integrals), segments)
    if "scalars" in stage_spec:
        return [factor * sum(_weighted(integrals, stage_spec["scalars"], group)) for group in groups]
    ends = [0.0, *(integrals[group[-1]] for group in groups)]
    return [factor * (end - begin) for begin, end in pairwise(ends)]


def segment_decays(stage_spec: Mapping[str, Any], segments: Segments) -> list[float]:
    """Weight decay λ of each segment, per unit of its time scale: over a segment, weights decay by exp(-λ s) in all.

    It is the optimizer's, unless it differs between parameters (``decays`` then holds one number a checkpoint), the
    gradient was clipped (the decay was not), or ``scalars`` measure the time.

    Example:
        >>> spec = {"optimizer": {"name": "SGD", "weight_decay": 0.5}, "lr_integrals": [1.0, 2.0]}
        >>> segment_decays({**spec, "lr_sums": [2.0, 4.0]}, 1)  # half of every gradient was clipped away
        [1.0]
    """
    integrals = stage_spec["lr_integrals"]
    optimizer = optimizer_from_spec(stage_spec["optimizer"])
    groups = split_segments(len(integrals), segments)
    if not {"decays", "scalars", "lr_sums"} & set(stage_spec):
        return [float(optimizer.weight_decay)] * len(groups)
    decays = stage_spec.get("decays", [optimizer.weight_decay] * len(integrals))
    times = segment_times(stage_spec, groups)
    sums = stage_spec.get("lr_sums", integrals)
    totals = [optimizer.time_factor * sum(_weighted(sums, decays, group)) for group in groups]
    return [total / time if time > 0 else 0.0 for total, time in zip(totals, times, strict=True)]


def _weighted(integrals: Sequence[float], weights: Sequence[float], group: Sequence[int]) -> list[float]:
    """Each checkpoint's weight times the learning rate integrated since the checkpoint before."""
    return [weights[c] * (integrals[c] - (integrals[c - 1] if c else 0.0)) for c in group]
