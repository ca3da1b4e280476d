"""Language modelling by the likelihood of each next token."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from source_proj import kernels
from source_proj._errors import SourceProjError
from source_proj.task.answers import Answers, continued, greedy, has_targets
from source_proj.task.base import Derivatives, Task, checked_normalizer
from source_proj.task.batch import (
    Batch,
    Model,
    Uniform,
    class_indices,
    draw,
    first_examples,
    forward,
    made_once,
    split,
)
from source_proj.task.head import Head, check_head, hidden_and_head, sum_over_chunks
from source_proj.task.labels import refuse_foreign_tokens

__all__ = ["CausalLM"]

_FAR = 1.0  # nats a token
_EXAMINED = 4  # sequences
_ONE_ANSWER = "for one answer an example, take Classification"


class CausalLM(Task):
    r"""Language modelling, one token after another.

    The output and the measurement are the log-likelihood of a sequence's labels, :math:`o = \sum_t \log p(y_t)` for
    "sum", else its mean over the n counted tokens. Gauss-Newton is refused, as the loss is no function of one scalar of
    the network. The loss of a batch of B sequences says which reduction a run was trained with:

    ============= ========================================================= ================
    reduction     loss of a batch                                           :math:`ℓ'(o)`
    ============= ========================================================= ================
    ``"mean"``    mean over sequences of the mean over their tokens         -1
    ``"sum"``     mean over sequences of the sum over their tokens          -1
    ``"token"``   mean over all tokens of the batch, accumulated or not, as :math:`-n/\bar n`
                  transformers' Trainer has it
    ============= ========================================================= ================

    With "token" a sequence weighs by its length: a batch has :math:`B \bar n` tokens in expectation, where
    :math:`\bar n` is the mean over the training set. With equal lengths it is "mean". Loss and learning rates are then
    those of the run: nothing else is scaled.

    Logits are (B, T, vocabulary), labels (B, T). A sequence without a counted token gives 0.

    Args:
        shift: the labels are aligned with the inputs, as transformers has it: position t predicts label t + 1.
            False where the data set has shifted them already.
        reduction: "mean", "sum" or "token".
        normalizer: for "token", what divides a batch's loss for each of its sequences on average, one number or one a
            stage. Default: :math:`\bar n`, which :func:`source_proj.build` counts in the training set. ``"labels"``
            has it count the first label of a sequence too, which nothing predicts: so did the Trainer before
            transformers 5.10, and so it does to this day for GPT-2; all gradients are then that much smaller.
        ignore_index: the label of tokens that do not count (padding, prompts).
        chunk: make logits for so many tokens at a time, and once more in the backward pass: for large vocabularies, of
            which (B, T, vocabulary) would not fit. For models of transformers whose logits are the output of their
            head alone; this is checked.
        max_new_tokens: queries without labels are asked about what the model itself goes on with, its likeliest next
            tokens, this many at most. It changes no training gradient, and is no part of a bank.

    A model of transformers with an encoder and a decoder makes the decoder's inputs of the labels, each family in its
    own way. A task hides the labels from it, so batches for such a model must hold ``decoder_input_ids``.

    Example:
        >>> uniform_model = lambda input_ids: torch.zeros(*input_ids.shape, 10)
        >>> tokens = torch.tensor([[1, 2, 3], [1, 2, 3]])
        >>> labels = torch.tensor([[1, 2, 3], [-100, -100, -100]])
        >>> CausalLM(reduction="sum").output(uniform_model, {"input_ids": tokens, "labels": labels})
        tensor([-4.6052,  0.0000])
    """

    name = "causal_lm"
    _builtin = True

    def __init__(
        self,
        shift: bool = True,
        reduction: str = "mean",
        ignore_index: int = -100,
        chunk: int | None = None,
        normalizer: float | Sequence[float] | Literal["labels"] | None = None,
        max_new_tokens: int = 32,
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens counts tokens, from 1 on, got {max_new_tokens!r}")
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk counts tokens, from 1 on, got {chunk!r}")
        if shift not in (True, False):
            raise ValueError(f"shift must be True or False, got {shift!r}")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index is a label, an integer such as -100, got {ignore_index!r}")
        if reduction not in ("mean", "sum", "token"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'token', got {reduction!r}")
        if normalizer is not None and reduction != "token":
            raise ValueError(f"normalizer={normalizer!r} belongs to reduction='token', got reduction={reduction!r}")
        super().__init__(unit=f"{'sequence' if reduction == 'sum' else 'mean token'} log-likelihood (nats)")
        self.shift = shift
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.chunk = chunk
        self.max_new_tokens = max_new_tokens
        self._counts_all = normalizer == "labels"
        self.normalizer = None if self._counts_all else checked_normalizer(normalizer)  # type: ignore[arg-type]
        self._checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose head was compared

    def output(self, model: Model, batch: Batch) -> Tensor:  # noqa: D102
        if self.chunk is not None:
            total, counted = self._by_chunks(model, batch, self.chunk, None)
            return total / self._length(counted)
        logits, labels, counted = self._tokens(model, batch)
        return _summed(_picked(logits, labels), counted) / self._length(counted)

    def loss_derivatives(self, output: Tensor, batch: Batch) -> Derivatives:  # noqa: D102
        ones = torch.ones_like(output.detach())
        return (-self._count(batch).to(ones) / self._mean_tokens() if self.reduction == "token" else -ones), None

    def fisher_weight(self, batch: Batch) -> Tensor | None:  # noqa: D102
        if self.reduction == "sum":
            return None
        tokens = self._count(batch)
        if self.reduction == "token":
            return torch.full_like(tokens, math.sqrt(self._mean_tokens()))
        return tokens.clamp(min=1).sqrt()

    def asks_for_answers(self, batch: Batch) -> bool:  # noqa: D102
        return not has_targets(batch)

    def answers(self, model: Model, batch: Batch) -> Answers:
        """Each query's continuation, as the model's ``generate`` has it (greedy), or by its likeliest tokens."""
        _require_decoder_inputs(model, batch)
        return greedy(model, batch, self.max_new_tokens, self.ignore_index)

    def answered(self, batch: Batch, values: Tensor) -> Batch:  # noqa: D102
        return continued(batch, values, self.ignore_index, self.shift)

    def examine(self, model: Model, batch: Batch) -> None:
        """Compare the likelihood of a batch's labels with that under the other value of ``shift``.

        Warns:
            UserWarning: it is worse by more than a nat a token, so that ``shift`` does not fit the labels; where there
                are few labels and the other likelihood says that the model knows them, by a quarter of chance's.
        """
        _require_decoder_inputs(model, batch)
        with torch.no_grad():
            try:
                logits, labels = forward(model, first_examples(batch, _EXAMINED), None, 3)
            except (RuntimeError, IndexError) as error:
                if isinstance(error, SourceProjError):
                    raise
                return  # who runs the model next says what is wrong with the batch
            if logits.ndim != 3 or labels.shape != logits.shape[:2] or labels.shape[1] < 2:
                return  # `output` says what is wrong
            refuse_foreign_tokens(logits, class_indices(labels), labels != self.ignore_index, self.ignore_index)
            logp = log_softmax(logits, dim=-1)
            aligned, shifted = self._mean_likelihood(logp[:, :-1], labels[:, 1:]), self._mean_likelihood(logp, labels)
            if len(labels) and not (labels != self.ignore_index).any():
                warnings.warn(
                    f"no label of the first {len(labels)} examples counts, all are {self.ignore_index}: such sequences "
                    "have no gradient, and no score. Were their prompts masked, and the rest cut off?",
                    UserWarning,
                    stacklevel=3,
                )
        here, other = (aligned, shifted) if self.shift else (shifted, aligned)
        chance = math.log(logits.shape[2])
        if other - here > (min(_FAR, chance / 4) if other > -chance / 2 else _FAR):
            state = "shifted already, or to belong to their own tokens (tags)" if self.shift else "not shifted"
            warnings.warn(
                f"the labels seem to be {state}: their log-likelihood is {here:.3g} nats a token with "
                f"CausalLM(shift={self.shift}), and {other:.3g} with shift={not self.shift}",
                UserWarning,
                stacklevel=3,
            )

    def _mean_likelihood(self, logp: Tensor, labels: Tensor) -> float:
        """Log-likelihood of the counted labels (B, T) under logp (B, T, V), a token; NaN if none counts."""
        counted = labels != self.ignore_index
        picked = logp.gather(2, torch.where(counted, class_indices(labels), 0)[..., None]).squeeze(2)
        return float(picked[counted].mean()) if counted.any() else math.nan

    @property
    def needs_normalizer(self) -> bool:  # noqa: D102
        return self.reduction == "token" and self.normalizer is None

    def share(self, batch: Batch) -> Tensor:
        """Number of labels that divide the batch's loss, (B,)."""
        return (_labels(batch) != self.ignore_index).sum(-1) if self._counts_all else self._count(batch)

    def _count(self, batch: Batch) -> Tensor:
        """Number of counted tokens, (B,)."""
        labels = _labels(batch)
        return (labels[:, 1 if self.shift else 0 :] != self.ignore_index).sum(-1).float()

    @property
    def sampled_draws(self) -> int:
        """One: the sampled Fisher predicts retraining better than the empirical one, and needs labels drawn."""
        return 1 if self.is_builtin() else 0  # where the likelihood is another, so is the Fisher

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_checked": None}  # what was checked here is not what is there

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _checked=weakref.WeakSet())

    @property
    def parameter_weights(self) -> str:
        """By agreement: checkpoints of language models disagree on the embeddings, whose gradients are large."""
        return "agreement" if self.is_builtin() else "none"

    @property
    def draws_from_outputs(self) -> bool:
        """Not by chunks, whose logits are made of the hidden states."""
        return self.chunk is None

    def sampled_output(self, model: Model, batch: Batch, uniform: Uniform) -> Tensor:
        """Log-likelihood of drawn tokens, times the root of what each token's counts for in the loss.

        Draws at different positions are independent, so that the outer product of the summed gradient is the sum of
        the positions' Fisher matrices in expectation; the loss's Hessian is their mean, or another multiple of it.
        """
        if self.chunk is not None:
            total, counted = self._by_chunks(model, batch, self.chunk, uniform)
        else:
            logits, labels, counted = self._tokens(model, batch)
            logp = _log_probabilities(logits, labels.shape[1])
            drawn = draw(logp, uniform(labels.shape[1]))
            total = _summed(_picked(logits, drawn, logp), counted)
        return total / (math.sqrt(self._mean_tokens()) if self.reduction == "token" else self._length(counted).sqrt())

    def _options(self) -> dict[str, Any]:
        chunked = {} if self.chunk is None else {"chunk": self.chunk}
        given = list(self.normalizer) if self.normalizer else "labels" if self._counts_all else None
        told = {} if given is None else {"normalizer": given}
        return {"shift": self.shift, "reduction": self.reduction, "ignore_index": self.ignore_index, **chunked, **told}

    def _mean_tokens(self) -> float:
        if self.normalizer is None:
            raise ValueError(
                "CausalLM(reduction='token') divides by the mean number of tokens of a training sequence, which "
                "source_proj.build counts: give it as normalizer= elsewhere"
            )
        return self.normalizer[0]

    def _by_chunks(self, model: Model, batch: Batch, chunk: int, uniform: Uniform | None) -> tuple[Tensor, Tensor]:
        """Log-likelihood (B,) of the labels, or of tokens drawn with ``uniform``; and whether each counts (B, T)."""
        _require_decoder_inputs(model, batch)
        inputs, labels, _ = split(batch, None)
        if not isinstance(inputs, dict):
            raise TypeError("CausalLM(chunk=...) needs dict batches, whose entries are the model's arguments")
        if isinstance(model, nn.Module) and model not in self._checked and torch.is_grad_enabled():
            with suppress(RuntimeError):  # under vmap no value can be looked at; a hook path is proven outside of it
                check_head(model, inputs)
                self._checked.add(model)
        hidden, head = hidden_and_head(model, inputs)
        labels, counted = self._aligned(labels, hidden)
        hidden = hidden[:, : labels.shape[1]]
        numbers = [] if uniform is None else [uniform(labels.shape[1])]
        return sum_over_chunks(_likelihood, chunk, head, hidden, labels, counted, *numbers), counted

    def _aligned(self, labels: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B, T) of positions in order, safe to gather with, and whether each counts."""
        if values.ndim != 3 or labels.shape != values.shape[:2]:
            remedy = f"; {_ONE_ANSWER}" if values.ndim == 2 else _of_a_prompt(values, labels)
            raise ValueError(
                f"CausalLM needs logits (batch, tokens, vocabulary) and labels (batch, tokens), got "
                f"{tuple(values.shape)} and {tuple(labels.shape)}{remedy}"
            )
        labels = class_indices(labels)
        if self.shift:
            if labels.shape[1] < 2:
                raise ValueError(f"shift=True needs two tokens or more, got labels {tuple(labels.shape)}")
            labels = labels[:, 1:]
        counted = labels != self.ignore_index
        return torch.where(counted, labels, 0), counted

    def _tokens(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, T, V), labels (B, S) of the first S positions, safe to gather with, and whether each counts.

        Made once for labels and for drawn tokens: logits in half precision, or under vmap, are copied on the way.
        """

        def make() -> tuple[Tensor, Tensor, Tensor]:
            _require_decoder_inputs(model, batch)
            logits, labels = forward(model, batch, None, 3)
            labels, counted = self._aligned(labels, logits)
            return *refuse_foreign_tokens(logits, labels, counted, self.ignore_index, int(self.shift)), counted

        made: tuple[Tensor, Tensor, Tensor] = made_once(("tokens", id(self), id(model), id(batch)), batch, make)
        return made

    def _length(self, counted: Tensor) -> Tensor:
        length = counted.sum(-1).clamp(min=1).float()
        return torch.ones_like(length) if self.reduction == "sum" else length


