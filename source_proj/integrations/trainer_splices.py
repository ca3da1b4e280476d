"""Whether two ``checkpoint-N`` folders can be of one run: one that is begun anew leaves the former's folders there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from source_proj.integrations.moments_follow import moments_contradict
from source_proj.integrations.trainer_arguments import trainer_arguments
from source_proj.integrations.trainer_folder import TrainerFolder, read_tensors
from source_proj.trajectory.layouts import weights_file

__all__ = ["splice"]


def splice(folder: TrainerFolder, later: TrainerFolder) -> str | None:
    """What says that two checkpoints come from different runs; None where nothing does.

    A run that is resumed reads the earlier ``trainer_state.json`` and goes on with it, whatever else is changed: that
    log is the beginning of the later one's. Where nothing was logged, an optimizer's moments may tell, and the order in
    which folders were written.

    Args:
        folder: a checkpoint.
        later: one of a larger step.
    """
    return (
        _other_log(folder, later) or _shrunk(folder, later) or _written_after(folder, later) or _moments(folder, later)
    )


def _other_log(folder: TrainerFolder, later: TrainerFolder) -> str | None:
    """Entries up to a checkpoint's own step, whose last ones may have been logged after it was saved."""
    own = [entry for entry in folder.history if _step(entry) <= folder.step]
    its = [entry for entry in later.history if _step(entry) <= folder.step]
    for mine, other in zip_longest(own, its, fillvalue=None):
        if mine is None and other is not None and _step(other) >= folder.step:
            return None
        if json.dumps(mine, sort_keys=True) != json.dumps(other, sort_keys=True):  # where NaN is NaN
            return _difference(folder, later, mine or {}, other or {})
    return None


def _difference(folder: TrainerFolder, later: TrainerFolder, mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    step = mine.get("step", other.get("step"))
    names = [name for name in {**mine, **other} if json.dumps(mine.get(name)) != json.dumps(other.get(name))]
    name = next((name for name in ("learning_rate", "loss") if name in names), names[0])
    told, instead = (entry.get(name, "none") if entry.get("step") == step else "none" for entry in (mine, other))
    return (
        f"{str(folder.path)!r} logged the {name.replace('_', ' ')} {told} at step {step}, and {later.path.name!r} has "
        f"{instead} there"
    )


def _shrunk(folder: TrainerFolder, later: TrainerFolder) -> str | None:
    """Counts grow, also over a resume."""
    for name, mine in folder.grown.items():
        other = later.grown.get(name, mine)
        if mine > other:
            return f"{str(folder.path)!r} has {name}={mine:g}, and {later.path.name!r}, which is later, {other:g}"
    return None


def _written_after(folder: TrainerFolder, later: TrainerFolder) -> str | None:
    """A process of other arguments wrote the earlier checkpoint after the later one.

    Times alone do not tell: a copy may have its own, in any order.
    """
    mine, other = trainer_arguments(folder.path), trainer_arguments(later.path)
    names = [name for name in mine if name in other and mine[name] != other[name]]
    written = _written(folder), _written(later)
    if not names or not written[0] or not written[1] or written[0][0] <= written[1][-1]:
        return None
    name = next((name for name in ("seed", "learning_rate") if name in names), names[0])
    return (
        f"{str(folder.path)!r} was written after {later.path.name!r}, with {name}={mine[name]:g} and not "
        f"{other[name]:g}"
    )


def _written(folder: TrainerFolder) -> Sequence[int]:
    """When the first and the last of some files were written; nothing if not in the Trainer's order, as of a copy."""
    weights = weights_file(folder.path)
    files = [folder.path / name for name in ("training_args.bin", "optimizer.pt")]
    if weights is None or not all(file.is_file() for file in files):
        return ()
    times = [file.stat().st_mtime_ns for file in (weights, *files)]
    return times if times == sorted(times) and times[0] < times[-1] else ()


def _moments(folder: TrainerFolder, later: TrainerFolder) -> str | None:
    files = [each.path / "optimizer.pt" for each in (folder, later)]
    if not all(file.is_file() for file in files):
        return None
    states = [read_tensors(file) for file in files]
    if not all({"state", "param_groups"} <= state.keys() for state in states):
        return None  # what is wrong with it, its reader says
    if moments_contradict(*states):
        return (
            f"the second moments in optimizer.pt of {str(folder.path)!r} cannot have become those of "
            f"{later.path.name!r} in the steps between"
        )
    return None


def _step(entry: Mapping[str, Any]) -> int:
    return int(entry.get("step", 0))
