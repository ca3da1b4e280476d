"""Labels drawn from the model while it trains, whose gradients make the sampled Fisher of a captured segment."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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

_EVERY = 4  # steps: a backward pass more at one in so many costs about a tenth of training


class DrawnLabels:
    """Says at which steps labels are drawn, draws them, and gives the gradients of their likelihood.

    The loop's own forward pass is the model's prediction: its outputs, cut from the graph, go to the task's
    ``sampled_output``, and the gradients by them back through the pass's graph.

    Args:
        task: what is trained on.
        every: draw at one optimizer step in so many, the first of a segment included; 0 for never. Default: by the
            task, where its labels are among the model's arguments.
        seed: of the numbers.
        scaler: what scales the loss, where something does.

    Attributes:
        kind: which curvature is captured; None before the first pass shows what it has.

    Raises:
        ValueError: labels can't be drawn of this task's outputs, or every is no count.
    """

    def __init__(self, task: Task, every: int | None, seed: int, scaler: GradScaler | None = None) -> None:
        self._task, self._seed, self._scaler = task, seed, scaler
        able = task.draws_from_outputs
        if every and not able:
            raise ValueError(f"draw_every={every}: {task!r} draws labels from more than the outputs; say draw_every=0")
        wanted = _EVERY if task.sampled_draws and able else 0
        self._every = wanted if every is None else checked_count("draw_every", every, 0)
        self._given = every
        self.kind: CapturedCurvature | None = None
        if self._every == 0 or every:
            self.kind = "sampled_fisher" if self._every else "empirical_fisher"
        self._steps = self._drawn = 0  # of the segment: optimizer's steps, and passes that labels were drawn of
        self._added = False  # whether any of these counted

    def count_step(self, *, added: bool) -> None:
        """An optimizer step was taken, or skipped; whether its labels' gradients were added to Ĥ."""
        self._steps += 1
        self._added |= added

    @property
    def due(self) -> bool:
        """Whether labels are drawn at the coming step: until a segment has some, and then at one in so many."""
        return self.kind != "empirical_fisher" and (not self._added or self._steps % self._every == 0)

    def __call__(
        self, output: Any, batch: Mapping[str, Any] | None, size: int
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
        """Tensors of the output, and the gradients by them of the drawn labels' likelihood; see `Sampler`.

        Raises:
            GradientError: which labels count is not known, as the batch has none.

        Warns:
            UserWarning: the same, where nothing was asked for: the empirical Fisher is captured.
        """
        if self.kind is None:
            self.kind = "empirical_fisher" if batch is None else "sampled_fisher"
            if batch is None:
                warnings.warn(
                    "labels are not among the model's arguments, so that none can be drawn in their place, and the "
                    "empirical Fisher is captured: it predicts retraining worse for language models. Call "
                    "model(..., labels=labels), which a model that takes no labels doesn't get to see; or say "
                    "draw_every=0",
                    UserWarning,
                    stacklevel=2,
                )
        if self.kind == "empirical_fisher":
            return None
        if batch is None:
            raise GradientError(
                "which labels count must be known when labels are drawn: call model(..., labels=labels), which a model "
                "that takes no labels doesn't get to see; or record anew with draw_every=0"
            )
        heads: list[Tensor] = []
        leaves: list[Tensor] = []

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            heads.append(tensor)
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1]

        given = map_tensors(output, cut)
        places = torch.arange(size, device=heads[0].device if heads else None) + (processes.rank() << 32)
        numbers = Uniforms(places, seed=self._seed, stage=0, checkpoint=self._drawn, draw=0)
        self._drawn += 1
        with without_autocast(), torch.enable_grad():
            likelihood = self._task.sampled_output(lambda *_, **__: given, batch, numbers)
            gradients = torch.autograd.grad(likelihood.sum() * (self.scale / size), leaves, allow_unused=True)
        pairs = [(head, g.to(head.dtype)) for head, g in zip(heads, gradients, strict=True) if g is not None]
        return [head for head, _ in pairs], [g for _, g in pairs]

    @property
    def scale(self) -> float:
        """What gradients are multiplied by beside one over the batch's size: as the loss, so that halves hold them."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def content(self) -> dict[str, Any]:
        """What is kept with a checkpoint."""
        kind = self.kind or ("sampled_fisher" if self._every else "empirical_fisher")
        return {"kind": kind, "steps": self._steps, "drawn": self._drawn, "added": self._added}

    def restart(self, content: Mapping[str, Any] | None) -> None:
        """Go on from what was kept; with None, begin a segment.

        Raises:
            MismatchError: another curvature was captured.
        """
        self._steps, self._drawn, self._added = 0, 0, False
        if content is None or not content["steps"]:
            return
        if self.kind is not None and self.kind != content["kind"]:
            raise MismatchError(
                f"the recorded capture is of the {_NAMES[content['kind']]}, and draw_every={self._given} asks for the "
                f"{_NAMES[self.kind]}: go on as it was begun, or record anew in an empty directory"
            )
        self.kind, self._added = content["kind"], content["added"]
        self._steps, self._drawn = content["steps"], content["drawn"]


_NAMES = {"empirical_fisher": "empirical Fisher", "sampled_fisher": "sampled Fisher"}