def _of_a_prompt(values: Tensor, labels: Tensor) -> str:
    """What to do about a prompt that PEFT tuned: its tokens stand in front and have logits, but no labels."""
    if values.ndim != 3 or labels.ndim != 2 or values.shape[1] <= labels.shape[1]:
        return ""
    count = values.shape[1] - labels.shape[1]
    return (
        f": if the {count} positions more are a tuned prompt's in front, whose last one predicts the first label, "
        f"write a Task of logits[:, {count - 1}:-1] and all labels"
    )


def _labels(batch: Batch) -> Tensor:
    """A batch's labels (B, T).

    Raises:
        ValueError: they are one an example.
    """
    labels = split(batch, None)[1]
    if not isinstance(labels, Tensor):
        raise ValueError(
            "CausalLM needs labels (batch, tokens) as a tensor, got "
            f"{type(labels).__name__}, as a batch of Python lists has: give rows of torch.tensor(...), or a DataLoader "
            "with the collator of the run"
        )
    if labels.ndim < 2:
        raise ValueError(
            "CausalLM needs labels (batch, tokens), and logits (batch, tokens, vocabulary), got labels "
            f"{tuple(labels.shape)}; {_ONE_ANSWER}"
        )
    return labels


def _require_decoder_inputs(model: Model, batch: Batch) -> None:
    """Refuse batches of which a model of transformers would make other decoder inputs than in training, or none.

    Raises:
        ValueError: the model has an encoder and a decoder, and the batch no inputs for the latter.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    if not isinstance(batch, Mapping) or not {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder, and makes the decoder's inputs of the labels, which "
            "CausalLM does not pass on: write a Task whose output passes decoder_input_ids, or give batches an entry "
            "'decoder_input_ids' and take CausalLM(shift=False)"
        )


def _likelihood(head: Head, hidden: Tensor, labels: Tensor, counted: Tensor, numbers: Tensor | None = None) -> Tensor:
    """Log-likelihood (B,) of the counted labels of some tokens, or of tokens drawn with numbers (B, T) in [0, 1)."""
    logits = head(hidden)
    if numbers is None:
        return _summed(_picked(logits, labels), counted)
    logp = _log_probabilities(logits, labels.shape[1])
    return _summed(_picked(logits, draw(logp, numbers), logp), counted)


def _log_probabilities(logits: Tensor, steps: int) -> Tensor:
    """Of the first positions, (B, steps, V), in float32 at least; made once for labels and for drawn tokens."""

    def make() -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return log_softmax(logits[:, :steps], dim=-1, dtype=wide)

    made: Tensor = made_once(("log-probabilities", id(logits), steps), logits, make)
    return made


def _picked(logits: Tensor, labels: Tensor, logp: Tensor | None = None) -> Tensor:
    """Log-likelihood of each label (B, S) under logits (B, T, V); logp, where that is known already."""
    fused = kernels.label_likelihood(logits, labels)
    if fused is not None:
        return fused
    logp = _log_probabilities(logits, labels.shape[1]) if logp is None else logp
    return logp.gather(2, labels[..., None]).squeeze(2)


def _summed(picked: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, picked, 0.0).sum(-1)
