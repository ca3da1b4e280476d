"""A trajectory from the checkpoints that Lightning left."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj._io.loading import load_tensors
from source_proj._io.outputs import from_home
from source_proj.integrations.lightning_rates import SavedSchedule, logged_values, momenta, of_updates, rates
from source_proj.integrations.moments_follow import moments_contradict
from source_proj.integrations.momentum import GivenValues, has_momentum, require_momentum, time_factors
from source_proj.trajectory import Checkpoint, Optimizer, PreconditionerMode, Segments, Stage
from source_proj.trajectory.layouts import averaged_keys, model_state
from source_proj.trajectory.optimizers.describe import describe_state
from source_proj.trajectory.recording.momentum import require_integrable
from source_proj.trajectory.recording.run_files import recorders_own

__all__ = ["lightning_stage"]

_TWIN = "-EMA"  # what NeMo adds to the name of the file with averaged weights
_REMEDY = (
    "give the one folder of the run that is meant, choose steps=, or put one run's files (also of a run that was "
    "resumed into another folder) together in a folder of their own"
)


@dataclass(frozen=True)
class _Saved(SavedSchedule):
    """One ``.ckpt`` file, without its weights."""

    path: Path
    averaged: bool


def lightning_stage(
    dir: str | Path,
    segments: Segments = 1,
    stage: str = "train",
    *,
    prefix: str = "",
    optimizer: Optimizer | None = None,
    schedule: GivenValues | None = None,
    momentum: GivenValues | None = None,
    clip_factors: Sequence[float] | None = None,
    metrics: str | Path | None = None,
    steps: Sequence[int] | None = None,
    unpickle: bool = False,
    weights: Literal["trained", "averaged"] = "trained",
    preconditioner: PreconditionerMode = "scalar",
) -> Stage:
    """Read the ``.ckpt`` files of a Lightning run as one stage of training.

    Time runs in optimizer steps (``global_step``); Lightning averages the gradients of accumulated batches. Learning
    rates come from ``schedule``, else from the saved state of a OneCycleLR, else from the ``metrics.csv`` of a
    CSVLogger with a LearningRateMonitor, where equal rates before and after steps that were not logged hold in between
    (unless the schedule repeats itself), else from the optimizer's state, if the rate is constant. A log counts
    batches: of a module with manual optimization that does not step once a batch it tells nothing. A momentum that
    changes comes from the same places, and every update's own enters the time scale. Lightning keeps neither gradient
    norms nor ``gradient_clip_val``: nothing is assumed to be clipped, unless ``clip_factors`` are given.

    Args:
        dir: directory with the files of one run, in it or below, all in one folder; such as a logger's ``version_0``.
        segments: number of segments, or lists of checkpoint indices.
        stage: the stage's name.
        prefix: what the names of the wanted weights begin with, such as ``"model."``; it is cut off, and weights
            without it are left out. Default: all, for the LightningModule itself.
        optimizer: how gradients became steps; default: as the files say.
        schedule: learning rate of every update, a function of its number or one value each.
        momentum: of every update, likewise, where it is the optimizer's own that changed (SGD, RMSprop).
        clip_factors: of every update; see :class:`Stage`.
        metrics: the ``metrics.csv``; default: the one in ``dir``, below it, or in the directory above.
        steps: global steps of the checkpoints to use; default: all.
        weights: which to take where the files also hold averages over training (EMA, SWA): the trained ones, whose
            gradients made the steps, or the averaged ones.
        unpickle: read files that hold more than tensors and plain values, which runs code that they contain.
        preconditioner: as in :class:`Stage`.

    Raises:
        FileNotFoundError: no ``.ckpt`` file, or not the wanted ones.
        ValueError: something cannot be inferred; the message names the argument to give.
        MismatchError: a file is none of Lightning's, the rates contradict each other, or the files are of several runs.

    Warns:
        UserWarning: if there are averaged weights, and the trained ones were taken.
    """
    if weights not in ("trained", "averaged"):
        raise ValueError(f"weights must be 'trained' or 'averaged', got {weights!r}")
    saved = _saved(from_home(dir).absolute(), steps, unpickle)
    last = saved[-1]
    logged = of_updates(saved, logged_values(from_home(dir).absolute(), metrics))
    lr_schedule = rates(saved, logged.rates, schedule)
    if optimizer is None:
        optimizer = describe_state(last.optimizer, last.path.name)
        for file in saved:
            require_integrable(optimizer, describe_state(file.optimizer, file.path.name), file.step)
    kept_apart = bool(prefix) or unpickle or weights == "averaged"
    if weights == "trained" and any(file.averaged for file in saved):
        warnings.warn(
            f"{str(dir)!r} has averaged weights too (EMA or SWA), and the trained ones were taken: weights='averaged' "
            "takes the others",
            UserWarning,
            stacklevel=3,
        )
    checkpoints = [
        Checkpoint(
            _weights(file, prefix, unpickle, weights) if kept_apart or file.averaged else file.path,
            file.step,
            optimizer_state=(file.optimizer if unpickle else file.path) if optimizer.preconditioned else None,
        )
        for file in saved
    ]
    return Stage(
        stage,
        checkpoints,
        optimizer,
        segments,
        lr_schedule=lr_schedule,
        preconditioner=preconditioner,
        clip_factors=clip_factors,
        time_factors=_time_factors(optimizer, saved, logged.momenta, momentum),
    )


def _time_factors(
    optimizer: Optimizer, saved: Sequence[_Saved], logged: Mapping[int, float], given: GivenValues | None
) -> list[float] | None:
    """The optimizer's ``time_factor`` at each update; None where its momentum never changed, or plays no part in it."""
    require_momentum(optimizer, given)
    if not has_momentum(optimizer):
        return None
    own = momenta(saved, logged, given)
    return time_factors(optimizer, own) if len(set(own)) > 1 else None


