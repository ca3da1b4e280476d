"""Checkpoints as a bank refers to them: files elsewhere, or copies inside of it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from safetensors import SafetensorError
from safetensors.torch import load, save

from source_proj._errors import BankError, MismatchError
from source_proj.bank.format import Settings
from source_proj.bank.layout import weights_array
from source_proj.bank.read.part import open_node, read_array
from source_proj.trajectory import Checkpoint, Trajectory

__all__ = ["Weights", "relative_paths", "weights_entries", "write_weights"]


class Weights:
    """Finds the checkpoints of a bank.

    Args:
        bank: the bank's folder.
        settings: its settings.
        moved: where checkpoint files lay relative to the bank when it was built, by hash.
    """

    def __init__(self, bank: Path, settings: Settings, moved: Mapping[str, str]) -> None:
        self._bank = bank
        self._stages = settings.trajectory["stages"]
        self._moved = moved
        self._files: dict[str, Checkpoint] = {}
        self._copy: tuple[str, Checkpoint] | None = None  # the last one read: others would fill the memory

    def checkpoint(self, stage: int, index: int) -> Checkpoint:
        """A checkpoint of a stage.

        Raises:
            IndexError: there is no such stage or checkpoint.
            MismatchError: its file is missing, or changed since the bank was begun.
        """
        spec = self._stages[stage]
        entry = spec["checkpoints"][index]
        return self._find(entry, spec["steps"][index])

    def final(self) -> Checkpoint:
        """The weights at the end of training; see `checkpoint`."""
        spec = self._stages[-1]
        return self._find(spec["final"], spec["steps"][-1])

    def _find(self, entry: Mapping[str, Any], step: int) -> Checkpoint:
        if entry["path"] is None:
            return self.stored(entry["hash"], step)
        checkpoint = self._files.get(entry["hash"]) or self._opened(entry, step)
        if checkpoint.hash() != entry["hash"]:
            raise MismatchError(
                f"the checkpoint {checkpoint.path} of step {step} changed since the bank {self._bank} was begun: its "
                f"hash was {entry['hash'][:16]}, and is {checkpoint.hash()[:16]}; put the original back"
            )
        self._files[entry["hash"]] = checkpoint
        return checkpoint

    def _opened(self, entry: Mapping[str, Any], step: int) -> Checkpoint:
        places = [Path(entry["path"])]
        if entry["hash"] in self._moved:  # the bank and its checkpoints may have been moved together
            places.append(self._bank / self._moved[entry["hash"]])
        for place in places:
            if place.is_file():
                return Checkpoint(place.resolve(), step)
        raise MismatchError(
            f"the bank {self._bank} refers to the checkpoint of step {step} at {' or '.join(map(str, places))}, and no "
            f"file is there; put it back (hash {entry['hash'][:16]})"
        )

    def stored(self, digest: str, step: int) -> Checkpoint:
        """A checkpoint from its copy inside the bank.

        Raises:
            BankError: the copy is missing or damaged.
        """
        kept = self._copy  # read once: another thread may ask for another checkpoint meanwhile
        if kept is not None and kept[0] == digest and kept[1].step == step:
            return kept[1]
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


def weights_entries(settings: Settings) -> list[dict[str, Any]]:
    """All checkpoint entries of a trajectory, each hash once."""
    stages = settings.trajectory["stages"]
    entries = [entry for stage in stages for entry in [*stage["checkpoints"], stage["final"]]]
    return list({entry["hash"]: entry for entry in entries}.values())


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
        entry["hash"]: os.path.relpath(entry["path"], bank.absolute())
        for entry in weights_entries(settings)
        if entry["path"] is not None
    }
