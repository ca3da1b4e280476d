"""Runs that stand still by their record: the same weights at two steps, as of a copied file, or no learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from source_proj.trajectory.stages import Stage

__all__ = ["warn_of_copies", "warn_without_rate"]

_CALLER = 9  # of sp.build, whose line is named


def warn_of_copies(stage: Stage) -> None:
    """Tell of two checkpoint files of the same bytes, between which updates with a learning rate were made.

    Of states given as dicts nothing is said: training may stand still to the last bit, and a trial take one state for
    all.

    Warns:
        UserWarning: names both.
    """
    seen: dict[str, int] = {}
    times = stage.lr_integrals
    for place, checkpoint in enumerate(stage.checkpoints):
        if checkpoint.path is None:
            continue
        first = seen.setdefault(checkpoint.hash(), place)
        if times[place] > times[first]:
            warnings.warn(
                f"{stage.checkpoints[first]!r} and {checkpoint!r} of stage {stage.name!r} hold the same weights, with "
                "updates between them: a file was given or copied twice, or nothing was trained. Give each step's own",
                UserWarning,
                stacklevel=_CALLER,
            )
            return


def warn_without_rate(stages: Sequence[Stage]) -> None:
    """Tell of a run whose every update has the learning rate 0: the predicted effect of any example is 0.

    Warns:
        UserWarning: it is such a run.
    """
    if not any(stage.lr_integrals[-1] for stage in stages):
        warnings.warn(
            "all learning rates of the run are 0, or all its updates were skipped: no example had an effect, and "
            "SOURCE's scores are all 0. Give the rates of training, Checkpoint(..., lr=0.1) or lr_schedule",
            UserWarning,
            stacklevel=_CALLER - 2,
        )
