"""Gradients without a sketch, of a few examples: read anew from the data, one batch in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from source_proj._errors import GradientError, MismatchError, named_examples
from source_proj._io.progress import Progress, progress_bar
from source_proj.attribution.operands import stage_start
from source_proj.attribution.query_models import QueryModels
from source_proj.bank import Bank
from source_proj.bank.build.columns import examples_of
from source_proj.bank.build.data import BatchSource, dataset_size, to_device
from source_proj.gradients import ParameterSpace, nonfinite_examples
from source_proj.sketch import Sketch
from source_proj.task import Task
from source_proj.task.base import derivatives_of

__all__ = ["FullRows", "TrainingGradients", "sketched_rows", "training_parts"]


class FullRows(NamedTuple):
    """Loss gradients of some training examples at one checkpoint.

    Attributes:
        start: place of the first among the examples that were asked for.
        stop: end of their places.
        rows: ``(stop - start, d)`` float32, on the model's device.
    """

    start: int
    stop: int
    rows: Tensor


def training_parts(bank: Bank, train: Any) -> list[Any]:
    """The data set or DataLoader of each stage of a bank: what was given, or else what the bank knows.

    Args:
        bank: a finalized bank.
        train: a data set or DataLoader, a mapping of them by stage, or None.

    Raises:
        ValueError: nothing is known; says which argument gives it.
        MismatchError: the data have other stages or other numbers of examples than the bank.
    """
    if train is None:
        if bank.examples is None or len(bank.examples) != bank.n_rows:
            raise ValueError(
                f"rerank= differentiates training examples anew, and the data set of the bank {bank.path} is not at "
                "hand: pass train=, what it was built from"
            )
        parts = bank.examples.sources
    elif isinstance(train, Mapping):
        names = [stage.name for stage in bank.stages]
        if list(train) != names:
            raise MismatchError(f"train= has the stages {list(train)}, and the bank {bank.path} has {names}")
        parts = list(train.values())
    else:
        parts = [train]
    sizes, expected = [dataset_size(part) for part in parts], [stage.n for stage in bank.stages]
    if sizes != expected:
        raise MismatchError(
            f"train= has {sizes} examples by stage, and the bank {bank.path} has {expected}: give the data set that it "
            "was built from, of several stages as a mapping from their names"
        )
    return parts


class TrainingGradients:
    """Loss gradients g = ℓ' ∇o of training examples, of all d coordinates.

    Args:
        bank: a finalized bank.
        models: of the architecture that was trained.
        task: the bank's task.
        parts: the data of each stage.
        batch_size: examples a pass; a DataLoader brings its own.
        progress: as for :class:`Attributor`.
    """

    def __init__(
        self, bank: Bank, models: QueryModels, task: Task, parts: Sequence[Any], batch_size: int, progress: Progress
    ) -> None:
        self._bank, self._models, self._task, self._parts = bank, models, task, parts
        self._batch_size, self._progress = batch_size, progress
        self.count = 0  # passes so far

    def read(self, stage: int, checkpoint: int, rows: Tensor) -> Iterator[FullRows]:
        """Gradients at a checkpoint, in its metric, batch by batch.

        Args:
            stage: index of the examples' stage.
            checkpoint: index of the checkpoint.
            rows: the examples, ``(n,)`` int64 among those of all stages, ascending.

        Raises:
            GradientError: one is not finite; names the ids.
            Refuted: rows that were given before are to be made again.
        """
        bank = self._bank
        own = bank.stages[stage]
        places = (rows - stage_start(bank, stage)).tolist()
        task, scale = self._task.of_stage(stage), bank.metrics.scale(own.metric(checkpoint))
        description = f"candidates, checkpoint {checkpoint + 1} of {own.n_checkpoints}"
        with self._models.borrowed() as opened, progress_bar(self._progress, description, len(rows), "examples") as bar:
            loaded = opened.at(bank, bank.checkpoint(stage, checkpoint), exact=True)
            device = next(loaded.module.parameters()).device
            scales = [None if scale is None else scale.to(device)]
            for start, stop, batch in _batches(self._parts[stage], places, self._batch_size):
                placed, ids = to_device(batch, device), [own.ids[place] for place in places[start:stop]]
                with named_examples(ids):
                    values, (gradients,) = loaded.engine.sketch_scaled(task.output, placed, scales, size=stop - start)
                    with torch.no_grad():
                        first, _ = derivatives_of(task, values, placed)
                gradients.mul_(first.to(gradients)[:, None])
                bad = nonfinite_examples(gradients)
                if bad:
                    raise GradientError(
                        f"the gradient of the loss is not finite for ids {[ids[i] for i in bad]} of stage {own.name!r} "
                        f"at checkpoint {checkpoint}; look at these examples"
                    )
                self.count += stop - start
                yield FullRows(start, stop, gradients)
                bar.update(stop - start)


def _batches(data: Any, places: Sequence[int], batch_size: int) -> Iterator[tuple[int, int, Any]]:
    """Batches of the examples at some places, put together as the data set's own are."""
    if isinstance(data, DataLoader):
        rows = Subset(examples_of(data.dataset), places)
        chosen: Any = DataLoader(rows, batch_size=data.batch_size, collate_fn=data.collate_fn)
    else:
        chosen = Subset(examples_of(data), places)
    source = BatchSource(chosen, batch_size)
    return source.load([(0, source.n)])


def sketched_rows(sketch: Sketch, space: ParameterSpace, rows: Tensor) -> Tensor:
    """R g of whole gradients ``(n, d)``, parameter by parameter as the bank's rows were made: ``(n, k)`` float32."""
    out = torch.zeros(len(rows), sketch.dim, device=rows.device, dtype=torch.float32)
    ends = [*space.offsets.values(), space.size][1:]
    for start, stop, shape in zip(space.offsets.values(), ends, space.shapes, strict=True):
        sketch.add_(out, rows[:, start:stop], start, shape)
    return out