def _saved(directory: Path, steps: Sequence[int] | None, unpickle: bool) -> list[_Saved]:
    files = sorted(directory.rglob("*.ckpt"), key=lambda file: (file.stem.startswith("last"), str(file)))
    found: dict[int, list[_Saved]] = {}
    for file in files:
        if not file.stem.endswith(_TWIN):
            checkpoint = _read(file, unpickle)
            found.setdefault(checkpoint.step, []).append(checkpoint)
    if not found:
        where = f"{str(directory)!r} {'holds no .ckpt file' if directory.exists() else 'does not exist'}"
        raise FileNotFoundError(recorders_own(directory) or f"{where}: give the folder that Lightning's are in")
    chosen = sorted(found if steps is None else set(steps))
    if not chosen or not set(chosen) <= set(found):
        wanted = "" if steps is None else f"steps={list(steps)}: "
        raise FileNotFoundError(f"{wanted}{str(directory)!r} has .ckpt files of the global steps {sorted(found)} alone")
    return _one_run([found[step] for step in chosen], unpickle)


def _one_run(found: Sequence[Sequence[_Saved]], unpickle: bool) -> list[_Saved]:
    """One file of each step, all from one folder: Lightning gives each run a folder of its own (version_0, version_1).

    Args:
        found: the files of each step.
        unpickle: as for the stage.

    Raises:
        MismatchError: files of one step hold different weights, no folder holds all steps, or an optimizer's moments
            cannot have become those of the next step.
    """
    for first, *others in found:
        for other in others:  # last.ckpt is a copy of another one
            if not _same_weights(first, other, unpickle):
                raise MismatchError(
                    f"{str(first.path)!r} and {str(other.path)!r} are both of global step {first.step}, with different "
                    f"weights: they come from different runs; {_REMEDY}"
                )
    folders = Counter(parent for files in found for parent in {file.path.parent for file in files})
    folder, most = max(folders.items(), key=lambda item: (item[1], str(item[0])))
    if most < len(found):
        elsewhere = next(files for files in found if all(file.path.parent != folder for file in files))[0].path.parent
        raise MismatchError(
            f"{str(folder)!r} and {str(elsewhere)!r} both hold .ckpt files, which are those of two runs as "
            f"far as can be told; {_REMEDY}"
        )
    run = [next(file for file in files if file.path.parent == folder) for files in found]
    for before, after in pairwise(run):
        if moments_contradict(before.optimizer, after.optimizer):
            raise MismatchError(
                f"the second moments in {str(before.path)!r} cannot have become those in {after.path.name!r}: they "
                f"come from different runs; {_REMEDY}"
            )
    return run


