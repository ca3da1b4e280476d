"""Batches taken apart, models called, labels drawn: what the tasks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import ExampleError
from source_proj.task.indices import refuse_foreign_indices

__all__ = [
    "TOKENISE",
    "Batch",
    "Model",
    "Uniform",
    "checked_weight",
    "class_indices",
    "draw",
    "first_examples",
    "forward",
    "forwarded_once",
    "given_once",
    "logits_of",
    "made_once",
    "split",
    "texts_of",
    "unsqueezed",
    "weights",
    "without_cache",
]

Model = Callable[..., Any]
"""A module, or anything that is called like one."""

Batch = Any
"""(input, target), or a dict with "labels" whose other entries are the model's keyword arguments."""

TOKENISE = (
    "tokenise as in training, tokenizer(texts, padding=True, return_tensors='pt'); for a bank that was built "
    "from texts, give source_proj.integrations.TextBank(path).read(rows)"
)

Uniform = Callable[[int], Tensor]
"""``uniform(n)`` gives (B, n) reproducible numbers in [0, 1)."""


def split(batch: Batch, sample_weight: str | int | None) -> tuple[Any, Tensor, Tensor | None]:
    """Take a batch apart: model inputs (a dict where they are keyword arguments), labels, weights."""
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        needed = ["labels"] if sample_weight is None else ["labels", sample_weight]
        missing = [key for key in needed if key not in inputs]
        if missing:
            remedy = _labelled(batch) if missing[0] == "labels" else ""
            raise ValueError(f"the batch has no entry {missing[0]!r}, only {sorted(map(str, batch))}{remedy}")
        labels = _numbers(inputs.pop("labels"))
        return inputs, labels, None if sample_weight is None else inputs.pop(sample_weight)
    expected = 2 if sample_weight is None else 3
    if not isinstance(batch, Sequence) or len(batch) != expected or isinstance(sample_weight, str):
        raise ValueError(
            f"a batch must be a dict with 'labels'"
            f"{f' and {sample_weight!r}' if isinstance(sample_weight, str) else ''}, or a tuple (input, target"
            f"{', weight' if expected == 3 else ''}), got {_describe(batch)}{_paired(batch)}"
        )
    return batch[0], _numbers(batch[1]), None if sample_weight is None else batch[2]


def _numbers(labels: Any) -> Tensor:
    """Labels as collating makes them of numbers.

    Raises:
        TypeError: they are something else, such as the names of classes.
    """
    if isinstance(labels, Tensor):
        return labels
    of_rows, of_names = "rows as tensors, torch.tensor(row)", "each class a number from 0 on, names.index(label)"
    got, remedy = type(labels).__name__, of_names if _is_text(labels) else of_rows
    raise TypeError(f"the labels of a batch must be a tensor of numbers, got a {got}: give {remedy}")


