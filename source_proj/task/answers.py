"""What a model itself says of queries: their targets, where they have none of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import ExampleError, MismatchError
from source_proj.task.batch import TOKENISE, Batch, Model, logits_of, texts_of, without_cache

__all__ = ["Answer", "Answers", "continued", "greedy", "has_targets", "inputs_of", "with_labels"]

_MASKS = {"input_ids", "attention_mask", "token_type_ids"}


@dataclass(frozen=True)
class Answer:
    """What one query is asked about in the place of a target of its own.

    Attributes:
        value: a class index, or the tokens of a continuation.
        probability: of the class; of a continuation, the geometric mean of its tokens' probabilities.
        chosen: whether the model chose it, not whoever asked.
    """

    value: int | list[int]
    probability: float
    chosen: bool = True

    @property
    def verb(self) -> str:
        """What stands before it where it is shown: predicted, continued by, or asked about."""
        if isinstance(self.value, list):
            return "continued by"
        return "predicted" if self.chosen else "asked about"

    def __str__(self) -> str:
        words = f"class {self.value}" if isinstance(self.value, int) else f"{len(self.value)} tokens"
        return f"{words}, probability {self.probability:.3g}"


@dataclass(frozen=True)
class Answers:
    """What Q queries are asked about in the place of targets of their own.

    Attributes:
        values: classes ``(Q,)``, or tokens of continuations ``(Q, T)``, ``padding`` after their ends.
        probabilities: ``(Q,)``; see :class:`Answer`.
        padding: what is no token.
        chosen: whether the model chose them, not whoever asked.
    """

    values: Tensor
    probabilities: Tensor
    padding: int = -100
    chosen: bool = True

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Answer:
        value = self.values[index]
        said = int(value) if value.ndim == 0 else [int(token) for token in value if token != self.padding]
        return Answer(said, float(self.probabilities[index]), self.chosen)

    def at(self, places: Sequence[int]) -> Answers:
        """Those of the queries at some places."""
        return replace(self, values=self.values[list(places)], probabilities=self.probabilities[list(places)])

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """Those of several batches, in order."""
        values = [part.values.cpu() for part in parts]
        if values[0].ndim == 2:
            length = max(value.shape[1] for value in values)
            values = [
                torch.nn.functional.pad(value, (0, length - value.shape[1]), value=parts[0].padding) for value in values
            ]
        probabilities = torch.cat([part.probabilities.cpu() for part in parts])
        return cls(torch.cat(values), probabilities, parts[0].padding, parts[0].chosen)


def has_targets(batch: Batch) -> bool:
    """Whether a batch brings its targets: (input, target), or a dict with "labels"."""
    if isinstance(batch, Mapping):
        return "labels" in batch
    return isinstance(batch, tuple | list) and len(batch) > 1


def inputs_of(batch: Batch, sample_weight: str | int | None = None) -> Any:
    """A batch's inputs alone: a dict of the model's keyword arguments, or its one argument."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("labels", sample_weight)}
    return batch[0] if isinstance(batch, tuple | list) else batch


def with_labels(batch: Batch, labels: Tensor, sample_weight: str | int | None = None) -> Batch:
    """The batch with other labels; where the task wants weights and there are none, they are 1."""
    ones = torch.ones(len(labels), dtype=torch.float32, device="cpu")
    if isinstance(batch, Mapping):
        return {**({sample_weight: ones} if isinstance(sample_weight, str) else {}), **batch, "labels": labels}
    rest = batch[2:] if has_targets(batch) else [ones] * (sample_weight is not None)
    return [inputs_of(batch), labels, *rest]


