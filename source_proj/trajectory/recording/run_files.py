"""The files of a recorded run: what they hold, and how they are written so that no kill can spoil them.

A run is one directory::

    trajectory.json           which run this is, every checkpoint that counts, hashes of their files and of all this
    step_00000042.pt          the model's state_dict after 42 optimizer steps
    moments_00000042.pt       the second moments, by parameter name, of an optimizer that divides gradients by them
    optimizer_00000042.pt     what goes on from there: optimizer and random states, of the last checkpoint only
    capture_00000042.pt       what a companion of the recorder kept: of the last checkpoint, and of ends of segments
    recorder.lock             empty, and locked while a Recorder writes here

Files appear whole or not at all. ``trajectory.json`` comes last and alone decides what counts: whatever a kill leaves
half done is not named there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from source_proj._errors import MismatchError, MissingFileError, full_disk_named
from source_proj._io.files import PARTIAL, Content, walk, write_files
from source_proj._io.hashing import hash_file
from source_proj._io.json_records import read_json, read_record, write_record
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import Optimizer
from source_proj.trajectory.record import read_optimizer, write_optimizer
from source_proj.trajectory.recording.momentum import with_momentum_of

__all__ = [
    "RecordedCheckpoint",
    "RecordedRun",
    "UpdateRun",
    "capture_name",
    "check_file",
    "clip_factor",
    "describe_state",
    "moments_name",
    "recorders_own",
    "remove_unnamed",
    "require_same_run",
    "resume_name",
    "weights_name",
    "write_tensors",
]

_NAME = "trajectory.json"
_AGAIN = "call step() again, or just go on training: the step counts"
_CALLBACKS = "updates.jsonl"  # where integrations/callback_log.py keeps its record
_FORMAT = "source-proj recorded run"
_VERSION = 6
_UNTOLD = 5  # the version before, which does not say which steps were skipped
_MOST_STEPS = 10_000_000  # of a run; a larger count in a foreign file would fill the memory
_HEADER = {"format", "version"}
_KINDS = ("step", "moments", "optimizer", "capture")

UpdateRun = tuple[float, float, float, int]
"""Equal updates in a row: learning rate, what clipping multiplied the gradient by, time factor, and how many."""


@dataclass(frozen=True)
class RecordedCheckpoint:
    """One checkpoint: what its files hash to, and the updates that led to it.

    Args:
        step: optimizer steps taken until then.
        weights: SHA-256 of the file with the weights.
        moments: SHA-256 of the file with the optimizer's second moments, where it has any.
        updates: those since the checkpoint before.
        capture: SHA-256 of the file of the recorder's companion, where it has one.
        ends_segment: whether that file stays, and the companion began anew after it.
        skipped: numbers of those of the updates that were not made, from 0 at the run's beginning; None where that was
            not written down.

    Raises:
        ValueError: a number is out of its range.
    """

    step: int
    weights: str
    moments: str | None
    updates: tuple[UpdateRun, ...]
    capture: str | None = None
    ends_segment: bool = False
    skipped: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.step <= _MOST_STEPS:
            raise ValueError(f"step must be 1 to {_MOST_STEPS}, got {self.step}")
        for place, (rate, clip, factor, count) in enumerate(self.updates):
            if not (rate >= 0 and 0 <= clip <= 1 and factor > 0 and 1 <= count <= self.step):
                raise ValueError(
                    f"updates[{place}] must be a rate of at least 0, a clip factor of 0 to 1, a positive time factor "
                    f"and a count of 1 to {self.step}, got {[rate, clip, factor, count]}"
                )
        places = [self.step - self.count - 1, *(self.skipped or ()), self.step]
        if any(before >= after for before, after in pairwise(places)):
            raise ValueError(
                f"skipped must be numbers of the {self.count} updates to step {self.step}, in order and each once, got "
                f"{list(self.skipped or ())}"
            )

    @property
    def count(self) -> int:
        """Number of updates since the checkpoint before."""
        return sum(count for *_, count in self.updates)

    def open(self, directory: Path) -> Checkpoint:
        """Give the checkpoint, its bytes compared with what was recorded.

        Raises:
            MissingFileError: a file has gone.
            MismatchError: a file is not the one that was recorded.
        """
        weights, optimizer_state = directory / weights_name(self.step), directory / moments_name(self.step)
        check_file(weights, self.weights)
        if self.moments is not None:
            check_file(optimizer_state, self.moments)
        rate = self.updates[-1][0]
        return Checkpoint(weights, self.step, rate, None if self.moments is None else optimizer_state)


@dataclass(frozen=True)
class RecordedRun:
    """What ``trajectory.json`` says.

    Args:
        stage: name of the stage.
        optimizer: how it acted at first; of its options, the learning rate and momentum may change on the way.
        state: names, shapes and types of the model's state, see :func:`describe_state`.
        trained: names of the parameters that the optimizer has held and that required a gradient.
        checkpoints: in order of steps.
        resume: SHA-256 of the file that the run goes on from, once there is a checkpoint.

    Raises:
        ValueError: the updates of a checkpoint are not as many as its steps.
    """

    stage: str
    optimizer: Optimizer = field(metadata={"write": write_optimizer, "read": read_optimizer})
    state: dict[str, tuple[tuple[int, ...], str]]
    trained: tuple[str, ...]
    checkpoints: tuple[RecordedCheckpoint, ...] = ()
    resume: str | None = None

    def __post_init__(self) -> None:
        steps = [0, *(checkpoint.step for checkpoint in self.checkpoints)]
        for place, (before, after) in enumerate(pairwise(steps)):
            count = self.checkpoints[place].count
            if after <= before or count != after - before:
                raise ValueError(f"checkpoints[{place}] has {count} updates from step {before} to step {after}")
        if (self.resume is None) != (not self.checkpoints):
            raise ValueError(f"resume is {self.resume!r} with {len(self.checkpoints)} checkpoints")

    @property
    def last_step(self) -> int:
        """Step of the last checkpoint, 0 without any."""
        return self.checkpoints[-1].step if self.checkpoints else 0

    def rates(self) -> list[float]:
        """Learning rate of every update up to the last checkpoint."""
        return self._column(0)

    def clip_factors(self) -> list[float] | None:
        """What clipping multiplied every update's gradient by; None where nothing was clipped."""
        clipped = any(clip < 1 for checkpoint in self.checkpoints for _, clip, *_ in checkpoint.updates)
        return self._column(1) if clipped else None

    def time_factors(self) -> list[float] | None:
        """The optimizer's time factor at every update; None where it always was that of ``optimizer``."""
        own = self.optimizer.time_factor
        changed = any(factor != own for checkpoint in self.checkpoints for _, _, factor, _ in checkpoint.updates)
        return self._column(2) if changed else None

    def skipped(self) -> list[int] | None:
        """Numbers of the updates up to the last checkpoint that were not made; None where that is not known."""
        own = [number for checkpoint in self.checkpoints for number in checkpoint.skipped or ()]
        return None if any(checkpoint.skipped is None for checkpoint in self.checkpoints) else own

    def _column(self, place: int) -> list[float]:
        return [float(run[place]) for c in self.checkpoints for run in c.updates for _ in range(run[3])]

    def write(self, directory: Path) -> None:
        """Replace ``trajectory.json``, at one stroke."""
        content = {"format": _FORMAT, "version": _VERSION, **write_record(self)}
        with full_disk_named(directory / _NAME):
            write_files({directory / _NAME: json.dumps({**content, "digest": _digest(content)}).encode()})

    @classmethod
    def read(cls, directory: Path) -> RecordedRun | None:
        """Read ``trajectory.json``; None where there is none.

        Raises:
            MismatchError: the file is foreign or corrupt, or there are recorded files without it.
        """
        path = directory / _NAME
        if not os.path.lexists(path):
            if os.path.lexists(directory / _CALLBACKS):
                raise MismatchError(
                    f"{str(directory)!r} was recorded by a RecorderCallback: read it by "
                    "source_proj.Trajectory.from_hf_trainer (--hf-run on the command line); a Recorder needs a "
                    "directory of its own"
                )
            strays = sorted(file.name for file in _recorded_files(directory))
            if strays:
                raise MismatchError(f"{str(directory)!r} holds {strays[0]} but no {_NAME}: give an empty directory")
            return None
        try:
            content = dict(read_json(path))
            digest = content.pop("digest", None)
            kind = (content.get("format"), content.get("version"))
            if kind not in ((_FORMAT, _VERSION), (_FORMAT, _UNTOLD)):
                raise ValueError(f"format {kind[0]!r}, version {kind[1]!r}")
            if digest != _digest(content):
                raise ValueError("its content is not that of its digest: it was changed since")
            if kind == (_FORMAT, _UNTOLD):
                content["checkpoints"] = [{**one, "skipped": None} for one in content.get("checkpoints", ())]
            return read_record(cls, {name: content[name] for name in content.keys() - _HEADER}, _NAME)
        except (ValueError, TypeError, RecursionError) as error:
            raise MismatchError(
                f"{str(path)!r} was not written by a Recorder of this version ({type(error).__name__}: {error}): "
                "give an empty directory"
            ) from error


