"""From a batch to what the bank stores of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, MismatchError, named_examples
from source_proj.bank.audits import encode_audit
from source_proj.bank.build.data import Batch, to_device
from source_proj.bank.build.uniform import Uniforms
from source_proj.bank.format import Settings
from source_proj.bank.layout import crossing_name
from source_proj.bank.read.metrics import Metrics
from source_proj.bank.read.part import Part
from source_proj.gradients import (
    ParameterSpace,
    gradient_engine,
    nonfinite_examples,
    private_copy,
    require_own_weights,
)
from source_proj.gradients.apart import random_halves
from source_proj.gradients.batches import require_examples, square_lists_noted, take
from source_proj.gradients.general import Function
from source_proj.gradients.law import SAMPLED
from source_proj.sketch import Sketch
from source_proj.task import Task
from source_proj.task.base import derivatives_of, fisher_weight_of
from source_proj.trajectory import Checkpoint, Scale
from source_proj.trajectory.placement import placement_of

__all__ = ["BatchLocation", "RowEncoder"]

_SAME = 1e-3  # relative: numbers of examples in a batch and in half of it


@dataclass(frozen=True)
class BatchLocation:
    """Where a batch belongs: rows start to stop of a part, at one checkpoint of its stage."""

    part: Part
    stage: int
    checkpoint: int
    start: int
    stop: int

    @property
    def ids(self) -> list[Any]:
        """The examples' ids."""
        return self.part.ids[self.start : self.stop]

    def require_finite(self, values: Tensor, what: str) -> None:
        """Refuse values ``(B,)`` that are not finite.

        Raises:
            GradientError: names the ids, the stage and the checkpoint.
        """
        bad = nonfinite_examples(values[:, None])
        if bad:
            raise GradientError(
                f"{what} is not finite for ids {[self.ids[i] for i in bad]} of stage {self.part.stage_name!r} at the "
                f"checkpoint of step {self.part.steps[self.checkpoint]}: look at these examples and at the weights, or "
                "switch autocast off"
            )


