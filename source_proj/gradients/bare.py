"""Parameters that a module uses by itself, in no layer: class tokens, tables of positions, scales.

While a pass runs, torch hands every function that is called to `BareUses`. What is made of such parameters alone (a
view, an exponential, a slice) is remembered. Where it meets the examples by an operation that broadcasts, it is
expanded to them, with a tap: the gradient then arrives example by example, and goes on to the parameters through what
was remembered. Nothing else is followed: a product with such a parameter, or one that lies along the examples, ends the
attempt by its name. Tensors are known for the examples' by their graph, or their first dim; a constant that is taken
for such is seen by the law (`proof.py`), as any other slip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from source_proj.gradients.opened import Listener
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.suited import Unsuited

__all__ = ["BareUses", "Unfollowed"]

# Functions of torch, by name, that treat numbers one by one and broadcast their arguments.
_BY_ENTRY = """
    add add_ sub sub_ subtract rsub mul mul_ multiply div div_ divide true_divide pow maximum minimum where lerp addcmul
    addcdiv __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__
    __rdiv__ __itruediv__ __pow__ __rpow__
"""
_BROADCASTING = frozenset(_BY_ENTRY.split())
_ATTENTION = "scaled_dot_product_attention"  # whose mask broadcasts
_EXPANDING = frozenset(["expand", "expand_as", "broadcast_to", "repeat"])


class Unfollowed(Unsuited):
    """A use of a bare parameter that is none of those known."""


class BareUses(TorchFunctionMode):
    """Follows bare parameters through one forward pass.

    Args:
        parameters: name → the parameter.
        constants: of the model, known not to hold examples.
        size: number of examples B.
        taker: gives the sink of the backward pass under way.
        tap: (output, listener) gives the output (B r, ...) with a tap, which hands its gradient to the listener.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        constants: Iterator[Tensor],
        size: int,
        taker: Callable[[], GradientSink],
        tap: Callable[[Tensor, Listener], Tensor],
    ) -> None:
        super().__init__()
        self._size, self._taker, self._tap = size, taker, tap
        self._leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        # By identity: what stands for a tensor, and the tensor itself, as an identity lasts as long as it does.
        self._bare: dict[int, tuple[Tensor, Tensor]] = {id(p): (self._leaves[n], p) for n, p in parameters.items()}
        self._constants = {constant.untyped_storage().data_ptr() for constant in constants}

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, with what stands for bare parameters in their place."""
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if not any(id(each) in self._bare for each in given):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        bare = [self._bare[id(each)][0] for each in given if id(each) in self._bare]
        examples = [each for each in given if id(each) not in self._bare and self._holds_examples(each)]
        if not examples or not torch.is_grad_enabled():
            made = func(*self._swapped(args, _itself), **self._swapped(kwargs, _itself))
            if name in _EXPANDING and self._is_of_examples(made, bare[0], name):
                return self._expanded(bare[0], made)
            return self._remembered(made)
        height, dims = self._meeting(name, examples, bare)
        if id(next(iter(given))) in self._bare and (name.endswith("_") or name.startswith("__i")):
            raise Unfollowed(f"a parameter of no layer is changed by {name}")

        def expand(tensor: Tensor) -> Tensor:
            padded = tensor.reshape((1,) * (dims - tensor.dim()) + tensor.shape)
            if padded.shape[0] != 1:
                raise Unfollowed(f"a parameter of no layer lies along the examples in {name}")
            return self._expanded(tensor, padded.expand(height, *padded.shape[1:]))

        return func(*self._swapped(args, expand), **self._swapped(kwargs, expand))

    def _holds_examples(self, tensor: Tensor) -> bool:
        if tensor.requires_grad:
            return True
        constant = tensor.untyped_storage().data_ptr() in self._constants
        return not constant and tensor.dim() > 0 and tensor.shape[0] % self._size == 0

    def _meeting(self, name: str, examples: list[Tensor], bare: list[Tensor]) -> tuple[int, int]:
        """Rows and dims of what an operation makes of examples and bare tensors."""
        if name == _ATTENTION:
            shape = max((each.shape for each in examples), key=len)
        elif name in _BROADCASTING:
            shape = torch.broadcast_shapes(*(each.shape for each in (*examples, *bare)))
        else:
            raise Unfollowed(f"a parameter of no layer takes part in {name}")
        if not shape or shape[0] % self._size:
            raise Unfollowed(f"{name} of a parameter of no layer makes {tuple(shape)} of {self._size} examples")
        return shape[0], len(shape)

    def _is_of_examples(self, made: Any, bare: Tensor, name: str) -> bool:
        """Whether a bare tensor was expanded along a first dim that is the examples'."""
        padded = (1,) * (made.dim() - bare.dim()) + tuple(bare.shape)
        repeated = name == "repeat" and padded[1:] != tuple(made.shape[1:])
        return bool(padded) and padded[0] == 1 and made.shape[0] % self._size == 0 and not repeated

    def _expanded(self, bare: Tensor, expanded: Tensor) -> Tensor:
        """A bare tensor as it lies before each example, (B r, ...), with a tap."""

        def listener(_: Tensor, g: Tensor) -> None:
            of_examples = g.reshape(self._size, -1, *g.shape[1:]).sum(1)
            padded = (1,) * (expanded.dim() - bare.dim()) + tuple(bare.shape)
            self._receive(bare, of_examples.sum_to_size(self._size, *padded[1:]).reshape(self._size, *bare.shape))

        return self._tap(expanded.detach(), listener)

    def _receive(self, bare: Tensor, g: Tensor) -> None:
        """Hand a bare tensor's gradients (B, ...) to the parameters that it was made of."""
        names, leaves = list(self._leaves), list(self._leaves.values())
        gradients: tuple[Tensor | None, ...] = tuple(g if leaf is bare else None for leaf in leaves)
        if bare.grad_fn is not None:
            gradients = torch.autograd.grad(
                bare, leaves, g, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                self._taker().add(name, gradient.reshape(self._size, -1).float())

    def _remembered(self, made: Any) -> Any:
        for each in _tensors(made):
            if each.requires_grad:
                self._bare[id(each)] = each, each
        return made

    def _swapped(self, given: Any, change: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(given, Tensor):
            return change(self._bare[id(given)][0]) if id(given) in self._bare else given
        if isinstance(given, dict):
            return {key: self._swapped(value, change) for key, value in given.items()}
        if isinstance(given, tuple | list):
            return type(given)(self._swapped(value, change) for value in given)
        return given


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        for value in given.values():
            yield from _tensors(value)
    elif isinstance(given, tuple | list):
        for value in given:
            yield from _tensors(value)