def recorders_own(directory: Path) -> str | None:
    """Where a folder holds the run of a Recorder: that it does, and how it is read; for messages of other readers."""
    if not (directory / _NAME).is_file():
        return None
    return f"{str(directory)!r} holds the run of a Recorder: read it by Trajectory.from_recorder({str(directory)!r})"


def clip_factor(norm: float, most: float) -> float:
    """What :func:`torch.nn.utils.clip_grad_norm_` multiplies a gradient of a norm by, to bring it to the most allowed.

    >>> clip_factor(0.5, 1.0), clip_factor(4.0 - 1e-6, 1.0)
    (1.0, 0.25)
    """
    return min(1.0, most / (norm + 1e-6))


def weights_name(step: int) -> str:
    """Name of the file with the weights after so many steps."""
    return f"step_{step:08d}.pt"


def moments_name(step: int) -> str:
    """Name of the file with the optimizer's second moments after so many steps."""
    return f"moments_{step:08d}.pt"


def resume_name(step: int) -> str:
    """Name of the file that the run goes on from after so many steps."""
    return f"optimizer_{step:08d}.pt"


def capture_name(step: int) -> str:
    """Name of the file of the recorder's companion after so many steps."""
    return f"capture_{step:08d}.pt"


def describe_state(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Say of each entry of a model's state its shape and type.

    Raises:
        ValueError: an entry is no tensor.
    """
    described = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"the model's state has {name!r}, a {type(value).__name__}: only tensors can be recorded")
        described[name] = (tuple(value.shape), str(value.dtype).removeprefix("torch."))
    return described


def write_tensors(contents: Mapping[Path, Mapping[str, Any]]) -> list[str]:
    """Write what :func:`torch.load` reads back with ``weights_only=True``; equal content gives equal bytes.

    Returns:
        SHA-256 of the files, in hex.

    Raises:
        OSError: a file cannot be written.
    """

    def saved(content: Mapping[str, Any]) -> Content:
        def save(file: IO[bytes]) -> None:  # an open file, because torch writes a path's name into the archive
            try:
                torch.save(dict(content), file)
            except RuntimeError as error:  # torch's archive puts one in the place of a full disk's own error
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

        return save

    with full_disk_named(next(iter(contents)), _AGAIN):
        write_files({path: saved(content) for path, content in contents.items()})
    return [hash_file(path) for path in contents]


def remove_unnamed(directory: Path, run: RecordedRun) -> None:
    """Remove recorded files that a run does not name: superseded ones, and what interruptions left."""
    names = {name(c.step) for c in run.checkpoints for name in (weights_name, moments_name)}
    names |= {resume_name(run.last_step), capture_name(run.last_step)}
    names |= {capture_name(c.step) for c in run.checkpoints if c.ends_segment}
    partial = (file for file in walk(directory) if file.name.endswith(PARTIAL))
    for file in [*_recorded_files(directory), *partial]:
        if file.name not in names and not (file.is_dir() and not file.is_symlink()):  # a folder is none of ours
            file.unlink(missing_ok=True)


def require_same_run(directory: Path, there: RecordedRun, here: RecordedRun) -> None:
    """Refuse to go on with the run of another model, optimizer or stage.

    Raises:
        MismatchError: they differ; names what.
    """
    differing = [n for n in (*there.state, *here.state) if there.state.get(n) != here.state.get(n)]
    if differing:
        name = differing[0]
        raise MismatchError(
            f"{str(directory)!r} holds a run of another model: {name} is {there.state.get(name, 'absent')} there "
            f"and {here.state.get(name, 'absent')} here; give an empty directory"
        )
    cycled = there.time_factors() is not None  # its momentum is at another point of the cycle, as its learning rate is
    own = with_momentum_of(there.optimizer, here.optimizer) if cycled else here.optimizer
    for what, its, ours in (("stage", there.stage, here.stage), ("optimizer", there.optimizer, own)):
        if its != ours:
            raise MismatchError(
                f"{str(directory)!r} holds a run whose {what} is {its!r}, not {ours!r}: give an empty directory"
            )


def check_file(path: Path, recorded: str) -> None:
    """Refuse a file that is not what was recorded.

    Args:
        path: the file.
        recorded: SHA-256 of its bytes.

    Raises:
        MissingFileError: there is no such file.
        MismatchError: it cannot be read, or has other bytes.
    """
    if not path.is_file():
        raise MissingFileError(
            f"there is no file {str(path)!r}, which was recorded: bring it back, or record anew in an empty directory"
        )
    try:
        present = hash_file(path)
    except OSError as error:
        raise MismatchError(f"{str(path)!r} cannot be read ({error}): make it readable") from error
    if present != recorded:
        raise MismatchError(
            f"{str(path)!r} has SHA-256 {present[:16]}…, but {recorded[:16]}… was recorded: it was changed since; "
            "bring the file back, or record anew in an empty directory"
        )


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a document's entries, in whatever order they stand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _recorded_files(directory: Path) -> list[Path]:
    pattern = re.compile(rf"({'|'.join(_KINDS)})_\d{{8}}\.pt")
    return [file for file in directory.iterdir() if pattern.fullmatch(file.name)] if directory.is_dir() else []