@torch.no_grad()
def greedy(model: Model, batch: Batch, count: int, padding: int) -> Answers:
    """Continue each sequence of a batch by its likeliest tokens, one sequence at a time.

    By the model's own ``generate`` where it has one (transformers), which stops at the end of a text.

    Args:
        model: a language model.
        batch: token sequences ``(B, T)``, alone or as "input_ids" with an "attention_mask".
        count: tokens of a continuation, at most.
        padding: stands after the end of shorter ones.
    """
    tokens, masks = _sequences(batch)
    by_name = isinstance(batch, Mapping)
    device = next(model.parameters()).device if isinstance(model, nn.Module) else tokens.device
    rows, likelihoods = [], []
    for sequence, mask in zip(tokens, masks, strict=True):
        prompt = sequence[mask].to(device)[None]
        room = _room(model, prompt.shape[1], count)
        if hasattr(model, "generate"):
            whole = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=1,
                max_new_tokens=room, pad_token_id=_padding_token(model),
            )  # fmt: skip
        else:
            whole = prompt
            for done in range(room):
                inputs = {"input_ids": whole} if by_name else whole
                try:
                    logits = logits_of(model, inputs, by_name)
                except (RuntimeError, IndexError, ExampleError) as error:
                    if not done:
                        raise
                    raise MismatchError(_too_long(model, prompt, done, count, error)) from error
                whole = torch.cat([whole, logits[:, -1:].argmax(-1)], dim=1)
        said = whole[0, prompt.shape[1] :]
        inputs = without_cache(model, {"input_ids": whole}) if by_name else whole
        logp = logits_of(model, inputs, by_name)[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        rows.append(said)
        likelihoods.append(logp.gather(1, said[:, None]).mean() if len(said) else logp.new_zeros(()))
    values = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    return Answers(values, torch.stack(likelihoods).exp(), padding)


def _too_long(model: Model, prompt: Tensor, done: int, count: int, error: Exception) -> str:
    given = prompt.shape[1]
    return (
        f"the model {type(model).__name__} takes {given + done - 1} tokens ({str(error).splitlines()[0]}), and a query "
        f"of {given} without labels is asked about {count} more that the model goes on with: give shorter queries, "
        "fewer by CausalLM(max_new_tokens=...), or pairs (tokens, tokens) to ask about the texts themselves"
    )


def continued(batch: Batch, values: Tensor, padding: int, shift: bool) -> Batch:
    """Sequences with their continuations behind them, whose tokens alone count.

    Args:
        batch: as for :func:`greedy`.
        values: continuations ``(B, G)``.
        padding: what is no token of them, and the label of what does not count.
        shift: whether labels are aligned with the inputs, as transformers has it.
    """
    tokens, masks = _sequences(batch)
    inputs, labels = [], []
    for sequence, mask, said in zip(tokens, masks, values, strict=True):
        prompt, said = sequence[mask], said[said != padding].to(sequence)
        whole, counted = torch.cat([prompt, said]), torch.cat([torch.full_like(prompt, padding), said])
        inputs.append(whole if shift else whole[:-1])
        labels.append(counted if shift else counted[1:])
    stacked = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    wanted = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=padding)
    if not isinstance(batch, Mapping):
        return [stacked, wanted]
    lengths = torch.tensor([len(row) for row in inputs], device=stacked.device, dtype=torch.int64)
    read = torch.arange(stacked.shape[1], device=stacked.device) < lengths[:, None]
    return {"input_ids": stacked, "attention_mask": read.long(), "labels": wanted}


def _sequences(batch: Batch) -> tuple[Tensor, Tensor]:
    """Token sequences ``(B, T)`` and which of their tokens are read.

    Raises:
        TypeError: it holds texts.
        ValueError: the batch holds what is no sequence, and would be lost.
    """
    inputs = inputs_of(batch)
    if isinstance(inputs, str):
        raise TypeError(f"the queries are texts such as {inputs[:40]!r}: {TOKENISE}")
    if not isinstance(inputs, Mapping):
        return inputs, torch.ones_like(inputs, dtype=torch.bool)
    if texts := texts_of(inputs):
        raise TypeError(f"the queries' {', '.join(map(repr, texts))} is text: {TOKENISE}")
    unknown = sorted(set(inputs) - _MASKS)
    if unknown or "input_ids" not in inputs:
        raise ValueError(
            f"sequences without labels are continued from 'input_ids' and 'attention_mask' alone, got "
            f"{sorted(inputs)}: leave the other entries out, or give labels"
        )
    tokens = inputs["input_ids"]
    return tokens, inputs.get("attention_mask", torch.ones_like(tokens)).bool()


def _room(model: Any, length: int, count: int) -> int:
    """How many tokens a prompt of some length is continued by.

    Raises:
        ValueError: it is empty, or leaves no room.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    room = count if positions is None else min(count, positions - length)
    if not length or room < 1:
        limit = "" if positions is None else f" and the model has {positions} positions"
        raise ValueError(f"a prompt has {length} tokens{limit}: nothing goes on from there; give another, or labels")
    return room


def _padding_token(model: Any) -> int | None:
    """What ``generate`` pads with; it warns where nobody says."""
    settings = getattr(model, "generation_config", None)
    known = getattr(settings, "pad_token_id", None)
    end = getattr(settings, "eos_token_id", None)
    return known if known is not None else end[0] if isinstance(end, list) else end
