"""The files of a recorded run: what they hold, and how they are written so that no kill can spoil them.

A run is one directory::

    trajectory.json           which run this is, and every checkpoint that counts
    step_00000042.pt          the model's state_dict after 42 optimizer steps
    moments_00000042.pt       the second moments, by parameter name, of an optimizer that divides gradients by them
    optimizer_00000042.pt     what goes on from there: optimizer and random states, of the last checkpoint only

A file is written beside its place, flushed to the disk and renamed into it. ``trajectory.json`` comes last and alone
decides what counts: whatever a kill leaves half done is not named there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from source_proj._errors import MismatchError
from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import Optimizer, optimizer_from_spec
from source_proj.trajectory.state_files import hash_file

__all__ = [
    "Record",
    "RecordedCheckpoint",
    "Update",
    "check_hash",
    "clip_factor",
    "describe_state",
    "moments_name",
    "resume_name",
    "weights_name",
    "write_tensors",
]

_NAME = "trajectory.json"
_FORMAT = "source-proj recorded run"
_VERSION = 2

Update = tuple[float, float]
"""An update's learning rate, and what gradient clipping multiplied its gradient by."""


@dataclass(frozen=True)
class RecordedCheckpoint:
    """One checkpoint: where it is, what it hashes to, and the updates that led to it.

    ``moments`` is the name and SHA-256 of the file with the optimizer's second moments, where it has any.
    """

    step: int
    file: str
    sha256: str
    updates: list[Update]
    moments: tuple[str, str] | None = None

    def open(self, directory: Path) -> Checkpoint:
        """Give the checkpoint, its bytes compared with what was recorded.

        Raises:
            MismatchError: the file is not the one that was recorded.
            FileNotFoundError: the file has gone.
        """
        optimizer_state: Path | None = None
        if self.moments is not None:
            optimizer_state = directory / self.moments[0]
            check_hash(optimizer_state, self.moments[1], hash_file(optimizer_state))
        checkpoint = Checkpoint(directory / self.file, self.step, self.updates[-1][0], optimizer_state)
        check_hash(directory / self.file, self.sha256, checkpoint.hash())
        return checkpoint

    def to_json(self) -> dict[str, Any]:
        """The entry in ``trajectory.json``, equal updates in a row as (rate, clip factor, how many)."""
        runs = [(*update, len(list(run))) for update, run in groupby(self.updates)]
        return {key: value for key, value in vars(self).items() if key != "moments" or value is not None} | {
            "updates": runs
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> RecordedCheckpoint:
        """Read the entry back."""
        updates = [(rate, clip) for rate, clip, count in entry["updates"] for _ in range(count)]
        moments = (entry["moments"][0], entry["moments"][1]) if "moments" in entry else None
        return cls(**{**entry, "updates": updates, "moments": moments})


@dataclass
class Record:
    """What ``trajectory.json`` says.

    Args:
        stage: name of the stage.
        optimizer: description of the optimizer.
        state: names, shapes and types of the model's state, see :func:`describe_state`.
        checkpoints: in order of steps.
        resume: name and SHA-256 of the file that the run goes on from, once there is a checkpoint.
    """

    stage: str
    optimizer: Optimizer
    state: dict[str, list[Any]]
    checkpoints: list[RecordedCheckpoint] = field(default_factory=list)
    resume: tuple[str, str] | None = None

    @property
    def last_step(self) -> int:
        """Step of the last checkpoint, 0 without any."""
        return self.checkpoints[-1].step if self.checkpoints else 0

    def rates(self) -> list[float]:
        """Learning rate of every update up to the last checkpoint."""
        return [rate for c in self.checkpoints for rate, _ in c.updates]

    def clip_factors(self) -> list[float] | None:
        """What clipping multiplied every update's gradient by; None where nothing was clipped."""
        factors = [clip for c in self.checkpoints for _, clip in c.updates]
        return factors if any(factor < 1 for factor in factors) else None

    def superseded(self) -> list[str]:
        """Names of the files that were needed to go on from checkpoints before the last."""
        names = [resume_name(c.step) for c in self.checkpoints]
        return [name for name in names if self.resume is None or name != self.resume[0]]

    def write(self, directory: Path) -> None:
        """Replace ``trajectory.json``, at one stroke."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "stage": self.stage,
            "optimizer": self.optimizer.spec(),
            "state": self.state,
            "checkpoints": [checkpoint.to_json() for checkpoint in self.checkpoints],
            "resume": self.resume,
        }
        _flush_directory(directory)  # what is named must be there first
        _write(directory / _NAME, lambda file: file.write(json.dumps(content).encode()))
        _flush_directory(directory)

    @classmethod
    def read(cls, directory: Path) -> Record | None:
        """Read ``trajectory.json``; None where there is none.

        Raises:
            MismatchError: the file is foreign or corrupt, or there are recorded files without it.
        """
        path = directory / _NAME
        if not path.exists():
            strays = sorted(
                file.name for kind in ("step", "moments", "optimizer") for file in directory.glob(f"{kind}_????????.pt")
            )
            if strays:
                raise MismatchError(f"{str(directory)!r} holds {strays[0]} but no {_NAME}: give an empty directory")
            return None
        try:
            content = json.loads(path.read_bytes())
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
            return cls(
                stage=content["stage"],
                optimizer=optimizer_from_spec(content["optimizer"]),
                state=content["state"],
                checkpoints=[RecordedCheckpoint.from_json(entry) for entry in content["checkpoints"]],
                resume=tuple(content["resume"]) if content["resume"] else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MismatchError(
                f"{str(path)!r} was not written by a Recorder of this version ({type(error).__name__}: {error}): "
                "give an empty directory"
            ) from error


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


def describe_state(model: nn.Module) -> dict[str, list[Any]]:
    """Say of each entry of a model's state its shape and type, in JSON-able terms.

    Raises:
        ValueError: an entry is no tensor.
    """
    described: dict[str, list[Any]] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"the model's state has {name!r}, a {type(value).__name__}: only tensors can be recorded")
        described[name] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
    return described


def write_tensors(path: Path, content: dict[str, Any]) -> str:
    """Write what :func:`torch.load` reads back with ``weights_only=True``; equal content gives equal bytes.

    Returns:
        SHA-256 of the file, in hex.
    """
    # Through an open file, because torch writes a path's name into the archive.
    _write(path, lambda file: torch.save(content, file))
    return hash_file(path)


def check_hash(path: Path, recorded: str, found: str) -> None:
    """Refuse a file whose hash is not what was recorded."""
    if found != recorded:
        raise MismatchError(
            f"{str(path)!r} has SHA-256 {found[:16]}…, but {recorded[:16]}… was recorded: it was changed since; "
            "bring the file back, or record anew in an empty directory"
        )


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flush_directory(directory: Path) -> None:
    """Make renames last through a power failure, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
