"""Parameters that a module uses by itself, in no layer: class tokens, tables of positions, scales.

While a pass runs, torch hands every function that is called to `BareUses`. What is made of such parameters alone (a
view, an exponential, a slice) is remembered. Where it meets the examples by an operation that broadcasts, it is
expanded to them, with a tap: the gradient then arrives example by example, and goes on to the parameters through what
was remembered. Products (`bare_products.py`), look-ups in a table and normalisations have taps as their layers have.
Nothing else is followed: a sort of both together, say, ends the attempt by its name.

Tensors are known for the examples' by their graph, or by their first dim where no function made them of constants; a
constant that is taken for such is seen by the law (`proof.py`), or by comparing (`followed.py`), as any other slip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from source_proj.gradients.bare_names import (
    ARGUMENTS,
    ATTENTION,
    BROADCASTING,
    EXPANDING,
    INTEGERS,
    JOINING,
    OTHER_NAMES,
    REPEATING,
    TYPING,
    WITHOUT_GRADIENT,
)
from source_proj.gradients.bare_products import BareProducts
from source_proj.gradients.bare_taps import BareTaps, Unfollowed
from source_proj.gradients.drawing import drawing_from, random_state
from source_proj.gradients.opened import Listener
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.suited import UsedElsewhere

__all__ = ["BareUses", "Unfollowed"]


class _Bare(NamedTuple):
    """What is made of parameters alone.

    Attributes:
        value: what functions get for it.
        made: the same with a graph to what stands for the parameters, and to nothing of the model's.
        tensor: itself: an identity lasts as long as it does.
        followed: whether a followed parameter is in it.
        owned: name of a parameter in it whose gradient a layer gives; None for none.
    """

    value: Tensor
    made: Tensor
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
        self._size, self._live = size, live
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self.taps = BareTaps(leaves, size, taker, tap)
        self._bare = {id(p): _Bare(p, p, p, followed=False, owned=name) for p, name in others}  # by identity
        self._bare |= {
            id(p): _Bare(p if live else leaves[name], leaves[name], p, followed=True) for name, p in parameters.items()
        }
        self._constants = set(filter(None, map(_place, constants)))
        self._made: Any = WeakTensorKeyDictionary()  # what functions made of constants, and of parameters' numbers
        self._products = products = BareProducts(self)
        self._special: dict[str, Callable[..., Any]] = {
            "linear": products.linear,
            "matmul": products.matmul,
            "__matmul__": products.matmul,
            "mm": products.matmul,
            "addmm": products.addmm,
            "conv1d": partial(products.convolution, F.conv1d),
            "conv2d": partial(products.convolution, F.conv2d),
            "conv3d": partial(products.convolution, F.conv3d),
            "embedding": self._embedding,
            "embedding_bag": products.bags,
            "__getitem__": self._entries,
            "index_select": self._selected,
            "layer_norm": partial(self._normalised, F.layer_norm),
            "rms_norm": partial(self._normalised, F.rms_norm),
            "expand_as": self._expand_as,
        }

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, with what stands for bare parameters in their place."""
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        known = [self._bare[id(each)] for each in given if id(each) in self._bare]
        if known:
            return self._call(func, args, kwargs, given, known)
        made = func(*args, **kwargs)
        numbers = given[:1] if _name(func) in TYPING else given
        if not any(each.requires_grad for each in numbers) and all(map(self._is_constant, numbers)):
            self._keep(made)
        return made

    def _call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor],
        known: list[_Bare],
    ) -> Any:  # fmt: skip
        name = _name(func)
        bare, owned = [each for each in known if each.followed], next((k.owned for k in known if k.owned), None)
        if bare and owned is not None:
            raise UsedElsewhere(owned)
        examples = [each for each in given if id(each) not in self._bare and self.holds_examples(each)]
        if not torch.is_grad_enabled() or name in WITHOUT_GRADIENT:
            made = func(*self._swapped(args, _value), **self._swapped(kwargs, _value))
            if not examples:
                self._keep(made)
            return made
        if name in TYPING and not self.follows(given[0]):
            return func(*self._swapped(args, _value), **self._swapped(kwargs, _value))
        if not examples or name in TYPING:
            return self._of_parameters(func, name, args, kwargs, bare, owned)
        if not bare:
            return func(*args, **kwargs)
        if name == "einsum":
            return self._products.einsum(*args, **kwargs)
        if name in self._special:
            return self._specially(func, name, args, kwargs)
        if self.follows(given[0]) and (name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))):
            raise Unfollowed(f"a parameter of no layer is changed by {name}")
        meet = self._meeting(name, examples, bare)
        return func(*self._swapped(args, meet), **self._swapped(kwargs, meet))

    def _of_parameters(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], bare: list[_Bare],
        owned: str | None,
    ) -> Any:  # fmt: skip
        """What is made of parameters alone."""
        if bare and name == "__setitem__":
            raise Unfollowed(f"a parameter of no layer takes part in {name}")
        drawn = random_state(bare[0].value) if bare and self._live else None
        made = func(*self._swapped(args, _value), **self._swapped(kwargs, _value))
        if bare and name in EXPANDING:
            if self._is_of_examples(made, bare[0].value, name):
                return self.taps.expanded(bare[0].made, self.plain(made))
            if self._is_of_second(made, bare[0].value):  # (T, B, …), as recurrent layers and attention may have it
                in_front = (each.transpose(0, 1) for each in (bare[0].made, self.plain(made)))
                return self.taps.expanded(*in_front).transpose(0, 1)
            if name in REPEATING and self._is_repeated(made, bare[0].value):
                blocks = self.plain(made).unflatten(0, (-1, len(bare[0].value)))
                return self.taps.expanded(bare[0].made, blocks).flatten(0, 1)
        alone = made
        if self._live and bare and any(each.requires_grad for each in _tensors(made)):
            draws = drawn is not None and not torch.equal(drawn, random_state(bare[0].value))
            with drawing_from(drawn if draws else None, bare[0].value), saved_tensors_hooks(_same, _same):
                alone = func(*self._swapped(args, _made), **self._swapped(kwargs, _made))
        for each, other in zip(_tensors(made), _tensors(alone), strict=True):
            if each.requires_grad:
                self._bare[id(each)] = _Bare(each, other, each, bool(bare), owned)
        self._keep(made)
        return made

    def _keep(self, made: Any) -> None:
        """Remember what no examples made, and what has no gradient, as constants are remembered."""
        for each in _tensors(made):
            if not each.requires_grad:
                self._made[each] = True

    def names_among(self, given: Any) -> list[str]:
        """Names of the parameters in what a function is given; none where something there is made of several."""
        names = [self.taps.name_of(self._bare[id(each)].made) for each in _tensors(given) if self.follows(each)]
        return [name for name in names if name is not None] if None not in names else []

    def met(self, tensor: Tensor) -> Tensor:
        """What an operation of ours is to take that treats examples apart: with a tap, where parameters made it.

        Raises:
            Unfollowed: it has no rows for each example.
        """
        if not self.follows(tensor):
            return tensor
        if tensor.dim() == 0 or tensor.shape[0] % self._size:
            raise Unfollowed(f"a parameter of no layer of {tuple(tensor.shape)} stands where examples are")
        return self._along(self._bare[id(tensor)])

    def follows(self, tensor: Tensor | None) -> bool:
        """Whether parameters that are followed made it."""
        return id(tensor) in self._bare and self._bare[id(tensor)].followed

    def made(self, tensor: Tensor) -> Tensor:
        """What parameters made, with a graph to what stands for them."""
        return self._bare[id(tensor)].made

    def plain(self, tensor: Tensor) -> Tensor:
        """The same as an operation of examples takes it whose output has a tap."""
        return tensor if self._live else tensor.detach()

    def _specially(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        arguments = ARGUMENTS[name]
        others = {**OTHER_NAMES, "mat2": "other"} if name == "mm" else OTHER_NAMES
        named = dict(zip(arguments, args, strict=False)) | {others.get(k, k): value for k, value in kwargs.items()}
        unknown = [key for key in named if key not in arguments]
        if unknown or len(args) > len(arguments) or (name == "embedding" and func is not F.embedding):
            raise Unfollowed(f"a parameter of no layer takes part in {name}{f' with {unknown}' if unknown else ''}")
        return self._special[name](**named)

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
        if not self.follows(weight) or max_norm is not None or scale_grad_by_freq:
            raise Unfollowed(f"a table whose rows are scaled as they are looked up (norm {norm_type})")
        padding = None if padding_idx is None else padding_idx % len(weight)
        return self.taps.table(input, self.made(weight), F.embedding(input, self.plain(weight), padding_idx), padding)

    def _selected(self, input: Tensor, dim: int, index: Tensor) -> Tensor:
        if not self.follows(input) or dim % input.dim():
            raise Unfollowed("a parameter of no layer takes part in index_select")
        return self._entries(input, index)

    def _entries(self, input: Tensor, index: Any) -> Tensor:
        """Rows of a table, by one number or by several for each."""
        several = index if isinstance(index, tuple) else (index,)
        whole = [isinstance(each, Tensor) and each.dtype in INTEGERS for each in several]
        if not self.follows(input) or not all(whole):
            raise Unfollowed("a parameter of no layer is looked up otherwise than by whole numbers for its first dims")
        sizes = input.shape[: len(several)]
        places, table = torch.zeros((), dtype=torch.int64, device=input.device), input
        for each, size in zip(several, sizes, strict=True):
            places = places * size + each.long() % size
        if len(several) > 1:
            table = self.again(torch.flatten, input, 0, len(several) - 1)
        return self.taps.table(places, self.made(table), self.plain(table)[places])

    def _normalised(
        self,
        normalise: Callable[..., Tensor],
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float | None = 1e-5,
        cudnn_enable: bool = True,  # noqa: ARG002, of torch.layer_norm
    ) -> Tensor:
        made = normalise(self._products.of_examples(input, "a normalisation"), normalized_shape, eps=eps)
        made = made if weight is None else self.again(torch.mul, made, weight)
        return made if bias is None else self.again(torch.add, made, bias)

    def _expand_as(self, input: Tensor, other: Tensor) -> Tensor:
        return self.again(torch.Tensor.expand, input, *other.shape)

    def again(self, func: Callable[..., Any], *args: Any) -> Tensor:
        """Call a function as the model would."""
        made: Tensor = self.__torch_function__(func, (), args)
        return made

    def _is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor without graph is known to hold no examples."""
        if tensor.dim() == 0 or tensor in self._made:
            return True
        return _place(tensor) in self._constants

    def holds_examples(self, tensor: Tensor) -> bool:
        """Whether it has rows for each example."""
        if tensor.requires_grad:
            return True
        return not self._is_constant(tensor) and tensor.shape[0] % self._size == 0

    def _meeting(self, name: str, examples: list[Tensor], bare: list[_Bare]) -> Callable[[_Bare], Tensor]:
        """What an operation that has examples takes for each of the tensors that parameters made.

        Raises:
            Unfollowed: the operation is none that broadcasts, or makes no rows of examples.
        """
        if name in JOINING and all(each.value.shape[:1] == examples[0].shape[:1] for each in bare):
            return self._along
        if name == ATTENTION:
            shape: tuple[int, ...] = max((each.shape for each in examples), key=len)
        elif name in BROADCASTING:  # by numpy, as torch's imports sympy
            shape = np.broadcast_shapes(*(each.shape for each in examples), *(each.value.shape for each in bare))
        else:
            raise Unfollowed(f"a parameter of no layer takes part in {name}")
        if not shape or shape[0] % self._size:
            raise Unfollowed(f"{name} of a parameter of no layer makes {tuple(shape)} of {self._size} examples")

        def meet(each: _Bare) -> Tensor:
            before = (1,) * (len(shape) - each.value.dim())
            if (*before, *each.value.shape)[0] == 1:
                padded = each.value.reshape(*before, *each.value.shape)
                return self.taps.expanded(each.made, self.plain(padded.expand(shape[0], *padded.shape[1:])))
            if not before and each.value.shape[0] == shape[0]:
                return self._along(each)
            raise Unfollowed(f"a parameter of no layer lies along the examples in {name}")

        return meet

    def _along(self, bare: _Bare) -> Tensor:
        return self.taps.along(bare.made, self.plain(bare.value))

    def _is_of_examples(self, made: Any, bare: Tensor, name: str) -> bool:
        """Whether a bare tensor was expanded along a first dim that is the examples'."""
        padded = (1,) * (made.dim() - bare.dim()) + tuple(bare.shape)
        repeated = name in REPEATING and padded[1:] != tuple(made.shape[1:])
        return bool(padded) and padded[0] == 1 and made.shape[0] % self._size == 0 and not repeated

    def _is_of_second(self, made: Any, bare: Tensor) -> bool:
        """Whether a bare tensor (T, 1, …) was expanded along its second dim, which is the examples'."""
        expanded = (*bare.shape[:1], self._size, *bare.shape[2:])
        return self._size > 1 and bare.shape[1:2] == (1,) and tuple(made.shape) == expanded

    def _is_repeated(self, made: Tensor, bare: Tensor) -> bool:
        """Whether all of a bare tensor was repeated for each example, along its first dim."""
        blocks = bare.dim() and len(bare) and made.dim() == bare.dim() and made.shape[1:] == bare.shape[1:]
        return bool(blocks) and len(made) % (self._size * len(bare)) == 0

    def _swapped(self, given: Any, change: Callable[[_Bare], Tensor]) -> Any:
        if isinstance(given, Tensor):
            return change(self._bare[id(given)]) if self.follows(given) else given
        if isinstance(given, dict):
            return {key: self._swapped(value, change) for key, value in given.items()}
        if isinstance(given, tuple | list):
            swapped = [self._swapped(value, change) for value in given]
            return swapped if isinstance(given, list) else tuple(swapped)  # also of a named one, which takes them apart
        return given


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func))


def _place(tensor: Tensor) -> int | None:
    """Where a tensor's numbers lie; None of a sparse one, or of one of a transform of torch.func."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


def _same(saved: Tensor) -> Tensor:
    """As it is: what is made beside the model is none of what checkpointing counts, and makes once more."""
    return saved


def _value(bare: _Bare) -> Tensor:
    return bare.value


def _made(bare: _Bare) -> Tensor:
    return bare.made


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        for value in given.values():
            yield from _tensors(value)
    elif isinstance(given, tuple | list):
        for value in given:
            yield from _tensors(value)
