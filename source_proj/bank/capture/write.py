"""From captured sums to a bank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, MismatchError
from source_proj._io.hashing import hash_float32
from source_proj.bank.bank import Bank
from source_proj.bank.build.data import checked_ids
from source_proj.bank.build.parameters import in_words
from source_proj.bank.capture.capture import Capture
from source_proj.bank.capture.segments import Segments, write_segments
from source_proj.bank.format import Settings, storage_of
from source_proj.bank.notes import Notes, modules_of
from source_proj.trajectory import CapturedCurvature, RunRecord, Stage, Trajectory

__all__ = ["CapturedStage", "write_captured"]

_EQUAL = 1e-6  # relative: sums of learning rates, in float64
_LOOKED_AT = 4096  # rows at a time
_SHOWN = 4  # parameters in a message


@dataclass(frozen=True)
class CapturedStage:
    """What was captured of a stage, as :meth:`source_proj.Recorder.captured` gives it.

    Args:
        stage: the stage as it was recorded, cut into the segments of the capture.
        contents: of each segment, what :meth:`Capture.content` was at its end.
        ids: ids of its examples in order.

    Raises:
        ValueError: its preconditioner changes the metric of its rows.
    """

    stage: Stage
    contents: tuple[dict[str, Any], ...] = field(repr=False)
    ids: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        if self.stage.preconditioner not in ("scalar", "none"):
            raise ValueError(
                f"preconditioner={self.stage.preconditioner!r} wants rows in the metric of a preconditioner that is "
                "known only after training, and captured rows are plain gradients: take 'scalar' or 'none'"
            )
        self._require_equal_steps()

    @classmethod
    def of(
        cls, stage: Stage, contents: Sequence[dict[str, Any]], examples: int | None, ids: Sequence[Any] | None
    ) -> CapturedStage:
        """One of the ids that were given; 0, 1, … where none were.

        Args:
            stage: the stage as it was recorded.
            contents: of each segment.
            examples: number of training examples; default: as many as there were indices.
            ids: their ids in order.

        Raises:
            ValueError, MismatchError: ids are not as many, or not ids; or as for the stage.
        """
        n = max([examples or 0, *(len(content["rows"]) for content in contents)])
        return cls(stage, tuple(contents), checked_ids(ids, 0, n, stage.name))

    def _require_equal_steps(self) -> None:
        """Refuse summed losses or gradients of unequal steps: rows are freed of one size, which was told afterwards.

        Processes add up their batches, so that a multiple of it is as good.
        """
        stage, rates = self.stage, self.stage.lr_schedule
        summed = stage.loss_reduction == "sum"
        if not (summed or stage.accumulation > 1) or rates is None or callable(rates):
            return
        counted, unit = ("weight", "examples") if summed else ("passes", "forward passes")
        mean = sum(content[counted] for content in self.contents) / (math.fsum(rates) or math.inf)
        times = mean / stage.loss_scale
        if abs(times - max(1, round(times))) > _EQUAL:
            told = f"loss_reduction='sum' with batch_size={stage.batch_size} and " if summed else ""
            raise ValueError(
                f"{told}accumulation={stage.accumulation}, and the steps of stage {stage.name!r} had {mean:.4g} {unit} "
                "on average: captured rows are right where all steps have as many. Say how many, leave the last, "
                "smaller batch or step of an epoch out (drop_last=True), or train with means: of losses, and of the "
                "gradients that are accumulated"
            )

    def warn_of_unseen(self) -> None:
        """Say which examples have no gradient in any segment."""
        seen = np.zeros(len(self.ids), bool)
        for content in self.contents:
            for start in range(0, len(content["rows"]), _LOOKED_AT):
                part = content["rows"][start : start + _LOOKED_AT]
                seen[start : start + len(part)] |= part.any(1).numpy()
        unseen = self.ids[~seen]
        if len(unseen):
            warnings.warn(
                f"nothing was captured of {len(unseen)} of the {len(seen)} examples of stage {self.stage.name!r}, ids "
                f"{unseen[:5].tolist()}{' and so on' if len(unseen) > 5 else ''}: their scores will be zero. Were they "
                "in no batch, or other ids given for them (step(ids=...), examples=)? Or are their gradients zero?",
                UserWarning,
                stacklevel=4,
            )

    def curvature(self) -> list[Tensor]:
        """Ĥ of each segment, flat."""
        return [_curvature(content, self.stage.loss_scale) for content in self.contents]

    @property
    def kind(self) -> CapturedCurvature:
        """Which curvature that is."""
        kind: CapturedCurvature = self.contents[-1]["kind"]
        return kind


def write_captured(
    model: nn.Module,
    capture: Capture,
    stages: Sequence[CapturedStage],
    path: str | Path,
    *,
    storage: str | None = None,
    autocast: str | None = None,
) -> Bank:
    """Write what was captured of a run's stages as a finalized bank; a killed call goes on when it is repeated.

    Args:
        model: the module that was trained; gives the order of its parameters.
        capture: says what the rows are.
        stages: in order of training.
        path: the bank's folder, or the URL of one in an object store.
        storage: the codec of the rows; default: by k, see :func:`source_proj.bank.format.storage_of`.
        autocast: "bfloat16" or "float16" for the forward passes of queries.

    Raises:
        BankError: something else is at the path, or it cannot be written.
        MismatchError: a bank of other settings or ids is there, or stages were captured by different sketches, tasks
            or parameters.
        ValueError: two stages have one name.

    Warns:
        UserWarning: nothing was captured of some examples.
    """
    for captured in stages:
        captured.warn_of_unseen()
    identity, kind = capture.identity(), stages[-1].kind
    for captured in stages:
        _require_alike(captured, {**identity, "kind": kind})
    trajectory = Trajectory.from_stages([captured.stage for captured in stages])
    resolved = trajectory.resolve(model, capture.space).record
    curvature = [captured.curvature() for captured in stages]
    hashes = [[hash_float32(flat) for flat in own] for own in curvature]
    # Rows were captured as they were, those of a parameter that did not move in a stage, too.
    plain = (replace(record, metrics=(0,) * len(record.metrics)) for record in resolved.stages)
    records = (record.captured(own, kind) for record, own in zip(plain, hashes, strict=True))
    settings = Settings(
        sketch=identity["sketch"],
        parameters=identity["parameters"],
        task=identity["task"],
        trajectory=RunRecord(tuple(records), (None,)),
        storage=storage_of(storage, identity["sketch"], capture.space.size),
        sampled_fisher=0,
        second_derivative=False,
        fisher_weight=False,
        gradients="auto",
        autocast=autocast,
    )
    choice = f"{len(capture.space.names)} parameters, {capture.space.size} numbers: those that were captured"
    choice = "; ".join(filter(None, (choice, in_words(capture.space, {}))))
    notes = Notes(choice, modules_of(model), task_code=capture.task.code())
    content = Segments(settings, notes, trajectory.checkpoints, curvature, {})
    return write_segments(path, content, [_Rows(captured) for captured in stages])


@dataclass(frozen=True)
class _Rows:
    """What was captured of a stage, as rows: see `SegmentRows`."""

    captured: CapturedStage

    @property
    def ids(self) -> np.ndarray:
        return self.captured.ids

    def rows(self, segment: int, start: int, stop: int) -> Tensor:
        content, n = self.captured.contents[segment], len(self.captured.ids)
        there = content["rows"][start:stop]  # of examples behind them, none was seen
        rows = torch.zeros(stop - start, content["rows"].shape[1], dtype=torch.float32, device="cpu")
        torch.mul(there, n / (_weight(content) * self.captured.stage.loss_scale), out=rows[: len(there)])
        return rows

    def audit(self, segment: int) -> dict[str, Any]:
        return {**self.captured.contents[segment]["audit"], "general": {}}


def _require_alike(captured: CapturedStage, last: dict[str, Any]) -> None:
    """A bank has one sketch of one model's parameters, for one task, and one kind of curvature."""
    for content in captured.contents:
        there = {**content["identity"], "kind": content["kind"]}
        for name, value in last.items():
            if there[name] == value:
                continue
            own = f"of stage {captured.stage.name!r}"
            if name == "parameters" and there[name]["names"] != value["names"]:
                raise MismatchError(_other_parameters(own, there[name]["names"], value["names"]))
            called = "kind of curvature" if name == "kind" else name
            raise MismatchError(
                f"the {called} {own} was {there[name]!r}, and that of the last stage is {value!r}: capture all stages "
                "of a run alike"
            )


def _other_parameters(own: str, names: Sequence[str], last: Sequence[str]) -> str:
    """What to do where stages were captured of other parameters, as where some were frozen in one of them."""
    apart = [name for name in dict.fromkeys((*names, *last)) if (name in names) != (name in last)]
    more = f" and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else ""
    return (
        f"the parameters {own} that were captured, and those of the last stage, differ by {apart[:_SHOWN]}{more}: "
        "where stages train other parameters, give parameters=[...] of those that all train to every Recorder, or "
        "record without capture and build the bank, which knows what each stage trained"
    )


def _curvature(content: dict[str, Any], loss_scale: float) -> Tensor:
    """Ĥ, of the gradients of the mean loss; a task's sampled gradients are of that whatever the loop's loss."""
    weight = _weight(content, "curvature_weight")
    flat: Tensor = content["curvature"].float() / weight
    if content["kind"] == "empirical_fisher":
        flat /= loss_scale**2
    return flat


def _weight(content: dict[str, Any], name: str = "weight") -> float:
    weight = float(content[name])
    if not weight > 0:
        raise GradientError(
            "no step of a segment was captured, or all had a learning rate of 0: record longer segments"
        )
    return weight
