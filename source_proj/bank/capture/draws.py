"""Labels drawn from the model while it trains, whose gradients make the sampled Fisher of a captured segment."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from source_proj._errors import GradientError, MismatchError
from source_proj.bank.build.uniform import Uniforms
from source_proj.bank.capture import processes
from source_proj.gradients.batches import map_tensors
from source_proj.sketch import without_autocast
from source_proj.task import Task
from source_proj.trajectory import CapturedCurvature
from source_proj.trajectory.counts import checked_count

__all__ = ["DrawnLabels"]

# Up to so many times k gradients of a segment, labels are drawn at one step in so many: Ĥ wants a few k of them, and
# each costs half a step. Of 600 sequences over 12 epochs, k = 4,096, one in 8, 4 and 2 steps gave an LDS of .364, .393
# and .413 (examples/paper/LABORATORY.md, study p).
_INTERVALS = ((1.0, 2), (4.0, 4), (math.inf, 8))


@dataclass
class _SegmentDraws:
    """How far a segment is.

    Attributes:
        steps: of the optimizer.
        next: the step at which labels are drawn next.
        passes: that labels were drawn of.
        factors: gradients that Ĥ has of them.
    """

    steps: int = 0
    next: int = 0
    passes: int = 0
    factors: int = 0


class DrawnLabels:
    """Says at which steps labels are drawn, draws them, and gives the gradients of their likelihood.

    The loop's own forward pass is the model's prediction: its outputs, cut from the graph, go to the task's
    ``sampled_output``, and the gradients by them back through the pass's graph.

    Args:
        task: what is trained on.
        every: draw at one optimizer step in so many, the first of a segment included; 0 for never. Default: by the
            task, where its labels are among the model's arguments, at first often and then more seldom.
        dim: numbers a row, k.
        seed: of the numbers.
        scaler: what scales the loss, where something does.

    Attributes:
        kind: which curvature is captured; None before the first pass shows what it has.

    Raises:
        ValueError: labels can't be drawn of this task's outputs, or every is no count.
    """

    def __init__(self, task: Task, every: int | None, dim: int, seed: int, scaler: GradScaler | None = None) -> None:
        self._task, self._dim, self._seed, self._scaler = task, dim, seed, scaler
        able = task.draws_from_outputs
        if every and not able:
            raise ValueError(f"draw_every={every}: {task!r} draws labels from more than the outputs; say draw_every=0")
        self._every = None if every is None else checked_count("draw_every", every, 0)
        self.kind: CapturedCurvature | None = None
        if every is not None or not (task.sampled_draws and able):
            self.kind = "sampled_fisher" if every else "empirical_fisher"
        self._segment = _SegmentDraws()

    @property
    def interval(self) -> int:
        """The number of steps that a draw at the coming one stands for, itself and those until the next."""
        if self._every is not None:
            return self._every
        return next(steps for share, steps in _INTERVALS if self._segment.factors < share * self._dim)

    @property
    def due(self) -> bool:
        """Whether labels are drawn at the coming step."""
        return self.kind != "empirical_fisher" and self._segment.steps >= self._segment.next

    def count_step(self, factors: int) -> None:
        """An optimizer step was taken, or skipped; how many gradients of drawn labels it added to Ĥ."""
        own = self._segment
        if factors:
            own.next = own.steps + self.interval
        own.steps, own.factors = own.steps + 1, own.factors + factors * processes.count()

    def __call__(
        self, output: Any, batch: Mapping[str, Any] | None, size: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
        """Tensors of the output, and the gradients by them of the drawn labels' likelihood; see `Sampler`.

        Raises:
            GradientError: none can be drawn, as which labels count is not known, or of these outputs.

        Warns:
            UserWarning: the same, where nothing was asked for: the empirical Fisher is captured.
        """
        if self.kind == "empirical_fisher":
            return None
        reason, cause = "labels are not among the model's arguments, so that none can be drawn in their place", None
        if batch is not None:
            try:
                asked = self._gradients(output, batch, size)
            except (TypeError, ValueError, AttributeError, IndexError) as error:
                reason, cause = f"labels can't be drawn of what the model returned ({error})", error
            else:
                self.kind = "sampled_fisher"
                return asked
        remedy = "call model(..., labels=labels), which a model that takes no labels doesn't get to see"
        if self.kind is not None:
            raise GradientError(f"{reason}: {remedy}; or record anew with draw_every=0") from cause
        self.kind = "empirical_fisher"
        warnings.warn(
            f"{reason}. The empirical Fisher is captured, which predicts retraining worse for language models: "
            f"{remedy}; or say draw_every=0",
            UserWarning,
            stacklevel=2,
        )
        return None

    def _gradients(self, output: Any, batch: Mapping[str, Any], size: int) -> tuple[list[Tensor], list[Tensor]]:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[0], Tensor) and output[0].ndim == 0:
            output = output[1:]  # the loss, which a model with labels puts first
        heads: list[Tensor] = []
        leaves: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            heads.append(tensor)
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1]

        given = map_tensors(output, cut)
        if not leaves:
            raise ValueError(f"a {type(output).__name__} without tensors that lead to parameters")
        places = torch.arange(size, device=heads[0].device) + (processes.rank() << 32)
        numbers = Uniforms(places, seed=self._seed, stage=0, checkpoint=self._segment.passes, draw=0)
        with without_autocast(), torch.enable_grad():
            likelihood = self._task.sampled_output(lambda *_, **__: given, batch, numbers)
            gradients = torch.autograd.grad(likelihood.sum() * (self.scale / size), leaves, allow_unused=True)
        self._segment.passes += 1
        pairs = [(head, g.to(head.dtype)) for head, g in zip(heads, gradients, strict=True) if g is not None]
        return [head for head, _ in pairs], [g for _, g in pairs]

    @property
    def scale(self) -> float:
        """What gradients are multiplied by beside one over the batch's size: as the loss, so that halves hold them."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def content(self) -> dict[str, Any]:
        """What is kept with a checkpoint."""
        return {"kind": self.kind or "sampled_fisher", "draws": asdict(self._segment)}

    def restart(self, content: Mapping[str, Any] | None) -> None:
        """Go on from what was kept; with None, begin a segment.

        Raises:
            MismatchError: another curvature was captured.
        """
        self._segment = _SegmentDraws()
        if content is None or not content["draws"]["steps"]:
            return
        if self.kind is not None and self.kind != content["kind"]:
            raise MismatchError(
                f"the recorded capture is of the {_NAMES[content['kind']]}, and draw_every={self._every} asks for the "
                f"{_NAMES[self.kind]}: go on as it was begun, or record anew in an empty directory"
            )
        self.kind, self._segment = content["kind"], _SegmentDraws(**content["draws"])


_NAMES = {"empirical_fisher": "empirical Fisher", "sampled_fisher": "sampled Fisher"}
