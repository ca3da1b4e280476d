"""The gradient that a step of training sees, as a function that can be differentiated again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.data import Subset

from source_proj._errors import GradientError
from source_proj.bank.build.data import BatchSource, to_device
from source_proj.gradients.batches import own_copy
from source_proj.gradients.private_copy import private_copy
from source_proj.gradients.replaced import call_with, exchanged
from source_proj.task import Batch, Model, Task
from source_proj.task.base import derivatives_of

__all__ = ["StepGradient"]


class StepGradient:
    r"""The gradient :math:`\frac1B \sum_{z \in B} w_z \nabla ℓ_z(θ)` of a batch, by a model whose weights are given.

    Args:
        model: in evaluation mode; its parameters that require a gradient are trained.
        task: what is minimised.
        data: a map-style data set.

    Raises:
        GradientError: a layer of the model that is trained otherwise than its gradient says, or whose gradient torch
            differentiates wrongly.
    """

    def __init__(self, model: nn.Module, task: Task, data: Any) -> None:
        _require_suited(model)
        self._model, self._task, self._data = model, task, data
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def in_double(self) -> StepGradient:
        """The same in double precision, of a copy of the model."""
        return StepGradient(private_copy(self._model).double(), self._task, self._data)

    @contextmanager
    def held(self, parameters: list[Tensor]) -> Iterator[Model]:
        """Within, the model has these weights, also for what it computes again on the way back; gives the model.

        Fused attention has no second derivative, and is not used.
        """
        named = dict(zip(self.names, parameters, strict=True))
        with exchanged(self._model, named), sdpa_kernel(SDPBackend.MATH), _SpelledOut():
            yield lambda *inputs, **keywords: call_with(self._model, named, inputs, keywords)

    def placed(self, batch: Batch) -> Batch:
        """The batch where the weights are, in their precision: data are seldom in float64."""
        return to_device(batch, self.start[0].device, self.start[0].dtype)

    def of(self, places: Sequence[int], parameters: list[Tensor], weights: Tensor | None) -> list[Tensor]:
        """The mean gradient of the examples at some places of the data, a tensor for each parameter.

        Args:
            places: B of them.
            parameters: leaves that require a gradient, `held` around this and any backward pass through it.
            weights: ``(B,)``, of which and of the parameters the gradient is then a function; None for a plain one.

        Raises:
            GradientError: gradients are sparse, or the pass changes weights in place.
        """
        ((_, _, batch),) = BatchSource(Subset(self._data, places), len(places)).load([(0, len(places))])
        batch = self.placed(batch)
        versions = [p._version for p in parameters]
        named = dict(zip(self.names, parameters, strict=True))
        output = self._task.output(lambda *x, **options: call_with(self._model, named, x, options), own_copy(batch))
        changed = [name for name, p, old in zip(self.names, parameters, versions, strict=True) if p._version != old]
        if changed:
            raise GradientError(
                f"the forward pass changes the weights {changed[:5]} in place, which no gradient tells of: leave that "
                "out, or freeze them"
            )
        slope = _slope(self._task, output, batch) / len(places)
        slope = slope.detach() if weights is None else slope * weights
        gradients = torch.autograd.grad(
            output, parameters, slope, create_graph=weights is not None, materialize_grads=True
        )
        sparse = [name for name, g in zip(self.names, gradients, strict=True) if g.layout is not torch.strided]
        if sparse:
            raise GradientError(
                f"the gradients of {sparse[:5]} are sparse, which torch does not differentiate again: make the "
                "embedding with sparse=False, or freeze it"
            )
        return list(gradients)


class _SpelledOut(TorchFunctionMode):
    """Weight normalisation by operations that torch differentiates twice rightly.

    Of its fused kernel the second derivative is wrong (torch 2.14: ``gradgradcheck`` refuses it).
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _require_suited(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or not module.weight.requires_grad:
            continue
        kind = type(module).__name__
        if module.max_norm is not None:
            raise GradientError(
                f"{name!r} is an {kind} with max_norm={module.max_norm}, which renormalises its weight in place, and "
                "no gradient tells of that: train with max_norm=None, or freeze it"
            )
        if module.scale_grad_by_freq:
            raise GradientError(
                f"{name!r} is an {kind} with scale_grad_by_freq=True, whose gradient torch differentiates as if it "
                "were not scaled: train with scale_grad_by_freq=False, or freeze it"
            )


def _slope(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """The loss's derivative by the output, (B,), as a function that can itself be differentiated.

    Raises:
        ValueError: a task's ℓ' varies with the output, and its ℓ'' is not told.
    """
    first, second = derivatives_of(task, output, batch)
    if second is not None:
        return first.detach() + second.detach() * (output - output.detach())
    moved, _ = derivatives_of(task, output.detach() + 1, batch)
    if not first.requires_grad and not torch.equal(moved, first):
        raise ValueError(f"loss_derivatives of the task {task.name!r} gives an ℓ' that varies, and no ℓ'': return both")
    return first
