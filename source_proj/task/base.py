"""The base of all tasks; also the task made of plain functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from source_proj.task.answers import Answers
from source_proj.task.batch import Batch, Model, Uniform, forwarded_once
from source_proj.task.code import code_digest, importable_name, interpreter

__all__ = [
    "Derivatives",
    "Task",
    "as_numbers",
    "checked_normalizer",
    "derivatives_of",
    "fisher_weight_of",
    "per_example",
]

Derivatives = tuple[Tensor, Tensor | None]
"""ℓ'(o) (B,), and ℓ''(o) (B,), or None where the loss is no function of the output alone."""


class Task:
    """What a model was trained on and what is asked of it: subclass it, or give functions.

    Args:
        output: function of (model, batch) to (B,): the scalar :math:`o(z)` of each example. Give it, or ``loss``.
        loss_derivatives: function of (outputs (B,), batch) to :math:`ℓ'(o)` (B,) and :math:`ℓ''(o)` (B,) or None,
            which refuses Gauss-Newton curvature for this task. Needed for training examples, not for queries.
        measurement: function of (model, batch) to (B,): what is asked of a query. The output, if not given: of a task
            by its loss, minus the loss.
        sampled_output: function of (model, batch, uniform) to (B,): log-likelihood of labels drawn from the model's
            own prediction. Needed for the sampled Fisher only.
        higher_is_better: whether a larger measurement is a better one.
        unit: unit of the measurement.
        name: the task's name.
        loss: function of (model, batch) to (B,): the loss of each example, in the place of ``output`` and
            ``loss_derivatives``: the output is minus the loss, and ℓ' is -1.

    Functions must run under ``torch.func.vmap(grad)``: no control flow that depends on values.

    Example:
        >>> import torch
        >>> def error(model, batch):
        ...     inputs, targets = batch
        ...     return (model(inputs).squeeze(-1) - targets).abs()
        >>> task = Task(loss=error, name="robust")
        >>> model = torch.nn.Linear(2, 1)
        >>> task.output(model, (torch.zeros(3, 2), torch.zeros(3))).shape
        torch.Size([3])
    """

    name: str = "custom"
    unit: str = "output"
    higher_is_better: bool = True

    normalizer: tuple[float, ...] | None = None
    """By what a batch's loss is divided, for each of its examples on average: one number a stage. See :meth:`share`."""

    query_options: frozenset[str] = frozenset({"measurement", "unit", "higher_is_better"})
    """Entries of the description that are of queries alone: one bank can be asked with any of their values."""

    _functions: Mapping[str, Callable[..., Any] | None] = {}

    def __init__(
        self,
        output: Callable[[Model, Batch], Tensor] | None = None,
        loss_derivatives: Callable[[Tensor, Batch], Derivatives] | None = None,
        measurement: Callable[[Model, Batch], Tensor] | None = None,
        sampled_output: Callable[[Model, Batch, Uniform], Tensor] | None = None,
        higher_is_better: bool | None = None,
        unit: str | None = None,
        name: str | None = None,
        *,
        loss: Callable[[Model, Batch], Tensor] | None = None,
    ) -> None:
        self._functions = {
            "loss": loss,
            "output": output,
            "loss_derivatives": loss_derivatives,
            "measurement": measurement,
            "sampled_output": sampled_output,
        }
        for key, function in self._functions.items():
            if function is not None and not callable(function):
                raise TypeError(f"{key} must be a function, got {function!r}")
        if type(self) is Task and output is None and loss is None:
            raise TypeError(
                "a custom task needs output= (with loss_derivatives=), or loss=, a function of (model, batch) to one "
                "scalar per example"
            )
        if loss is not None and (output is not None or loss_derivatives is not None):
            raise TypeError("loss= stands for output= and loss_derivatives=, which follow from it: leave these out")
        self.higher_is_better = type(self).higher_is_better if higher_is_better is None else higher_is_better
        by_default = type(self).unit if loss is None or measurement is not None else "minus loss"
        self.unit = by_default if unit is None else unit
        self.name = type(self).name if name is None else name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.spec().items())})"

    def output(self, model: Model, batch: Batch) -> Tensor:
        """Scalar output :math:`o(z)` of each example, (B,)."""
        if (loss := self._functions.get("loss")) is not None:
            return -per_example(loss(model, batch), "loss")
        return per_example(self._custom("output")(model, batch), "output")

    def loss_derivatives(self, output: Tensor, batch: Batch) -> Derivatives:
        """Loss derivatives :math:`ℓ'(o)` and :math:`ℓ''(o)` by the output, (B,) each; None where ℓ'' has no meaning."""
        if self._functions.get("loss") is not None:
            return -torch.ones_like(output), None
        first, second = _checked_pair(self._custom("loss_derivatives")(output, batch))
        return per_example(first, "ℓ'"), None if second is None else per_example(second, "ℓ''")

    def fisher_weight(self, batch: Batch) -> Tensor | None:  # noqa: ARG002
        r"""What the loss gradient is times in the empirical Fisher, (B,); None for 1.

        An example's loss is :math:`-w \sum_t \log p(y_t)`, where w may be a sample weight, or one over the number of
        tokens. Its Hessian is :math:`w \sum_t F_t` in expectation, and the outer product of its gradient
        :math:`w^2 \sum_t F_t`: hence :math:`1/\sqrt w`. Empirical and sampled Fisher then have one expectation.
        """
        return None

    def examine(self, model: Model, batch: Batch) -> None:
        """Warn if a batch contradicts the task; the model has the final weights. Most tasks have nothing to compare."""

    @property
    def needs_normalizer(self) -> bool:
        """Whether a batch's loss is divided by a sum over its examples that is not told yet; see :meth:`share`."""
        return False

    def share(self, batch: Batch) -> Tensor:
        """What each example adds to the number that its batch's loss is divided by, (B,): its tokens, its class weight.

        Averaged over a stage's training set this is its :attr:`normalizer`.
        """
        raise NotImplementedError(f"the task {self.name!r} divides a batch's loss by the number of its examples")

    def normalized(self, normalizer: Sequence[float]) -> Self:
        """The task with a normalizer, one number a stage."""
        told = copy.copy(self)
        told.normalizer = checked_normalizer(normalizer)
        return told

    def of_stage(self, stage: int) -> Self:
        """The task with the normalizer of one stage.

        Raises:
            ValueError: it was told of other stages.
        """
        if self.normalizer is None or len(self.normalizer) == 1 == stage + 1:
            return self
        if stage >= len(self.normalizer):
            raise ValueError(f"normalizer={list(self.normalizer)} has no number for stage {stage}: give one a stage")
        return self.normalized(self.normalizer[stage : stage + 1])

    def told_by(self, spec: Mapping[str, Any]) -> Self:
        """The task with the normalizer of a bank's description, where it has none itself."""
        return self.normalized(spec["normalizer"]) if self.needs_normalizer and "normalizer" in spec else self

    def measurement(self, model: Model, batch: Batch) -> Tensor:
        """Measurement :math:`m(q)` of each query, (B,)."""
        function = self._functions.get("measurement")
        return self.output(model, batch) if function is None else per_example(function(model, batch), "measurement")

    def asks_for_answers(self, batch: Batch) -> bool:  # noqa: ARG002
        """Whether the measurement of a batch of queries is of the model's own answers, not of targets that they have.

        Where it is, :meth:`answers` says them once, at the final weights, and :meth:`answered` puts them in place.
        """
        return False

    def answers(self, model: Model, batch: Batch) -> Answers:
        """The model's own answers to a batch of queries, with their probabilities."""
        raise NotImplementedError(f"the task {self.name!r} has no answers of its own: give queries with their targets")

    def answered(self, batch: Batch, values: Tensor) -> Batch:
        """The batch with answers as its targets."""
        raise NotImplementedError(f"the task {self.name!r} has no answers of its own: give queries with their targets")

    def by_target(self) -> Self:
        """The task whose measurement is of the targets that a batch has."""
        return self

    @property
    def forwards_once(self) -> bool:
        """Whether :meth:`output_and_samples` runs the model once for all of them."""
        return self.is_builtin()

    def output_and_samples(self, model: Model, batch: Batch, uniforms: Sequence[Uniform]) -> tuple[Tensor, ...]:
        """The output, and a sampled output for each source of numbers, (B,) each; of one forward pass if built in."""
        with forwarded_once() if self.forwards_once else nullcontext():
            return self.output(model, batch), *(self.sampled_output(model, batch, uniform) for uniform in uniforms)

    @property
    def sampled_draws(self) -> int:
        """Draws of labels an example that a bank is built with unless it is told another number."""
        return 0

    @property
    def parameter_weights(self) -> str:
        """What a bank multiplies gradients of parameters by unless it is told: "none" or "agreement"."""
        return "none"

    @property
    def draws_from_outputs(self) -> bool:
        """Whether :meth:`sampled_output` wants nothing of the model but what it returns for the batch."""
        return True

    def sampled_output(self, model: Model, batch: Batch, uniform: Uniform) -> Tensor:
        """Log-likelihood of labels drawn, without gradient, from the model's own prediction, (B,).

        It is scaled so that the mean outer product of its gradient is the Gauss-Newton Hessian of the training loss.
        """
        return per_example(self._custom("sampled_output")(model, batch, uniform), "sampled_output")

    def spec(self) -> dict[str, Any]:
        """JSON-able description, compared when a bank is opened with a task: name, options, names of functions."""
        if self.is_builtin():
            return {"name": self.name, **self._options()}
        functions = {key: importable_name(f) for key, f in self._functions.items() if f is not None}
        named = {"name": self.name, "class": importable_name(type(self)), **self._options(), **functions}
        return {**named, "unit": self.unit, "higher_is_better": self.higher_is_better}

    def code(self) -> dict[str, str]:
        """A hash of the code that makes rows, of each function that is the user's own; none of a built-in task.

        The entry "python" says whose compiler made the code: of two versions nothing can be compared.
        """
        if self.is_builtin():
            return {}
        own: dict[str, Any] = {key: self._functions.get(key) for key in ("loss", "output", "loss_derivatives")}
        own["class"] = None if type(self) is Task else type(self)
        hashes = {key: code_digest(thing) for key, thing in own.items() if thing is not None}
        return {"python": interpreter(), **hashes}

    def trains_as(self, spec: Mapping[str, Any]) -> bool:
        """Whether rows of a bank that is described so are this task's: all but :attr:`query_options` is equal.

        Functions are known by their names, and not by the module, which may have been a script or a notebook.
        """
        return self._compared(self.spec()) == self._compared(spec)

    def _compared(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        names = {"class", *self._functions} if "class" in spec else set()
        return {
            key: str(value).rpartition(":")[2] if key in names else value
            for key, value in spec.items()
            if key not in self.query_options
        }

    @staticmethod
    def from_spec(spec: Mapping[str, Any]) -> Task:
        """Rebuild one of the built-in tasks from its :meth:`spec`.

        Raises:
            ValueError: the task is a custom one, whose code only the caller has.
        """
        options = dict(spec)
        name = options.pop("name", None)
        builtin = {task.name: task for task in Task.__subclasses__() if task.is_builtin()}
        if name not in builtin or "class" in options:
            known = ", ".join(sorted(builtin))
            raise ValueError(f"task {name!r} is none of the built-in ones ({known}): give the task object as task=")
        return builtin[name](**options)

    def _options(self) -> dict[str, Any]:
        """Constructor arguments of a built-in task, for its description."""
        return {}

    @classmethod
    def is_builtin(cls) -> bool:
        """Whether the class itself, and not one that it derives from, is built in."""
        return "_builtin" in vars(cls)

    def _custom(self, key: str) -> Callable[..., Any]:
        function = self._functions.get(key)
        if function is None:
            raise NotImplementedError(
                f"the task {self.name!r} has no {key}: give {key}= to Task, or override it in {type(self).__name__}"
            )
        return function


def derivatives_of(task: Task, output: Tensor, batch: Batch) -> Derivatives:
    """A task's ℓ' and ℓ'' at a batch's outputs (B,), whoever wrote it.

    What is of another shape would be broadcast, or leave entries of the bank unwritten.

    Raises:
        TypeError: it returns no pair.
        ValueError: one of them is not one number an example.
    """
    first, second = _checked_pair(task.loss_derivatives(output, batch))
    size = len(output)
    return per_example(first, "ℓ'", size), None if second is None else per_example(second, "ℓ''", size)


def fisher_weight_of(task: Task, batch: Batch, size: int) -> Tensor | None:
    """A task's weights of the empirical Fisher for a batch of so many examples, whoever wrote it; None for 1.

    Raises:
        ValueError: they are not one number an example.
    """
    weight = task.fisher_weight(batch)
    return None if weight is None else per_example(weight, "fisher_weight", size)


def _checked_pair(derivatives: Any) -> Derivatives:
    """What a task's loss_derivatives returned, if it is a pair.

    Raises:
        TypeError: it is not.
    """
    if isinstance(derivatives, tuple | list) and len(derivatives) == 2:
        return derivatives[0], derivatives[1]
    size = f" of {len(derivatives)}" if isinstance(derivatives, tuple | list) else ""
    raise TypeError(
        f"loss_derivatives must return the pair (ℓ', ℓ''), got a {type(derivatives).__name__}{size}: return (ℓ', None) "
        "where there is no second derivative"
    )


def checked_normalizer(normalizer: Sequence[float] | float | None) -> tuple[float, ...] | None:
    """One number a stage, as a tuple; None stays None.

    Raises:
        ValueError: a number is not positive and finite, or there is none.
    """
    if normalizer is None:
        return None
    numbers = as_numbers((normalizer,) if isinstance(normalizer, int | float) else normalizer)
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"normalizer must be a positive number, or one a stage, got {normalizer!r}")
    return numbers


def as_numbers(values: Any) -> tuple[float, ...] | None:
    """Numbers as a tuple; None for anything else, also for texts, which `float` and `tuple` would take apart."""
    if isinstance(values, str | Mapping):
        return None
    try:
        numbers = [None if isinstance(value, str | bool) else float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return None if None in numbers else tuple(number for number in numbers if number is not None)


def per_example(values: Tensor, what: str, size: int | None = None) -> Tensor:
    """What a task returned, if it is one number for each of a batch's examples, `size` where that is known.

    Raises:
        ValueError: it is not.
    """
    if isinstance(values, Tensor) and values.ndim == 1 and size in (None, len(values)):
        return values
    found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    expected = "batch" if size is None else size
    raise ValueError(f"{what} must be one number per example, shape ({expected},), got {found}")
