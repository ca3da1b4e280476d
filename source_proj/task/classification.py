"""Classification by softmax and cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from source_proj.task.base import Derivatives, Task
from source_proj.task.batch import Batch, Model, Uniform, checked_weight, class_indices, draw, forward, weights
from source_proj.task.labels import refuse_foreign_labels

__all__ = ["Classification"]


class Classification(Task):
    r"""Multi-class classification by softmax and cross-entropy.

    The output is the margin :math:`o = \log p/(1-p) = z_y - \log \sum_{c ≠ y} e^{z_c}` of the labelled class, of which
    the loss is a function: :math:`ℓ = \log(1 + e^{-o})`, :math:`ℓ' = -(1-p)`, :math:`ℓ'' = p(1-p)`. With label
    smoothing it is not; the output is then minus the smoothed loss, :math:`ℓ' = -1`, and Gauss-Newton is refused.
    The measurement is the margin in either case.

    Logits are (B, classes), at least two classes; labels are (B,) class indices.

    Args:
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`, in [0, 1).
        sample_weight: where a batch holds the weights by which its examples' losses were multiplied, (B,): the name
            of a dict entry, or 2, the third entry of a tuple.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 3.0]])
        >>> task = Classification()
        >>> margin = task.output(lambda inputs: inputs, (logits, torch.tensor([2])))
        >>> first, second = task.loss_derivatives(margin, None)
        >>> bool(torch.isclose(first, logits.softmax(-1)[:, 2] - 1))
        True
    """

    name = "classification"
    _builtin = True
    unit = "logit margin"

    def __init__(self, label_smoothing: float = 0.0, sample_weight: str | int | None = None) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.label_smoothing = float(label_smoothing)
        self.sample_weight = checked_weight(sample_weight)

    def output(self, model: Model, batch: Batch) -> Tensor:  # noqa: D102
        if not self.label_smoothing:
            return self.measurement(model, batch)
        logits, labels = self._logits(model, batch)
        logp = log_softmax(logits, dim=-1)  # (B, C)
        labelled = logp.gather(1, labels[:, None]).squeeze(1)
        return (1 - self.label_smoothing) * labelled + self.label_smoothing * logp.mean(-1)

    def loss_derivatives(self, output: Tensor, batch: Batch) -> Derivatives:  # noqa: D102
        weight = weights(batch, self.sample_weight, output)
        if self.label_smoothing:
            return -weight, None
        doubt = torch.sigmoid(-output.detach())  # 1 − p, without cancellation
        return -weight * doubt, weight * doubt * torch.sigmoid(output.detach())

    def measurement(self, model: Model, batch: Batch) -> Tensor:  # noqa: D102
        logits, labels = self._logits(model, batch)
        is_label = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]  # (B, C)
        others = logits.masked_fill(is_label, -math.inf)
        return logits.gather(1, labels[:, None]).squeeze(1) - others.logsumexp(-1)

    def sampled_output(self, model: Model, batch: Batch, uniform: Uniform) -> Tensor:  # noqa: D102
        logp = log_softmax(self._logits(model, batch)[0], dim=-1)
        drawn = draw(logp, uniform(1)[:, 0])
        root = weights(batch, self.sample_weight, logp[:, 0]).sqrt()
        return root * logp.gather(1, drawn[:, None]).squeeze(1)

    def _options(self) -> dict[str, Any]:
        return {"label_smoothing": self.label_smoothing, "sample_weight": self.sample_weight}

    def _logits(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = forward(model, batch, self.sample_weight)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"Classification needs logits of shape (batch, classes) with two classes or more, got "
                f"{tuple(logits.shape)}; for one logit a class, stack it with zeros, or write a Task"
            )
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels {tuple(labels.shape)} do not go with logits {tuple(logits.shape)}: one an example"
            )
        return refuse_foreign_labels(logits, class_indices(labels))
