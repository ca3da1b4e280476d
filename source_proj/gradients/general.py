"""The general path: `vmap(grad)` for any model that torch can differentiate, and the reference of the hook path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from source_proj._errors import ExampleError, GradientError, SourceProjError
from source_proj.gradients.batches import Batch, has_lists, per_example_tensors, require_in_front, take
from source_proj.gradients.replaced import call_with
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace
from source_proj.trajectory.placement import Placement
from source_proj.trajectory.placement.base import Live

__all__ = [
    "CHUNK_BYTES",
    "REENTRANT",
    "Autocast",
    "Function",
    "Functions",
    "GeneralPath",
    "checked_values",
    "first_line",
    "weighted_gradient",
]

Function: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Functions: TypeAlias = Callable[[nn.Module, Batch], Sequence[Tensor]]
Autocast: TypeAlias = Callable[[], AbstractContextManager[object]]
_Some: TypeAlias = tuple[int, Tensor, dict[str, Tensor]]  # first example, values (n,), gradients {name: (n, *shape)}

REENTRANT = (
    "the model checkpoints activations with use_reentrant=True, which hides its layers from autograd; call "
    "torch.utils.checkpoint with use_reentrant=False, or gradient_checkpointing_disable() on a model of transformers"
)

# A chunk's gradients are examples × d floats; above this they are spread over several chunks.
CHUNK_BYTES = 256 * 2**20


class _WithModel(nn.Module):
    """`function(model, batch)` as a module, so that `call_with` can replace the parameters."""

    def __init__(self, model: nn.Module, function: Function) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, batch: Batch) -> Tensor:
        return self._function(self.model, batch)


class GeneralPath:
    """Per-example gradients by `torch.func.vmap(grad)`, a chunk of examples at a time.

    Where `vmap` cannot run the model (control flow on values, operators without a batching rule), each example gets a
    backward pass of its own: slower, the same gradients; `note` then says why.

    Args:
        placement: of the model, in evaluation mode by the time of the call.
        space: the attributed parameters.
    """

    def __init__(self, placement: Placement, space: ParameterSpace) -> None:
        self.note = ""
        self._placement, self._model = placement, placement.model
        self._space = space
        self._chunk = max(1, CHUNK_BYTES // (4 * max(1, space.size)))
        self._loops = False

    def begin(self) -> None:
        """Try `vmap` again: what a batch gets may not depend on the batches before it in another shard."""
        self._loops, self.note = False, ""

    def add_to(self, sink: GradientSink, function: Function, batch: Batch, size: int, autocast: Autocast) -> Tensor:
        """Hand every parameter's share of ∇function to `sink`; returns the values (B,)."""
        values: list[Tensor] = []
        for start in range(0, size, self._chunk):
            examples = list(range(start, min(size, start + self._chunk)))
            for first, value, gradients in self._gradients(function, batch, size, examples, autocast):
                values.append(value)
                for name, rows in gradients.items():
                    sink.add(name, rows, first)
        return torch.cat(values)

    def _gradients(
        self, function: Function, batch: Batch, size: int, examples: list[int], autocast: Autocast
    ) -> Iterator[_Some]:
        if not self._loops:
            try:
                result = self._by_vmap(function, batch, size, examples, autocast)
            except (SourceProjError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as problem:
                # The loop is the same mathematics, and it raises again what is wrong with the model itself.
                note = f"one backward pass per example, since vmap failed: {first_line(problem)}"
            else:
                yield examples[0], *result
                return
        alone = torch.ones(1, dtype=torch.float32, device="cpu")
        for b in examples:
            example = take(batch, [b], size)
            try:
                gradients: dict[str, Tensor] = {}
                keep = gradients.__setitem__  # of a whole model, each comes once
                value = weighted_gradient(self._placement, self._space, function, example, alone, autocast, keep)
            except ExampleError as problem:
                raise ExampleError([b], problem.what) from None
            except (ValueError, RuntimeError, IndexError) as problem:
                require_in_front(function, self._model, batch, size, problem)
                raise
            yield b, value, {name: gradient.unsqueeze(0) for name, gradient in gradients.items()}
        if not self._loops:
            self._loops, self.note = True, note

    def _by_vmap(
        self, function: Function, batch: Batch, size: int, examples: list[int], autocast: Autocast
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if has_lists(batch, size):
            raise ValueError("the batch holds lists of examples")
        tensors, rebuild = per_example_tensors(batch, size)
        tensors = [tensor[examples[0] : examples[-1] + 1] for tensor in tensors]
        module = _WithModel(self._model, function)
        parameters = {f"model.{name}": p.detach() for name, p in self._space.parameters(self._model).items()}

        def scalar(parameters: dict[str, Tensor], *example: Tensor) -> tuple[Tensor, Tensor]:
            alone = rebuild([tensor.unsqueeze(0) for tensor in example])  # a batch of one
            with autocast():
                value = call_with(module, parameters, (alone,))
            value = checked_values(value, 1)[0].float()
            return value, value

        # What is still the model's own has a graph: weights in a plain list, say, or flat ones of a recurrent module.
        with warnings.catch_warnings(), self._placement.running(self._space.names), torch.enable_grad():
            # An operator without a batching rule is looped over inside vmap: slow, right, and nothing to act upon.
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            in_dims = (None, *(0 for _ in tensors))
            gradients, values = vmap(grad(scalar, has_aux=True), in_dims=in_dims)(parameters, *tensors)
        if any(made.requires_grad for made in (values, *gradients.values())):
            raise ValueError("weights are used that torch.func can't exchange")
        return values.detach(), {name.removeprefix("model."): rows for name, rows in gradients.items()}


def weighted_gradient(
    placement: Placement,
    space: ParameterSpace,
    function: Function,
    batch: Batch,
    weights: Tensor,
    autocast: Autocast,
    receive: Callable[[str, Tensor], None],
) -> Tensor:
    """Plain backward pass: the values f (B,), and ∇ Σ_b w_b f_b of the parameters that it reaches.

    Args:
        placement: of the model.
        space: the attributed parameters.
        function: (model, batch) → (B,).
        batch: the examples.
        weights: w (B,).
        autocast: context of the forward pass.
        receive: gets the name and the gradient of each parameter as soon as it is there, several times where the
            parameter is several tensors to autograd: their sum counts. None is kept, so that the pass needs no memory
            for them all.

    Raises:
        GradientError: a reentrant checkpoint is in the way.
    """
    model = placement.model
    with placement.running(space.names) as live:
        with torch.enable_grad(), autocast():
            values = checked_values(function(model, batch), len(weights)).float()
        if values.requires_grad:
            _backward((values * weights.to(values.device)).sum(), live, receive)
    return values.detach()


def _backward(total: Tensor, live: Live, receive: Callable[[str, Tensor], None]) -> None:
    def received(name: str, gradient: Tensor) -> Tensor:
        receive(name, gradient.to_dense() if gradient.is_sparse else gradient)
        return gradient if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    tensors = [(name, tensor) for name, several in live.items() for tensor in several]
    handles = [tensor.register_hook(partial(received, name)) for name, tensor in tensors]
    try:
        # Asked for by name and not accumulated: FSDP would reduce them over processes that see other examples.
        torch.autograd.grad(total, [tensor for _, tensor in tensors], allow_unused=True)
    except RuntimeError as problem:
        if "use_reentrant=True" in str(problem):
            raise GradientError(REENTRANT) from problem
        raise
    finally:
        for handle in handles:
            handle.remove()


def checked_values(values: Tensor, size: int) -> Tensor:
    """What a function of (model, batch) returned, if it is one scalar per example.

    Raises:
        TypeError: it is not.
    """
    if isinstance(values, Tensor) and tuple(values.shape) == (size,) and not values.is_complex():
        return values
    raise TypeError(
        f"the function of (model, batch) must return one scalar per example, shape ({size},), got "
        f"{_returned(values, size)}"
    )


def _returned(values: object, size: int) -> str:
    """What was returned in place of one real number an example, and what to return."""
    if not isinstance(values, Tensor):
        return f"type {type(values).__name__}"
    if values.is_complex():  # whose imaginary part torch would drop
        return f"{values.dtype}: return its .real or .abs()"
    own = ": return each example's own number, as losses with reduction='none' are"
    remedies = {(): own, (size, 1): ": squeeze(1) it"}
    return f"shape {tuple(values.shape)}{remedies.get(tuple(values.shape), '')}"


def first_line(problem: Exception) -> str:
    """What an error says, cut to its first line."""
    return str(problem).strip().partition("\n")[0] or type(problem).__name__
