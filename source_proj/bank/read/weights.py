"""Checkpoints as a bank refers to them: files elsewhere, or copies inside of it."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save

from source_proj._errors import BankError, MismatchError
from source_proj.bank.format import Settings
from source_proj.bank.layout import flat_objects, group_document, weights_array
from source_proj.bank.read.objects import read_flat
from source_proj.bank.store import Store
from source_proj.trajectory import Checkpoint, CheckpointRef, RunRecord

__all__ = ["Weights", "relative_paths", "weights_objects"]


class Weights:
    """Finds the checkpoints of a bank.

    Args:
        store: where the bank lies.
        settings: its settings.
        moved: where checkpoint files lay relative to the bank when it was built, by hash.
    """

    def __init__(self, store: Store, settings: Settings, moved: Mapping[str, str]) -> None:
        self._store = store
        self._bank = store.location()
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

    def query_points(self, stage: int) -> list[Checkpoint]:
        """The weights of a stage at which queries are differentiated; see `checkpoint`."""
        return [self._find(point) for point in self._run.stages[stage].query_points]

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

    def copies(self, run: RunRecord) -> Iterator[Checkpoint]:
        """The weights of a run that lie in the bank itself, one at a time; raises as :meth:`stored`."""
        for wanted in run.checkpoints:
            if wanted.path is None:
                yield self.stored(wanted.hash, wanted.step)

    def placed(self, wanted: CheckpointRef) -> CheckpointRef:
        """The same weights where their file lies now; as they are named where it lies nowhere."""
        place = next((place for place in self._places(wanted) if place.is_file()), None)
        return wanted if wanted.path is None or place is None else replace(wanted, path=str(place.resolve()))

    def missing(self) -> list[str]:
        """Files of weights that the bank refers to and that are not there, each once, as they are named."""
        stages = self._run.stages
        refs = [ref for stage in stages for ref in (*stage.checkpoints, *stage.query_points)] + [self._run.final]
        gone = [ref.path for ref in refs if ref.path is not None and not self.is_there(ref)]
        return list(dict.fromkeys(gone))

    def is_there(self, wanted: CheckpointRef) -> bool:
        """Whether there is a file of these weights, or they are in the bank; what is in it is not read."""
        return wanted.path is None or any(place.is_file() for place in self._places(wanted))

    def _places(self, wanted: CheckpointRef) -> list[Path]:
        places, folder = [Path(wanted.path or "")], self._store.folder
        if wanted.hash in self._moved and folder is not None:  # the bank may have been moved, and they with it
            places.append(folder / self._moved[wanted.hash])
        return places

    def _opened(self, wanted: CheckpointRef) -> Checkpoint:
        places = self._places(wanted)
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
        kept = self._copy  # read once: another thread may ask for another checkpoint meanwhile
        if kept is not None and kept[0] == digest and kept[1].step == step:
            return kept[1]
        folder = self._store.location(f"weights/{digest}")
        content = read_flat(self._store, f"weights/{digest}", weights_array)
        try:
            checkpoint = Checkpoint(load(content.tobytes()), step)
        except (SafetensorError, ValueError) as error:
            raise BankError(f"the weights in {folder} cannot be read: {error}") from error
        if checkpoint.hash() != digest:
            raise BankError(f"the weights in {folder} were altered: their hash is {checkpoint.hash()}")
        self._copy = (digest, checkpoint)
        return checkpoint


def weights_objects(checkpoints: Iterable[Checkpoint]) -> Iterator[dict[str, bytes]]:
    """The checkpoints that lie in no file, each once, as the objects to write."""
    written: set[str] = set()
    for checkpoint in checkpoints:
        if checkpoint.path is not None or (digest := checkpoint.hash()) in written:
            continue
        content = save({name: value.contiguous() for name, value in checkpoint.load().items()})
        yield flat_objects(f"weights/{digest}", weights_array(len(content)), np.frombuffer(content, np.uint8))
        written.add(digest)
    if written:
        yield {"weights/zarr.json": group_document({})}


def relative_paths(bank: Path | None, settings: Settings) -> dict[str, str]:
    """Where checkpoint files lie relative to the bank's folder, if it has one, by hash."""
    if bank is None:
        return {}
    return {
        checkpoint.hash: os.path.relpath(checkpoint.path, bank.absolute())
        for checkpoint in settings.trajectory.checkpoints
        if checkpoint.path is not None
    }