def _same_weights(first: _Saved, other: _Saved, unpickle: bool) -> bool:
    states = [model_state(_load(file.path, unpickle), str(file.path)) for file in (first, other)]
    own, its = ({name: value for name, value in state.items() if isinstance(value, Tensor)} for state in states)
    return own.keys() == its.keys() and all(
        torch.equal(torch.nan_to_num(value), torch.nan_to_num(its[name])) for name, value in own.items()
    )


def _read(file: Path, unpickle: bool) -> _Saved:
    content = _load(file, unpickle)
    states = content.get("optimizer_states")
    if "global_step" not in content or not isinstance(states, list) or "state_dict" not in content:
        raise MismatchError(
            f"{str(file)!r} has the entries {sorted(map(str, content))}, and Lightning's checkpoints have global_step, "
            "state_dict and optimizer_states (save_weights_only=True leaves those out): give the whole checkpoints"
        )
    if len(states) != 1:
        raise ValueError(
            f"{str(file)!r} holds the states of {len(states)} optimizers, and a stage has one: make stages"
        )
    averaged = _averaged(content, file, unpickle) is not None
    schedulers = content.get("lr_schedulers") or []
    return _Saved(int(content["global_step"]), _batches(content), states[0], schedulers, file, averaged)


def _batches(content: Mapping[str, Any]) -> int | None:
    """How many batches Lightning's logs have counted."""
    loop = content.get("loops")
    for key in ("fit_loop", "epoch_loop.state_dict"):
        loop = loop.get(key) if isinstance(loop, Mapping) else None
    return loop.get("_batches_that_stepped") if isinstance(loop, Mapping) else None


def _load(file: Path, unpickle: bool) -> dict[str, Any]:
    remedy = "if you trust whoever wrote it, unpickle=True reads other objects too"
    content = load_tensors(file, remedy, unpickle=unpickle)
    if not isinstance(content, dict):
        raise MismatchError(f"{str(file)!r} holds a {type(content).__name__}, and Lightning's checkpoints are dicts")
    return content


def _averaged(content: Mapping[str, Any], file: Path, unpickle: bool) -> Mapping[str, Any] | None:
    """Averages of the weights over training: in an entry of the file, of a callback in it, or in a file beside it."""
    callbacks = content.get("callbacks")
    kept = [entry for entry in callbacks.values() if isinstance(entry, Mapping)] if callbacks else []
    twin = file.with_name(f"{file.stem}{_TWIN}{file.suffix}")
    states: list[Mapping[str, Any] | None] = [content[key] for key in averaged_keys(content)]
    states += [entry.get("average_model_state") for entry in kept]
    states += [_load(twin, unpickle)["state_dict"]] if twin.is_file() else []
    return next((state for state in states if state), None)


def _weights(saved: _Saved, prefix: str, unpickle: bool, which: str) -> dict[str, Any]:
    content = _load(saved.path, unpickle)
    state = model_state(content, str(saved.path)) if which == "trained" else _averaged(content, saved.path, unpickle)
    if state is None:
        raise ValueError(f"{str(saved.path)!r} holds no averaged weights (weights='averaged'): leave it out by steps=")
    wanted = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not wanted:
        raise ValueError(f"no weight in {str(saved.path)!r} begins with prefix={prefix!r}: they are {list(state)[:8]}")
    return wanted
