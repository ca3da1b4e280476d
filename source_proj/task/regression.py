"""Regression of one number by the squared error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from source_proj.task.answers import inputs_of
from source_proj.task.base import Derivatives, Task
from source_proj.task.batch import (
    Batch,
    Model,
    Uniform,
    checked_weight,
    forward,
    logits_of,
    split,
    unsqueezed,
    weights,
)
from source_proj.task.labels import refuse_infinite

__all__ = ["Regression"]


class Regression(Task):
    r"""Regression of one number by the squared error.

    The output is the prediction :math:`o`. ``loss="mse"`` is torch's :math:`(o - y)^2`, ``"half_mse"`` is
    :math:`½(o - y)^2`. The measurement is the error :math:`|o - y|` ("absolute") or :math:`(o - y)^2` ("squared"), of
    which less is better, or :math:`o` itself ("prediction"), which helpful examples raised and harmful ones lowered,
    and which queries without targets have, too. A bank that was built with one can be asked about the others.

    Errors have a kink, or a minimum, at 0: first-order changes that are larger than a query's error say which way its
    prediction moves, and can't be changes of the error. Ask about the prediction there.

    Predictions are (B,) or (B, 1), and so are the targets.

    Args:
        measurement: "absolute", "squared" or "prediction".
        loss: "mse" or "half_mse".
        sample_weight: as in :class:`Classification`.

    Example:
        >>> task = Regression()
        >>> batch = (torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 3.0]))
        >>> task.measurement(lambda inputs: inputs, batch)
        tensor([2., 1.])
        >>> task.loss_derivatives(task.output(lambda inputs: inputs, batch), batch)
        (tensor([-4.,  2.]), tensor([2., 2.]))
    """

    name = "regression"
    _builtin = True
    query_options = frozenset({"measurement"})

    def __init__(
        self, measurement: str = "absolute", loss: str = "mse", sample_weight: str | int | None = None
    ) -> None:
        if measurement not in ("absolute", "squared", "prediction"):
            raise ValueError(f"measurement must be 'absolute', 'squared' or 'prediction', got {measurement!r}")
        if loss not in ("mse", "half_mse"):
            raise ValueError(f"loss must be 'mse' or 'half_mse', got {loss!r}")
        of_errors = measurement != "prediction"
        super().__init__(unit=f"{measurement} error" if of_errors else measurement, higher_is_better=not of_errors)
        self.measured = measurement
        self.loss = loss
        self.sample_weight = checked_weight(sample_weight)
        self._curvature = 2.0 if loss == "mse" else 1.0

    def output(self, model: Model, batch: Batch) -> Tensor:  # noqa: D102
        return self._prediction(model, batch)[0]

    def loss_derivatives(self, output: Tensor, batch: Batch) -> Derivatives:  # noqa: D102
        target = refuse_infinite(_column(split(batch, self.sample_weight)[1], "targets"))
        second = self._curvature * weights(batch, self.sample_weight, output)
        return second * (output.detach() - target.to(output)), second

    def fisher_weight(self, batch: Batch) -> Tensor | None:
        """One over the root of an example's weight; an example of weight 0 has no gradient, and gets 0."""
        if self.sample_weight is None:
            return None
        weight = weights(batch, self.sample_weight, _column(split(batch, self.sample_weight)[1], "targets").float())
        return torch.where(weight > 0, weight.rsqrt(), 0.0)

    def measurement(self, model: Model, batch: Batch) -> Tensor:  # noqa: D102
        if self.measured == "prediction":
            inputs = inputs_of(batch, self.sample_weight)
            outputs = logits_of(model, inputs, isinstance(batch, Mapping))
            return _column(unsqueezed(outputs, batch, 1), "predictions")
        prediction, target = self._prediction(model, batch)
        error = prediction - refuse_infinite(target).to(prediction)
        return error.abs() if self.measured == "absolute" else error.square()

    def sampled_output(self, model: Model, batch: Batch, uniform: Uniform) -> Tensor:
        """Gaussian log-likelihood, the loss's own: variance 1/ℓ'', drawn by the Box-Muller transform."""
        prediction = self.output(model, batch)
        u = uniform(2).to(prediction)
        normal = (-2 * torch.log1p(-u[:, 0])).sqrt() * torch.cos(2 * math.pi * u[:, 1])
        drawn = prediction.detach() + normal / math.sqrt(self._curvature)
        root = weights(batch, self.sample_weight, prediction).sqrt()
        return -root * 0.5 * self._curvature * (prediction - drawn).square()

    def _options(self) -> dict[str, Any]:
        return {
            "measurement": self.measured,
            "loss": self.loss,
            "sample_weight": self.sample_weight,
        }

    def _prediction(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        prediction, target = forward(model, batch, self.sample_weight, 1)
        prediction, target = _column(prediction, "predictions"), _column(target, "targets")
        if prediction.shape != target.shape:
            raise ValueError(f"{len(prediction)} predictions for {len(target)} targets: one each")
        return prediction, target


def _column(values: Tensor, what: str) -> Tensor:
    """(B,) or (B, 1) to (B,)."""
    if values.ndim == 2 and values.shape[1] == 1:
        return values.squeeze(1)
    if values.ndim != 1:
        raise ValueError(
            f"Regression needs {what} of shape (batch,) or (batch, 1), got {tuple(values.shape)}: "
            "one number an example; write a Task for more"
        )
    return values
