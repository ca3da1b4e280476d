"""Classification by softmax and cross-entropy."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from source_proj.task.answers import Answers, has_targets, inputs_of, with_labels
from source_proj.task.base import Derivatives, Task, as_numbers, checked_normalizer
from source_proj.task.batch import (
    Batch,
    Model,
    Uniform,
    checked_weight,
    class_indices,
    draw,
    first_examples,
    forward,
    logits_of,
    split,
    unsqueezed,
    weights,
)
from source_proj.task.labels import refuse_foreign_labels
from source_proj.task.margin import label_margin

__all__ = ["Classification"]

_EXAMINED = 8  # examples
_SUM = 1e-3  # as far from one as probabilities in half precision may sum to


class Classification(Task):
    r"""Multi-class classification by softmax and cross-entropy.

    The output is the margin :math:`o = \log p/(1-p) = z_y - \log \sum_{c ≠ y} e^{z_c}` of the labelled class, of which
    the loss is a function: :math:`ℓ = \log(1 + e^{-o})`, :math:`ℓ' = -(1-p)`, :math:`ℓ'' = p(1-p)`. With label
    smoothing it is not; the output is then minus the smoothed loss, :math:`ℓ' = -1`, and Gauss-Newton is refused.
    The measurement is the margin in either case.

    Class weights v are those of :func:`torch.nn.functional.cross_entropy`, which divides a batch's loss by the sum of
    its labels' weights: an example of class y weighs :math:`v_y / \bar v`, the mean taken over the training set.

    With smoothing ε the Hessian is still the softmax's, F, and the empirical Fisher is
    :math:`F + (ε/(1-ε))^2 (p - 1/C)(p - 1/C)^⊤` in expectation (no class weights): take the sampled one where ε is not
    small.

    Logits are (B, classes), at least two classes; labels are (B,) class indices.

    Args:
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`, in [0, 1).
        sample_weight: where a batch holds the weights by which its examples' losses were multiplied, (B,): the name
            of a dict entry, or 2, the third entry of a tuple.
        class_weights: one number a class, ≥ 0.
        normalizer: :math:`\bar v` for class weights, one number or one a stage; default: :func:`source_proj.build`
            takes the training set's. 1 where losses were weighted and then averaged over examples.
        target: which class queries are asked about: ``"label"``, their own; ``"predicted"``, what the model answers at
            the end of training ("why did it say this?"); or one class for all. Queries without labels are asked about
            the prediction. It changes no training gradient, and is no part of a bank.

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

    def __init__(
        self,
        label_smoothing: float = 0.0,
        sample_weight: str | int | None = None,
        class_weights: Sequence[float] | None = None,
        normalizer: float | Sequence[float] | None = None,
        target: str | int = "label",
    ) -> None:
        super().__init__()
        (self.label_smoothing,) = as_numbers([label_smoothing]) or (math.nan,)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be a number in [0, 1), got {label_smoothing!r}")
        self.sample_weight = checked_weight(sample_weight)
        self.class_weights = None if class_weights is None else as_numbers(class_weights) or (math.nan,)
        if self.class_weights is not None and not all(0 <= weight < math.inf for weight in self.class_weights):
            raise ValueError(
                f"class_weights must be numbers, one a class, finite and at least 0, got {class_weights!r}"
            )
        if normalizer is not None and class_weights is None:
            raise ValueError(f"normalizer={normalizer!r} belongs to class_weights=, which were not given")
        self.normalizer = checked_normalizer(normalizer)
        is_class = isinstance(target, int) and not isinstance(target, bool) and target >= 0
        if not is_class and target not in ("label", "predicted"):
            raise ValueError(f"target must be 'label', 'predicted' or a class index from 0 on, got {target!r}")
        self.target = target

    def output(self, model: Model, batch: Batch) -> Tensor:  # noqa: D102
        if not self.label_smoothing:
            return self._margin(model, batch)
        logits, labels = self._logits(model, batch)
        logp = log_softmax(logits, dim=-1)  # (B, C)
        if self.class_weights is not None:
            logp = logp * torch.tensor(self.class_weights, dtype=torch.float32, device="cpu").to(logp)
        labelled = logp.gather(1, labels[:, None]).squeeze(1)
        return (1 - self.label_smoothing) * labelled + self.label_smoothing * logp.mean(-1)

    def examine(self, model: Model, batch: Batch) -> None:
        """See whether the model answers with probabilities.

        Warns:
            UserWarning: no output is negative, and those of each example sum to one.
        """
        with torch.no_grad():
            try:
                inputs = inputs_of(first_examples(batch, _EXAMINED), self.sample_weight)
                logits = logits_of(model, inputs, isinstance(batch, Mapping))
            except (RuntimeError, IndexError, ValueError, TypeError):
                return  # who runs the model next says what is wrong with the batch
        if logits.ndim != 2 or logits.shape[1] < 2 or not len(logits):
            return
        if bool((logits >= 0).all()) and float((logits.float().sum(1) - 1).abs().max()) < _SUM:
            warnings.warn(
                f"the model's answers look like probabilities (each of {len(logits)} examples has outputs that sum to "
                "1), and Classification takes logits, to which it applies softmax itself: leave the last Softmax out, "
                "or return log(p). Only where the loss was cross_entropy of these very outputs are they right",
                UserWarning,
                stacklevel=3,
            )

    def loss_derivatives(self, output: Tensor, batch: Batch) -> Derivatives:  # noqa: D102
        weight = weights(batch, self.sample_weight, output)
        if self.class_weights is not None:
            weight = weight / self._mean_weight()
            if not self.label_smoothing:  # else they are in the output
                weight = weight * self.share(batch).to(weight)
        if self.label_smoothing:
            return -weight, None
        doubt = torch.sigmoid(-output.detach())  # 1 − p, without cancellation
        return -weight * doubt, weight * doubt * torch.sigmoid(output.detach())

    def fisher_weight(self, batch: Batch) -> Tensor | None:
        """One over the root of an example's weight; with smoothing, for the part of the gradient that is the label's.

        An example whose loss does not count has no gradient either, and gets 0.
        """
        if self.sample_weight is None and self.class_weights is None and not self.label_smoothing:
            return None
        weight = weights(batch, self.sample_weight, split(batch, self.sample_weight)[1].float())
        hessian, gradient = weight * self._mass(batch), weight * (1 - self.label_smoothing) * self._label_weight(batch)
        return torch.where(gradient > 0, hessian.sqrt() / gradient, 0.0)

    @property
    def needs_normalizer(self) -> bool:  # noqa: D102
        return self.class_weights is not None and self.normalizer is None

    def share(self, batch: Batch) -> Tensor:
        """Class weight of each label, (B,).

        Raises:
            ExampleError: a label is none of the classes that have a weight; names examples and values.
            ValueError: labels are not one number an example.
        """
        labels, known = class_indices(split(batch, self.sample_weight)[1]), self.class_weights or ()
        if labels.ndim != 1:
            raise ValueError(
                f"labels must be one class an example, (B,), got {tuple(labels.shape)}: of one-hot rows give "
                "labels.argmax(-1); of a label for every token write a Task, as sp.CausalLM(shift=False) has no class "
                "weights"
            )
        logits = torch.empty(len(labels), len(known), device=labels.device, dtype=torch.float32)  # of as many classes
        _, labels = refuse_foreign_labels(logits, labels)
        return torch.tensor(known, device=labels.device, dtype=torch.float32)[labels]

    def measurement(self, model: Model, batch: Batch) -> Tensor:  # noqa: D102
        if self.asks_for_answers(batch):
            batch = self.answered(batch, self.answers(model, batch).values)
        return self._margin(model, batch)

    def asks_for_answers(self, batch: Batch) -> bool:  # noqa: D102
        return self.target != "label" or not has_targets(batch)

    def answers(self, model: Model, batch: Batch) -> Answers:
        """The target class of each query, and the probability that the model gives it.

        Raises:
            ValueError: the target is none of the model's classes, or the queries are no batch.
        """
        inputs = inputs_of(batch, self.sample_weight)
        with torch.no_grad():
            logits = unsqueezed(logits_of(model, inputs, isinstance(batch, Mapping)), inputs, 2)
        if logits.ndim < 2:
            raise ValueError(
                f"the model answers with shape {tuple(logits.shape)}, and the logits of a batch are (B, C): give "
                "queries as a batch, a single input as input[None]"
            )
        if isinstance(self.target, int) and self.target >= logits.shape[-1]:
            raise ValueError(f"target={self.target} is none of the model's {logits.shape[-1]} classes, from 0 on")
        named, asked = isinstance(self.target, int), logits.argmax(-1)
        if isinstance(self.target, int):
            asked = torch.full_like(asked, self.target)
        return Answers(asked, logits.softmax(-1).gather(-1, asked[..., None]).squeeze(-1), chosen=not named)

    def answered(self, batch: Batch, values: Tensor) -> Batch:  # noqa: D102
        return with_labels(batch, values, self.sample_weight)

    def by_target(self) -> Self:  # noqa: D102
        told = copy.copy(self)
        told.target = "label"
        return told

    def _margin(self, model: Model, batch: Batch) -> Tensor:
        """Margin of the batch's labels, (B,)."""
        return label_margin(*self._logits(model, batch))

    def sampled_output(self, model: Model, batch: Batch, uniform: Uniform) -> Tensor:  # noqa: D102
        logp = log_softmax(self._logits(model, batch)[0], dim=-1)
        drawn = draw(logp, uniform(1)[:, 0])
        root = (weights(batch, self.sample_weight, logp[:, 0]) * self._mass(batch)).sqrt()
        return root * logp.gather(1, drawn[:, None]).squeeze(1)

    def _options(self) -> dict[str, Any]:
        weighted = {} if self.class_weights is None else {"class_weights": list(self.class_weights)}
        told = {} if self.normalizer is None else {"normalizer": list(self.normalizer)}
        return {"label_smoothing": self.label_smoothing, "sample_weight": self.sample_weight, **weighted, **told}

    def _mean_weight(self) -> float:
        if self.normalizer is None:
            raise ValueError(
                "Classification(class_weights=...) divides by the mean weight of the training set's labels, which "
                "source_proj.build takes: give it as normalizer= elsewhere"
            )
        return self.normalizer[0]

    def _label_weight(self, batch: Batch) -> Tensor | float:
        """Weight of each label's own log-likelihood in the loss, (B,), smoothing aside."""
        return 1.0 if self.class_weights is None else self.share(batch) / self._mean_weight()

    def _mass(self, batch: Batch) -> Tensor | float:
        """What the softmax's Fisher matrix is times in the loss's Hessian, (B,)."""
        if self.class_weights is None:
            return 1.0
        uniform = sum(self.class_weights) / len(self.class_weights) / self._mean_weight()
        return (1 - self.label_smoothing) * self._label_weight(batch) + self.label_smoothing * uniform

    def _logits(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = forward(model, batch, self.sample_weight, 2)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"Classification needs logits of shape (batch, classes) with two classes or more, got "
                f"{tuple(logits.shape)}; {_binary(logits) or _of_tokens(logits)}"
            )
        if self.class_weights is not None and len(self.class_weights) != logits.shape[1]:
            raise ValueError(
                f"{len(self.class_weights)} class_weights for logits of {logits.shape[1]} classes: one each"
            )
        if labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels {tuple(labels.shape)} do not go with logits {tuple(logits.shape)}: one an example"
                f"{', such as labels.argmax(-1) of one-hot rows' if labels.shape == logits.shape else ''}"
                f"{', labels.squeeze(1)' if labels.shape == (len(logits), 1) else ''}"
            )
        return refuse_foreign_labels(logits, class_indices(labels))


def _of_tokens(logits: Tensor) -> str:
    """What to do about logits of more dims than two, such as those of a label for every token."""
    if logits.ndim != 3:
        return "write a Task"
    return (
        "where every token has a label, take sp.CausalLM(shift=False), whose logits are (batch, tokens, classes) and "
        "whose labels are (batch, tokens), -100 where none counts; else write a Task"
    )


def _binary(logits: Tensor) -> str | None:
    """What makes two logits of one, (B,) or (B, 1); None for other shapes."""
    if logits.ndim > 2 or (logits.ndim == 2 and logits.shape[1] != 1):
        return None
    column = " of z = logits[:, None]" if logits.ndim == 1 else ""
    return (
        "for one logit z an example (binary cross-entropy), give a model that returns "
        f"torch.cat([torch.zeros_like(z), z], 1){column}"
    )
