"""Parameters that a module uses by itself, in no layer: class tokens, tables of positions, scales.

While a pass runs, torch hands every function that is called to `BareUses`. What is made of such parameters alone (a
view, an exponential, a slice) is remembered. Where it meets the examples by an operation that broadcasts, it is
expanded to them, with a tap: the gradient then arrives example by example, and goes on to the parameters through what
was remembered. Products with a matrix, look-ups in a table and normalisations have taps as their layers have. Nothing
else is followed: a contraction by `einsum`, or a parameter that lies along the examples, ends the attempt by its name.

Tensors are known for the examples' by their graph, or by their first dim; a constant that is taken for such is seen by
the law (`proof.py`), as any other slip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from source_proj.gradients.opened import Listener
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.suited import Unsuited, UsedElsewhere

__all__ = ["BareUses", "Unfollowed"]

# Functions of torch, by name, that treat numbers one by one and broadcast their arguments.
_BY_ENTRY = """
    add add_ sub sub_ subtract rsub mul mul_ multiply div div_ divide true_divide pow maximum minimum where lerp addcmul
    addcdiv __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__
    __rdiv__ __itruediv__ __pow__ __rpow__
"""
_BROADCASTING = frozenset(_BY_ENTRY.split())
_ATTENTION = "scaled_dot_product_attention"  # whose mask broadcasts
_MATRICES_BYTES = 64 * 2**20  # of examples' gradients of a matrix that is made of parameters, at one time
_EXPANDING = frozenset(["expand", "expand_as", "broadcast_to", "repeat"])


class Unfollowed(Unsuited):
    """A use of a bare parameter that is none of those known."""


class _Bare(NamedTuple):
    """What is made of parameters alone.

    Attributes:
        value: what stands for it.
        tensor: itself: an identity lasts as long as it does.
        followed: whether a followed parameter is in it.
        owned: name of a parameter in it whose gradient a layer gives; None for none.
    """

    value: Tensor
    tensor: Tensor
    followed: bool
    owned: str | None = None


class BareUses(TorchFunctionMode):
    """Follows bare parameters through one forward pass.

    Args:
        parameters: name → the parameter.
        constants: of the model, known not to hold examples.
        size: number of examples B.
        taker: gives the sink of the backward pass under way.
        tap: (output, listener, x) gives the output (B r, ...) with a tap, which hands (x, g) to the listener.
        live: whether the parameters get a gradient of their own, too, as in training.
        others: parameters that are not followed, each with its name where a layer gives its gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        constants: Iterator[Tensor],
        size: int,
        taker: Callable[[], GradientSink],
        tap: Callable[[Tensor, Listener, Tensor], Tensor],
        *,
        live: bool = False,
        others: Iterable[tuple[Tensor, str | None]] = (),
    ) -> None:
        super().__init__()
        self._size, self._taker, self._tap, self._live = size, taker, tap, live
        self._leaves = {name: p if live else p.detach().requires_grad_() for name, p in parameters.items()}
        self._bare = {id(p): _Bare(p, p, followed=False, owned=name) for p, name in others}  # by identity
        self._bare |= {id(p): _Bare(self._leaves[name], p, followed=True) for name, p in parameters.items()}
        self._names = {id(leaf): name for name, leaf in self._leaves.items()}
        self._constants = {constant.untyped_storage().data_ptr() for constant in constants}
        self._special: dict[str, Callable[..., Any]] = {
            "linear": self._linear,
            "matmul": self._matmul,
            "__matmul__": self._matmul,
            "addmm": self._addmm,
            "embedding": self._embedding,
            "layer_norm": partial(self._normalised, F.layer_norm),
            "rms_norm": partial(self._normalised, F.rms_norm),
        }

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, with what stands for bare parameters in their place."""
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        known = [self._bare[id(each)] for each in given if id(each) in self._bare]
        if not known:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        bare, owned = [each.value for each in known if each.followed], next((k.owned for k in known if k.owned), None)
        if bare and owned is not None:
            raise UsedElsewhere(owned)
        examples = [each for each in given if id(each) not in self._bare and self._holds_examples(each)]
        if not examples or not torch.is_grad_enabled():
            made = func(*self._swapped(args, _itself), **self._swapped(kwargs, _itself))
            if bare and name in _EXPANDING and self._is_of_examples(made, bare[0], name):
                return self._expanded(bare[0], made)
            return self._remembered(made, bool(bare), owned)
        if not bare:
            return func(*args, **kwargs)
        if name in self._special:
            return self._special[name](*args, **kwargs)
        height, dims = self._meeting(name, examples, bare)
        if self._follows(given[0]) and (name.endswith("_") or name.startswith("__i")):
            raise Unfollowed(f"a parameter of no layer is changed by {name}")

        def expand(tensor: Tensor) -> Tensor:
            padded = tensor.reshape((1,) * (dims - tensor.dim()) + tensor.shape)
            if padded.shape[0] != 1:
                raise Unfollowed(f"a parameter of no layer lies along the examples in {name}")
            return self._expanded(tensor, padded.expand(height, *padded.shape[1:]))

        return func(*self._swapped(args, expand), **self._swapped(kwargs, expand))

    def names_among(self, given: Any) -> list[str]:
        """Names of the parameters in what a function is given; none where something there is made of several."""
        bare = [self._bare[id(each)].value for each in _tensors(given) if self._follows(each)]
        return [self._names[id(each)] for each in bare] if all(id(each) in self._names for each in bare) else []

    def _follows(self, tensor: Tensor | None) -> bool:
        return id(tensor) in self._bare and self._bare[id(tensor)].followed

    def _detached(self, tensor: Tensor) -> Tensor:
        """A bare tensor as an operation of examples takes it whose output has a tap."""
        return tensor if self._live else tensor.detach()

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self._of_examples(input, "a linear function")
        if not self._follows(weight):
            made = F.linear(x, weight)
            return made if bias is None else self._again(torch.add, made, bias)
        value, bias_value = self._bare[id(weight)].value, bias
        if bias is not None and self._follows(bias):
            bias_value = self._detached(self._bare[id(bias)].value)
        made = F.linear(x, self._detached(value), bias_value)
        return self._product(x, value.T, made, bias if self._follows(bias) else None)

    def _addmm(self, bias: Tensor, x: Tensor, matrix: Tensor, **more: Any) -> Tensor:
        if more:
            raise Unfollowed(f"a parameter of no layer takes part in addmm with {sorted(more)}")
        return self._again(torch.add, self._again(torch.matmul, x, matrix), bias)

    def _matmul(self, x: Tensor, matrix: Tensor) -> Tensor:
        if x.dim() < 2:
            raise Unfollowed("a parameter of no layer takes part in a product with a vector")
        x = self._of_examples(x, "a product")
        value = self._bare[id(matrix)].value
        return self._product(x, value, x @ self._detached(value))

    def _product(self, x: Tensor, matrix: Tensor, made: Tensor, bias: Tensor | None = None) -> Tensor:
        """What was made by x M + b, for x (B r, ..., i) and M (i, o), with a tap."""
        if matrix.dim() != 2 or x.shape[0] % self._size:
            raise Unfollowed(f"a parameter of no layer takes part in a product of {tuple(matrix.shape)}")

        def listener(x: Tensor, g: Tensor) -> None:
            left, right = (tensor.reshape(self._size, -1, tensor.shape[-1]) for tensor in (x.to(g.dtype), g))
            sink = self._taker()
            if not sink.accepts_half:
                left, right = left.float(), right.float()
            turned = _transposed_of(matrix)
            if id(matrix) in self._names:
                sink.outer(self._names[id(matrix)], left, right)
            elif id(turned) in self._names:
                sink.outer(self._names[id(turned)], right, left)
            else:
                step = max(1, _MATRICES_BYTES // (4 * matrix.numel()))
                for start in range(0, self._size, step):
                    some = slice(start, start + step)
                    self._receive(matrix, left[some].float().transpose(1, 2) @ right[some].float(), start)
            if bias is not None:
                self._receive(self._bare[id(bias)].value, g.reshape(self._size, -1, g.shape[-1]).float().sum(1))

        return self._tap(made, listener, x)

    def _of_examples(self, x: Tensor, where: str) -> Tensor:
        if self._follows(x):
            raise Unfollowed(f"a parameter of no layer stands in the examples' place in {where}")
        return x

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,  # noqa: ARG002, of the batch's gradient, which is not made
    ) -> Tensor:
        """Rows of a table; `norm_type` belongs to `max_norm`."""
        name = self._names.get(id(self._bare[id(weight)].value)) if self._follows(weight) else None
        if name is None or max_norm is not None or scale_grad_by_freq:
            raise Unfollowed(f"a table that is made of parameters, or whose rows are scaled (norm {norm_type})")
        padding = None if padding_idx is None else padding_idx % len(weight)

        def listener(index: Tensor, g: Tensor) -> None:
            index = index.reshape(self._size, -1)
            g = g.reshape(*index.shape, -1)
            kept = g if padding is None else g.masked_fill((index == padding).unsqueeze(-1), 0.0)
            self._taker().scatter(name, index, kept)

        return self._tap(F.embedding(input, self._detached(weight), padding_idx), listener, input)

    def _normalised(
        self,
        normalise: Callable[..., Tensor],
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float | None = 1e-5,
    ) -> Tensor:
        made = normalise(self._of_examples(input, "a normalisation"), normalized_shape, eps=eps)
        made = made if weight is None else self._again(torch.mul, made, weight)
        return made if bias is None else self._again(torch.add, made, bias)

    def _again(self, func: Callable[..., Any], *args: Tensor) -> Tensor:
        made: Tensor = self.__torch_function__(func, (), args)
        return made

    def _holds_examples(self, tensor: Tensor) -> bool:
        if tensor.requires_grad:
            return True
        constant = tensor.untyped_storage().data_ptr() in self._constants
        return not constant and tensor.dim() > 0 and tensor.shape[0] % self._size == 0

    def _meeting(self, name: str, examples: list[Tensor], bare: list[Tensor]) -> tuple[int, int]:
        """Rows and dims of what an operation makes of examples and bare tensors."""
        if name == _ATTENTION:
            shape: tuple[int, ...] = max((each.shape for each in examples), key=len)
        elif name in _BROADCASTING:
            shape = np.broadcast_shapes(*(each.shape for each in (*examples, *bare)))  # torch's imports sympy
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

        value = self._detached(expanded)
        # Expanded to one row, it would be the parameter itself, and an operation in place would change that.
        return self._tap(value.clone() if value.is_contiguous() else value, listener, value.new_empty(0))

    def _receive(self, bare: Tensor, g: Tensor, start: int = 0) -> None:
        """Hand a bare tensor's gradients (n, ...) for some examples to the parameters that it was made of."""
        names, leaves = list(self._leaves), list(self._leaves.values())
        gradients: tuple[Tensor | None, ...] = tuple(g if leaf is bare else None for leaf in leaves)
        if bare.grad_fn is not None:
            gradients = torch.autograd.grad(
                bare, leaves, g, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                self._taker().add(name, gradient.reshape(len(g), -1).float(), start)

    def _remembered(self, made: Any, followed: bool, owned: str | None) -> Any:
        for each in _tensors(made):
            if each.requires_grad:
                self._bare[id(each)] = _Bare(each, each, followed, owned)
        return made

    def _swapped(self, given: Any, change: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(given, Tensor):
            return change(self._bare[id(given)].value) if self._follows(given) else given
        if isinstance(given, dict):
            return {key: self._swapped(value, change) for key, value in given.items()}
        if isinstance(given, tuple | list):
            return type(given)(self._swapped(value, change) for value in given)
        return given


def _transposed_of(matrix: Tensor) -> Tensor | None:
    """The leaf of which a matrix is the transposed one."""
    node = matrix.grad_fn
    if node is None or not node.name().startswith(("TBackward", "TransposeBackward", "PermuteBackward")):
        return None
    return getattr(node.next_functions[0][0], "variable", None)


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