class RowEncoder:
    """Sketches the gradients of batches and encodes them for the bank.

    Args:
        model: of the trained architecture; what runs is a copy, with a checkpoint's weights by the time of the call.
        task: says what is differentiated.
        space: the attributed parameters.
        settings: the bank's settings.
        device: where the copy runs; default: where the model is.
        metrics: the bank's metrics.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        space: ParameterSpace,
        settings: Settings,
        device: torch.device | str | None,
        metrics: Metrics,
    ) -> None:
        self._model = private_copy(model, device)
        self._original: nn.Module | None = model  # until the first batch has shown that the copy alone is used
        self._task = task
        self._settings = settings
        self._placement = placement_of(self._model)
        self._device = self._placement.device
        self._metrics = metrics
        self._detached = True  # whether no output since `begin` led back to the model
        self._scales: dict[int, Scale | None] = {}  # on the device, of one checkpoint's metrics
        self._engine = gradient_engine(
            self._model, space, Sketch.from_spec(settings.sketch), method=settings.gradients, autocast=settings.autocast
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a checkpoint.

        Raises:
            MismatchError: they do not fit the model.
        """
        with self._engine.placement.other_weights():
            checkpoint.load_into(self._model)

    def begin(self, stage: int, checkpoint: int, shard: int) -> None:
        """Begin a shard: its rows are proven by its own batches alone, so that none committed rests on another's."""
        self._engine.begin(self._settings.sketch["seed"], stage, checkpoint, shard)
        self._detached = True

    def require_graph(self, place: BatchLocation) -> None:
        """Refuse a shard of which no output led back to the model.

        Args:
            place: of the shard's last batch.

        Raises:
            GradientError: names the stage and the checkpoint.
        """
        if self._detached:
            part = place.part
            raise GradientError(
                f"no example of stage {part.stage_name!r} up to id {place.ids[-1]!r} has a gradient at the checkpoint "
                f"of step {part.steps[place.checkpoint]}: the output of task {self._task.name!r} is detached from the "
                "model's parameters; look for detach(), no_grad() or .data in it"
            )

    def audit(self) -> np.ndarray:
        """What was audited since `begin`, as the bank keeps it."""
        return encode_audit(self._engine.proof.summary())

    def __call__(self, place: BatchLocation, batch: Batch) -> dict[str, Tensor]:
        """Return the entries of a batch's arrays, by the arrays' names.

        Raises:
            GradientError: a gradient or derivative is not finite; names the ids.
            Refuted: the shard's rows so far rest on a proof that failed; make them again from its start.
            MismatchError: the task gives ℓ'' for some batches only.
            ValueError: the batch has not as many examples as it must.
        """
        batch = to_device(batch, self._device)
        if self._original is not None:
            with named_examples(place.ids):
                require_own_weights(self._task.output, self._model, self._original, batch)
            self._original = None
        names = self._metrics_of(place)
        scales = list(self._scales.values())
        require_examples(batch, place.ids)
        with named_examples(place.ids):
            (values, (rows, *others)), *sampled = self._sketched(place, batch, scales)
        silent = self._detached and not bool(rows.any())
        self._detached = silent  # rows of zeros may be right, if an example has no label, say
        if self._placement.lockstep.any(silent):
            self._detached = self._engine.is_detached(self._task.output, batch) and silent
        encoded = self._encoded("", rows, place, "the gradient of the output")
        for metric, other in zip(names, others, strict=True):
            encoded |= self._encoded("", other, place, "the gradient of the output", metric)
        encoded |= self._derivatives(place, values, batch)
        if sampled:
            draws = zip(*(of_metric for _, of_metric in sampled), strict=True)  # for each metric, those of each draw
            for at, several in zip([None, *names], draws, strict=True):
                stacked = torch.stack(several, dim=1)  # (B, D, k)
                encoded |= self._encoded("fisher_", stacked, place, "the gradient of a sampled label's likelihood", at)
        return encoded

    def _metrics_of(self, place: BatchLocation) -> list[int]:
        """The metrics that are crossed from a checkpoint; its own one's scale and theirs are on the device then."""
        run = self._settings.trajectory
        crossed = run.crossed_metrics(place.stage, place.checkpoint)
        wanted = [run.stages[place.stage].metrics[place.checkpoint], *crossed]
        if wanted != list(self._scales):
            scales = self._metrics.scales(wanted)
            self._scales = {m: None if s is None else s.to(self._device) for m, s in zip(wanted, scales, strict=True)}
        return crossed

    def _encoded(
        self, prefix: str, rows: Tensor, place: BatchLocation, what: str, metric: int | None = None
    ) -> dict[str, Tensor]:
        """Encode rows ``(B, k)``, or ``(B, D, k)`` with draw j of example b in row b·D + j."""
        flat = rows.flatten(0, -2)
        codec = self._settings.sampled_codec if prefix else self._settings.codec
        sizes = codec.row_sizes(flat)
        place.require_finite(sizes.reshape(len(rows), -1).amax(dim=1), what)
        values, scale = codec.encode(flat, sizes)
        arrays = {f"{prefix}rows": values} if scale is None else {f"{prefix}rows": values, f"{prefix}scale": scale}
        return arrays if metric is None else {crossing_name(name, metric): array for name, array in arrays.items()}

    def _derivatives(self, place: BatchLocation, values: Tensor, batch: Batch) -> dict[str, Tensor]:
        task = self._task.of_stage(place.stage)
        with torch.no_grad(), named_examples(place.ids):
            d1, d2 = derivatives_of(task, values, batch)
            fisher_weight = fisher_weight_of(task, batch, len(values))
        if (d2 is not None) != self._settings.second_derivative:
            raise MismatchError(
                f"the task gives {'a' if d2 is not None else 'no'} second derivative for ids {place.ids[:3]}, and the "
                "opposite for the first batch; it must be the same for all"
            )
        derivatives = {"d1": d1, "d2": d2, "fisher_weight": fisher_weight}
        given = {name: numbers.float() for name, numbers in derivatives.items() if numbers is not None}
        for name, numbers in given.items():
            place.require_finite(numbers, {"d1": "ℓ'", "d2": "ℓ''"}.get(name, "the empirical Fisher's weight"))
        if not task.is_builtin():
            with torch.no_grad(), named_examples(place.ids):
                _require_own(task, values, batch, [d1, d2, fisher_weight])
        return given

    def _sketched(
        self, place: BatchLocation, batch: Batch, scales: Sequence[Scale | None]
    ) -> list[tuple[Tensor, list[Tensor]]]:
        """Values and rows, in each metric, of the output and of the likelihoods of labels that are drawn."""
        size, engine, task = place.stop - place.start, self._engine, self._task.of_stage(place.stage)
        if not self._settings.sampled_fisher:
            return [engine.sketch_scaled(task.output, batch, scales, size=size)]
        first = place.part.spec.start
        positions = torch.arange(first + place.start, first + place.stop, device=self._device)
        seed: int = self._settings.sketch["seed"]

        def uniforms(positions: Tensor, draw: int) -> Uniforms:
            return Uniforms(positions, seed=seed, stage=place.stage, checkpoint=place.checkpoint, draw=draw)

        def output(model: nn.Module, both: tuple[Batch, Tensor]) -> Tensor:
            return task.output(model, both[0])

        def likelihood(draw: int, model: nn.Module, both: tuple[Batch, Tensor]) -> Tensor:
            # Positions travel with the batch: the general path calls this for one example at a time.
            return task.sampled_output(model, both[0], uniforms(both[1], draw))

        def together(model: nn.Module, both: tuple[Batch, Tensor]) -> tuple[Tensor, ...]:
            return task.output_and_samples(model, both[0], [uniforms(both[1], draw) for draw in draws])

        draws = range(self._settings.sampled_fisher)
        functions: list[tuple[str, Function]] = [
            ("output", output),
            *((SAMPLED, partial(likelihood, draw)) for draw in draws),
        ]
        both = batch, positions
        if task.forwards_once:
            return engine.sketch_together(functions, together, both, scales, size)
        return [engine.sketch_scaled(function, both, scales, name, size) for name, function in functions]


def _require_own(task: Task, values: Tensor, batch: Batch, found: Sequence[Tensor | None]) -> None:
    """Refuse ℓ', ℓ'' or weights of examples that are others in half of their batch: no proof of gradients sees them.

    Raises:
        GradientError: says which.
    """
    size = len(values)
    for half in random_halves(size, size) if size > 1 else ():
        with square_lists_noted(batch, size):
            part = take(batch, half.tolist(), size)
        own = [*derivatives_of(task, values[half.to(values.device)], part), fisher_weight_of(task, part, len(half))]
        for name, whole, alone in zip(("ℓ'", "ℓ''", "fisher_weight"), found, own, strict=True):
            if whole is None or alone is None:
                continue
            among = whole[half.to(whole.device)]
            if float((alone - among).norm()) > _SAME * float(among.norm()):
                raise GradientError(
                    f"the {name} of task {task.name!r} depends on the other examples of a batch: those of {size} and "
                    f"of {len(half)} of them disagree. Let it be of each example alone, with weights that are the same "
                    "in any batch (a mean over the batch is no example's own)"
                )
