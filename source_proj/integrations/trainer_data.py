"""Whether a training set can be the one of a Trainer's run, by the run's own counts of updates and epochs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from source_proj._errors import MismatchError
from source_proj._io.outputs import from_home
from source_proj.integrations.callback_log import is_callback_dir
from source_proj.integrations.trainer_folders import trainer_folders

__all__ = ["check_training_set"]

_TOLERANCE = 1e-6  # of an epoch: a quotient of two integers, printed whole
_TRIED = (1, 2, 3, 4, 5, 6, 8, 10, 16, 32, 64)  # batches of an update, for which an error says what would do
_SHOWN = 4


@dataclass(frozen=True)
class _Counts:
    """What a checkpoint says: epochs passed after a number of updates, at batches of ``batch`` examples per process.

    Each process left a file of its random state; ``processes`` is None where there is none.
    """

    updates: int
    epochs: float
    batch: int
    processes: int | None


def check_training_set(dir: str | Path, n: int, name: str = "the training set") -> None:
    """Refuse a training set of another size than the run's.

    A Trainer writes down how many epochs its updates made, and the batch size of a process; how many batches it
    accumulated it does not, so every number of them is tried. A run that streamed its data, or was recorded by a
    callback, has no such counts and passes.

    Args:
        dir: the Trainer's ``output_dir``.
        n: number of examples in the training set.
        name: what an error calls it.

    Raises:
        MismatchError: no number of accumulated batches turns n examples into the run's updates and epochs.
    """
    if is_callback_dir(dir):
        return
    counts = _counts(from_home(dir))
    if not counts or any(_agrees(n, batches, counts) for batches in _splits(n, counts)):
        return
    last = counts[-1]
    raise MismatchError(
        f"{name} has {n:,} examples, and the run's own numbers rule that out: {last.updates:,} updates were "
        f"{last.epochs:.6g} epochs, at batches of {last.batch} examples; {_fitting(counts)}. Give the data that the "
        "Trainer was given: after filters and splits, and packed or cut into blocks if they were (packing, group_texts)"
    )


def _counts(directory: Path) -> list[_Counts]:
    """Counts of the checkpoints that had the last one's batch size; none where they say nothing of the data's size."""
    _, run = trainer_folders(directory)
    counts = []
    for folder in run:
        state = json.loads((folder.path / "trainer_state.json").read_text(encoding="utf-8"))
        updates, epochs, batch = folder.step, state.get("epoch"), state.get("train_batch_size")
        if state.get("num_train_epochs", 0) >= sys.maxsize or not updates or not epochs or not batch:
            continue  # a stream, whose length nobody knows, or a Trainer that did not write these
        counts.append(
            _Counts(updates, float(epochs), int(batch), len(list(folder.path.glob("rng_state*.pth"))) or None)
        )
    return [count for count in counts if count.batch == counts[-1].batch]


def _splits(n: int, counts: Sequence[_Counts]) -> Iterator[tuple[int, int]]:
    """Processes and accumulated batches that come into question: their product is about n examples' share of an update.

    Epochs that do not end with a whole update blur that share, by less than a factor of two.
    """
    last = counts[-1]
    share = n * last.epochs / last.updates / last.batch
    lowest, highest = int(share / 2), int(2 * share) + 1
    for processes in range(1, highest + 1) if last.processes is None else [last.processes]:
        for accumulated in range(max(1, lowest // processes), highest // processes + 1):
            yield processes, accumulated


def _agrees(n: int, split: tuple[int, int], counts: Sequence[_Counts]) -> bool:
    """Whether n examples give all counts, at so many processes and accumulated batches."""
    processes, accumulated = split
    size = counts[-1].batch * processes
    lengths = {-(-n // size), max(1, n // size)}  # batches of an epoch; the last, short one may be dropped
    # The batches that are left at an epoch's end are an update of their own, but for Trainers before 2025.
    epochs = {(length, updates) for length in lengths for updates in (-(-length // accumulated), length // accumulated)}
    return any(
        all(abs(_epochs(count.updates, length, accumulated, updates) - count.epochs) <= _TOLERANCE for count in counts)
        for length, updates in epochs
        if updates
    )


def _epochs(updates: int, length: int, accumulated: int, per_epoch: int) -> float:
    """Epochs that the Trainer counts after a number of updates, ``per_epoch`` in each of ``length`` batches."""
    passed, within = divmod(updates - 1, per_epoch)
    return passed + min((within + 1) * accumulated, length) / length


def _fitting(counts: Sequence[_Counts]) -> str:
    """How many examples would fit, for usual numbers of batches an update."""
    last = counts[-1]
    texts = []
    for accumulated in _TRIED:
        size = last.batch * accumulated * (last.processes or 1)
        about = round(last.updates / last.epochs * size)
        fitting = [
            n
            for n in range(max(1, about - 2 * size), about + 2 * size + 1)
            if _agrees(n, (last.processes or 1, accumulated), counts)
        ]
        if fitting:
            texts.append(f"{fitting[0]:,} to {fitting[-1]:,} with gradient_accumulation_steps={accumulated}")
    return f"possible are {', '.join(texts[:_SHOWN])}" if texts else "no usual accumulation explains them"