def first_examples(batch: Batch, count: int) -> Batch:
    """The first examples of a batch: of its tensors, those rows."""
    if isinstance(batch, Mapping):
        return {key: first_examples(value, count) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [first_examples(value, count) for value in batch]
    return batch[:count] if isinstance(batch, Tensor) and batch.ndim else batch


_DRAWN_AT_ONCE = 4 << 20
"""Probabilities whose cumulative sums are held at once, but for those of one example (16 MiB of float32)."""

_GIVEN: ContextVar[dict[object, tuple[Any, Any]] | None] = ContextVar("_GIVEN", default=None)


@contextmanager
def forwarded_once() -> Iterator[None]:
    """Within, what a model gave for the very same inputs, and was made of it, is given again, with its graph."""
    token = _GIVEN.set({})
    try:
        yield
    finally:
        _GIVEN.reset(token)


def given_once(module: Model, inputs: Any, run: Callable[[], Any]) -> Any:
    """What a module gives for inputs, or gave for them within :func:`forwarded_once`."""
    parts = tuple((name, id(value)) for name, value in inputs.items()) if isinstance(inputs, Mapping) else id(inputs)
    return made_once((id(module), parts), inputs, run)


def made_once(key: tuple[Any, ...], source: Any, make: Callable[[], Any]) -> Any:
    """What is made of a source, or was made of it within :func:`forwarded_once`.

    Args:
        key: what is made, and of what: the source by its ``id``.
        source: held with what was made of it, so that nothing else takes its ``id``.
        make: makes it.
    """
    made = _GIVEN.get()
    if made is None:
        return make()
    key = (*key, torch.is_grad_enabled())
    if key not in made:
        made[key] = make(), source
    return made[key][0]


def forward(model: Model, batch: Batch, sample_weight: str | int | None, dims: int) -> tuple[Tensor, Tensor]:
    """Run the model; return its logits or predictions, of ``dims`` dims, in float32 at least, and the labels."""
    inputs, labels, _ = split(batch, sample_weight)
    logits = logits_of(model, inputs, isinstance(batch, Mapping))
    return unsqueezed(logits, labels, dims), labels


def unsqueezed(logits: Tensor, batch: Any, dims: int) -> Tensor:
    """Logits of so many dims for a batch: a model that says ``squeeze()`` loses the first one of a batch of one."""
    if isinstance(batch, Mapping | tuple | list):
        entries = batch.values() if isinstance(batch, Mapping) else batch
        batch = next((entry for entry in entries if isinstance(entry, Tensor)), None)
    of_one = isinstance(batch, Tensor) and batch.shape[:1] == (1,)
    return logits[None] if of_one and logits.ndim == dims - 1 and logits.shape[:1] != (1,) else logits


def logits_of(model: Model, inputs: Any, by_name: bool) -> Tensor:
    """Run the model on inputs, by keyword or as its one argument; its logits or predictions, in float32 at least.

    Raises:
        TypeError: it returns none.
    """
    result = _called(model, inputs, by_name)
    if isinstance(result, Mapping) and "logits" in result:
        result = result["logits"]
    elif hasattr(result, "logits"):
        result = result.logits
    elif isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise TypeError(
            f"the model must return a tensor, an object or dict with logits, or a tuple that begins with "
            f"them, got {type(result).__name__}"
        )
    # Half precision, as autocast leaves it, is too coarse for the loss; torch's own autocast takes losses to float32.
    return result.float() if result.dtype in (torch.float16, torch.bfloat16) else result


def _called(model: Model, inputs: Any, by_name: bool) -> Any:
    """Call the model, and say more of inputs that it cannot take."""

    def run() -> Any:
        return model(**without_cache(model, inputs)) if by_name else model(inputs)

    try:
        return given_once(model, inputs, run)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        refuse_foreign_indices(model, run)
        slips = _slips(model, inputs if by_name else {"the input": inputs}, by_name)
        if not slips or isinstance(error, torch.OutOfMemoryError):
            raise
        raise TypeError(f"{'; '.join(slips)} ({type(model).__name__} says: {error})") from error


def _slips(model: Model, inputs: Mapping[str, Any], by_name: bool) -> list[str]:
    """What is probably wrong with a model's inputs, and what to do."""
    known = signature(model.forward).parameters if isinstance(model, nn.Module) else {}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    formats = {p.dtype for p in model.parameters()} if isinstance(model, nn.Module) else set()
    found = []
    if by_name and (texts := texts_of(inputs)):
        return [f"{', '.join(map(repr, texts))} is text, and the model takes numbers: {TOKENISE}"]
    for key, value in inputs.items():
        name = repr(key) if by_name else key
        if by_name and known and not open_ended and key not in known:
            found.append(f"the model takes no argument {name}: {_renamed(key, inputs, known)}")
        elif _is_text(value):
            found.append(f"{name} is text, and the model takes numbers: {TOKENISE}")
        elif isinstance(value, list | tuple) and value and all(isinstance(entry, Tensor) for entry in value):
            found.append(
                f"{name} is a list of {len(value)} tensors {tuple(value[0].shape)}, as default_collate makes "
                "of rows that are Python lists: give rows as tensors, torch.tensor(row), or inputs of their own as a "
                "dict, by the names of the model's arguments, with 'labels'"
            )
        elif isinstance(value, Tensor) and value.dtype == torch.float64 and torch.float64 not in formats:
            own = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in formats)) or "of none"
            found.append(f"{name} is float64, and the model {own}: give it as float32, by .float()")
    return found


def _renamed(key: str, inputs: Mapping[str, Any], known: Mapping[str, Parameter]) -> str:
    """What to do about a column that is no argument of the model's: a model's one input has another name there."""
    needed = [name for name, argument in known.items() if argument.default is argument.empty and name not in inputs]
    if len(inputs) == 1 and len(needed) <= 1:
        name = (needed or list(known))[0]
        return f"call the column {key!r} {name!r}, as its forward does, or give tuples (input, target)"
    return (
        f"leave the column {key!r} out in the collate_fn, and it is still shown, or out of the data set"
        f"{f'; the model needs {needed[0]!r}' if len(needed) == 1 else ''}"
    )


