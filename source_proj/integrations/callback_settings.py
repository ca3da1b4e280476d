"""What a Trainer's process was told that its gradients depend on, as a :class:`RecorderCallback` writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

from torch import nn

from source_proj._errors import MismatchError
from source_proj.integrations.trainer_arguments import accumulated_undivided

__all__ = ["RunSettings"]


@dataclass(frozen=True)
class RunSettings:
    """What holds from the step on that a process begins with, until another one goes on.

    Attributes:
        max_grad_norm: what gradients are clipped to; 0 for no clipping.
        label_smoothing: of the loss.
        accumulation: micro-batches whose gradients are summed, undivided, before a step; 1 where they are averaged.
        transformers: its version; "" where that is not known.
    """

    max_grad_norm: float = 0.0
    label_smoothing: float = 0.0
    accumulation: int = 1
    transformers: str = ""

    @classmethod
    def of(cls, args: Any, model: nn.Module, accumulation: int | None = None) -> Self:
        """Those of a Trainer that begins now.

        Args:
            args: its ``TrainingArguments``.
            model: the model that it trains.
            accumulation: what is known of its own loss; default: as of the model's.
        """
        smoothing = float(args.label_smoothing_factor)
        count = float(getattr(args, "gradient_accumulation_steps", 1))
        told = {"gradient_accumulation_steps": count, "label_smoothing_factor": smoothing}
        try:
            transformers = version("transformers")
        except PackageNotFoundError:
            transformers = ""
        undivided = accumulated_undivided(told, model, transformers) if accumulation is None else accumulation
        return cls(float(args.max_grad_norm or 0.0), smoothing, undivided, transformers)

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Self:
        """Those of a line of the log; what it lacks is taken for the Trainer's default."""
        smoothing, count = line.get("label_smoothing", 0.0), line.get("accumulation", 1)
        return cls(float(line["max_grad_norm"]), float(smoothing), int(count), str(line.get("transformers", "")))

    def line(self) -> dict[str, Any]:
        """What :meth:`read` reads."""
        return asdict(self)

    def require_same_loss(self, before: RunSettings) -> None:
        """Refuse to go on with another loss, of which a stage has one.

        Raises:
            MismatchError: labels are smoothed otherwise, or as many gradients are no longer summed.
        """
        if self.label_smoothing != before.label_smoothing:
            raise MismatchError(
                f"the run was recorded with label_smoothing_factor={before.label_smoothing} and goes on with "
                f"{self.label_smoothing}, and a stage has one loss: go on with the former, or record the rest as a run "
                "of its own, in another directory and from step 0"
            )
        if self.accumulation != before.accumulation:
            raise MismatchError(
                f"the run summed the gradients of {before.accumulation} micro-batches a step, undivided, and goes on "
                f"with sums of {self.accumulation}, and a stage has one number: go on with the former "
                "gradient_accumulation_steps, or record the rest as a run of its own, in another directory and from "
                "step 0"
            )
