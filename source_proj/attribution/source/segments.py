"""Segments of training: which checkpoints they average, and what was fitted for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from source_proj.bank import Bank
from source_proj.trajectory import Segments

__all__ = ["Groups", "Segment", "StageSegments", "stage_groups"]

StageSegments = Segments | Mapping[str, Segments]
"""How checkpoints fall into segments; of several stages, by their names."""

Groups = list[list[list[int]]]
"""For each stage, for each segment of it, which checkpoints it averages."""


@dataclass(frozen=True)
class Segment:
    """One segment of training, as fitted.

    Attributes:
        stage: index of its stage.
        name: stage name and checkpoint steps, for people.
        checkpoints: which checkpoints of the stage are averaged.
        time: time scale s (learning rate integrated over the optimizer's steps, momentum and ``time_scale`` included).
        decay: weight decay λ.
        n: number of training examples of its stage.
        trace: tr(Ĥ).
        damping: what was added to the eigenvalues inside c.
        metric: the bank's metric that the segment's rows are in; 0 without a preconditioner.
    """

    stage: int
    name: str
    checkpoints: tuple[int, ...]
    time: float
    decay: float
    n: int
    trace: float
    damping: float
    metric: int = 0


def stage_groups(bank: Bank, segments: StageSegments | None) -> Groups:
    """Which checkpoints make a segment, by the argument ``segments`` of :class:`Source`.

    Raises:
        ValueError: they are no ordered partition of a stage's checkpoints, name unknown stages, or join metrics.
    """
    names = [stage.name for stage in bank.stages]
    if isinstance(segments, Mapping):
        unknown = [name for name in segments if name not in names]
        if unknown:
            raise ValueError(f"segments name unknown stages {unknown}; the bank's stages are {names}")
        chosen: list[Segments | None] = [segments.get(name) for name in names]
    elif segments is None or not isinstance(segments, Sequence):  # a number of any type that counts
        chosen = [segments] * len(names)
    elif len(names) == 1:
        chosen = [segments]
    else:
        raise ValueError(f"give segments per stage, as a mapping from the names {names}, not one list for all")
    return [
        [list(cut.checkpoints) for cut in stage.record.cut(segmentation)]
        for stage, segmentation in zip(bank.stages, chosen, strict=True)
    ]