def texts_of(inputs: Mapping[str, Any]) -> list[str]:
    """The entries of inputs that are texts, where none is a tensor: these were never tokenised."""
    if any(isinstance(value, Tensor) for value in inputs.values()):
        return []
    return [key for key, value in inputs.items() if _is_text(value)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str))


def without_cache(model: Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A model's keyword arguments, with ``use_cache=False`` where it knows that.

    A cache for generation is of no use here, and with one transformers' models do not see where the sequences that are
    packed into one row begin, which they do see in training.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # within PEFT's wrapper
    known = signature(base.forward).parameters if isinstance(base, nn.Module) else {}
    return {**({"use_cache": False} if "use_cache" in known else {}), **inputs}


def weights(batch: Batch, sample_weight: str | int | None, like: Tensor) -> Tensor:
    """Sample weights (B,), ones where there are none.

    Raises:
        ExampleError: a weight is negative or not finite; names examples and values. Under ``torch.func.vmap`` no value
            can be looked at.
        ValueError: they are not one number an example.
    """
    if sample_weight is None:
        return torch.ones_like(like.detach())
    weight = split(batch, sample_weight)[2]
    if not isinstance(weight, Tensor) or weight.shape != like.shape:
        found = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"sample weights must be a tensor of shape {tuple(like.shape)}, got {found}")
    with suppress(RuntimeError):
        places = (~((weight >= 0) & weight.isfinite())).nonzero()[:, 0].tolist()
        if places:
            raise ExampleError(
                places,
                f"the sample weights of {{examples}} are {weight[places[:10]].tolist()}, and must be finite and at "
                "least 0: mend them, or leave these examples out",
            )
    return weight.detach().to(like)


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Draw classes (...) from log-probabilities (..., C) by inverting their cumulative sum, without gradient.

    Args:
        logp: log-probabilities.
        uniform: one number in [0, 1) for each draw, (...).
    """
    if logp.ndim < 3:
        return _drawn(logp.detach(), uniform)
    some = max(1, _DRAWN_AT_ONCE // max(1, logp[0].numel()))  # of a large vocabulary two copies are more than the model
    parts = zip(logp.detach().split(some), uniform.split(some), strict=True)
    return torch.cat([_drawn(*part) for part in parts])


def _drawn(logp: Tensor, uniform: Tensor) -> Tensor:
    cumulative = logp.exp().cumsum(-1)
    threshold = uniform.to(logp)[..., None] * cumulative[..., -1:]
    return (cumulative <= threshold).sum(-1).clamp(max=logp.shape[-1] - 1)


def class_indices(labels: Tensor) -> Tensor:
    """Integer labels of any width as int64; other types are refused."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels must be integer class indices, got {labels.dtype}: give labels.long() (of a frame, the column's "
            "astype(int)), or of probabilities or one-hot rows labels.argmax(-1)"
        )
    return labels.long()


def checked_weight(sample_weight: str | int | None) -> str | int | None:
    """Refuse what names no place in a batch."""
    if sample_weight is None or isinstance(sample_weight, str) or (sample_weight == 2 and sample_weight is not True):
        return sample_weight
    raise ValueError(f"sample_weight must name an entry of dict batches, or be 2 for tuples, got {sample_weight!r}")


def _labelled(batch: Mapping[str, Any]) -> str:
    """Where labels may come from, of a batch that has none."""
    if "label" in batch:
        return ": rename 'label' to 'labels'"
    if "input_ids" in batch:
        return (
            ": give a DataLoader with the run's collator, which makes the labels, of a language model "
            "DataLoader(data, batch_size=..., collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)); or "
            "give each row its 'labels' (of a language model, those of input_ids)"
        )
    return ": call the entry that the model is trained to give 'labels'"


def _paired(batch: Batch) -> str:
    """What a batch of inputs alone lacks, and how several inputs are given."""
    if isinstance(batch, Tensor) or (isinstance(batch, Sequence) and len(batch) == 1):
        return ": the labels are missing, give TensorDataset(inputs, labels)"
    several = ": give several inputs as a dict, by the names of the model's arguments, with 'labels'"
    return several if isinstance(batch, Sequence) and not isinstance(batch, str) else ""


def _describe(batch: Batch) -> str:
    size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    return f"a {type(batch).__name__}{size}"
