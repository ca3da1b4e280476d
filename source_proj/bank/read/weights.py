"""Checkpoints as a bank refers to them: files elsewhere, or copies inside of it."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zarr
from safetensors import SafetensorError
from safetensors.torch import load, save

from source_proj._errors import BankError, MismatchError
from source_proj.bank.format import Settings
from source_proj.bank.layout import weights_array
from source_proj.bank.read.part import open_node, read_array
from source_proj.trajectory import Checkpoint, CheckpointRef, Trajectory

__all__ = ["Weights", "relative_paths", "write_weights"]


class Weights:
    """Finds the checkpoints of a bank.

    Args:
        bank: the bank's folder.
        settings: its settings.
        moved: where checkpoint files lay relative to the bank when it was built, by hash.
    """

    def __init__(self, bank: Path, settings: Settings, moved: Mapping[str, str]) -> None:
        self._bank = bank
        self._run = settings.trajectory
        self._moved = moved
        self._files: dict[str, Checkpoint] = {}
        self._copy: tuple[str, Checkpoint] | None = None  # the last one read: others would fill the memory

    def checkpoint(self, stage: int, index: int) -> Checkpoint:
        """A checkpoint of a stage.

        Raises:
            IndexError: there is no such stage or checkpoint.
            MismatchError: its file is missing, or changed since the bank was begun.
        """
        return self._find(self._run.stages[stage].checkpoints[index])

    def final(self) -> Checkpoint:
        """The weights at the end of training; see `checkpoint`."""
        return self._find(self._run.final)

    def _find(self, wanted: CheckpointRef) -> Checkpoint:
        if wanted.path is None:
            return self.stored(wanted.hash, wanted.step)
        checkpoint = self._files.get(wanted.hash) or self._opened(wanted)
        if checkpoint.hash() != wanted.hash:
            raise MismatchError(
                f"the checkpoint {checkpoint.path} of step {wanted.step} changed since the bank {self._bank} was "
                f"begun: its hash was {wanted.hash[:16]}, and is {checkpoint.hash()[:16]}; put the original back"
            )
        self._files[wanted.hash] = checkpoint
        return checkpoint

    def _opened(self, wanted: CheckpointRef) -> Checkpoint:
        places = [Path(wanted.path or "")]
        if wanted.hash in self._moved:  # the bank and its checkpoints may have been moved together
            places.append(self._bank / self._moved[wanted.hash])
        for place in places:
            if place.is_file():
                return Checkpoint(place.resolve(), wanted.step)
        raise MismatchError(
            f"the bank {self._bank} refers to the checkpoint of step {wanted.step} at "
            f"{' or '.join(map(str, places))}, and no file is there; put it back (hash {wanted.hash[:16]})"
        )

    def stored(self, digest: str, step: int) -> Checkpoint:
        """A checkpoint from its copy inside the bank.

        Raises:
            BankError: the copy is missing or damaged.
        """
        if self._copy is not None and self._copy[0] == digest and self._copy[1].step == step:
            return self._copy[1]
        folder = self._bank / "weights" / digest
        array = open_node(self._bank, f"weights/{digest}")
        if not isinstance(array, zarr.Array):
            raise BankError(f"{folder} is a zarr group and must be an array")
        try:
            checkpoint = Checkpoint(load(read_array(array, slice(None), folder).tobytes()), step)
        except (SafetensorError, ValueError) as error:
            raise BankError(f"the weights in {folder} cannot be read: {error}") from error
        if checkpoint.hash() != digest:
            raise BankError(f"the weights in {folder} were altered: their hash is {checkpoint.hash()}")
        self._copy = (digest, checkpoint)
        return checkpoint


def write_weights(folder: Path, trajectory: Trajectory) -> None:
    """Write the checkpoints that were given as dicts, each once."""
    group = zarr.create_group(folder)
    for stage in trajectory.stages:
        for checkpoint in [*stage.checkpoints, *([stage.final] if stage.final is not None else [])]:
            if checkpoint.path is None and checkpoint.hash() not in group:
                content = save({name: value.contiguous() for name, value in checkpoint.load().items()})
                values = np.frombuffer(content, np.uint8)
                weights_array(len(values)).create(group, checkpoint.hash())[:] = values


def relative_paths(bank: Path, settings: Settings) -> dict[str, str]:
    """Where checkpoint files lie relative to the bank, by hash."""
    return {
        checkpoint.hash: os.path.relpath(checkpoint.path, bank.absolute())
        for checkpoint in settings.trajectory.checkpoints
        if checkpoint.path is not None
    }
