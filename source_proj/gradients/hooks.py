"""The hook path: per-example gradients of a whole batch from one forward pass and a backward pass a function.

Torch computes no batch weight gradient during the pass, as only the taps are asked for. A tap behind each covered
layer keeps the layer's input x; when the gradient g of its output arrives, the layer's rule turns (x, g) into the
per-example gradient of its parameters, which goes straight into the sketch, and x is let go.

* The tap starts a graph where the layer's output carries none yet. It is a node of its own rather than a hook on the
  output: a Linear's output of three dimensions is a view, and an in-place operation on a view throws the view's own
  node away, hooks included.
* Layers that see no batch (a position embedding of arange(T)) would lose the examples, as autograd sums over a
  broadcast: their output is expanded to the batch first. Which layers these are is found by comparing one example
  with two.
* Layers that see (B·r, …), examples outermost, are cut back into (B, r, …).
* Attention and recurrent layers of torch's hold several products: they are opened (`opened/`).
* The graph of every batch is looked at before the backward pass: a parameter that is used outside of its layer's
  forward has an edge there, and where the examples lie is followed from layer to layer (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError
from source_proj.gradients.batches import Batch, map_tensors
from source_proj.gradients.general import REENTRANT, Autocast, Function, Functions, checked_values
from source_proj.gradients.layout import Call, Node, label, walk, where_examples_are_lost
from source_proj.gradients.opened import Forward, Listener, Opening
from source_proj.gradients.owners import Owners
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.suited import Unsuited, UsedElsewhere, require_batched
from source_proj.gradients.tap import Tap
from source_proj.trajectory.placement import Placement
from source_proj.trajectory.placement.base import Live

__all__ = ["HookPath", "Pass", "Structure", "alone", "expanded", "tensors_of"]

_SAME = 1e-3  # relative: outputs of a pass and of its repetition


@dataclass(frozen=True)
class Structure:
    """How one batch went through the layers.

    Attributes:
        signature: equal for batches that call the same layers alike, by the same operations.
        lost: the first operation behind which no dim is known to hold the examples; None if all are followed.
    """

    signature: tuple[object, ...]
    lost: str | None


class Pass(NamedTuple):
    """A forward pass under way.

    Attributes:
        size: number of examples B.
        anchor: what the backward pass asks for, behind all taps.
        taker: gives the sink of the backward pass under way.
    """

    size: int
    anchor: Tensor
    taker: Callable[[], GradientSink]


def alone(function: Function) -> Functions:
    """One function as several."""
    return lambda model, batch: (function(model, batch),)


class HookPath:
    """Per-example gradients by layer rules.

    Args:
        placement: of the model, in evaluation mode by the time of the call; every attributed parameter's module must
            have a rule.
        space: the attributed parameters.
        opens: whether modules are opened, too.
    """

    def __init__(self, placement: Placement, space: ParameterSpace, *, opens: bool = True) -> None:
        self._placement = placement
        self._model = placement.model
        self._calls: list[tuple[tuple[object, ...], Call]] | None = None  # None outside of a forward pass
        self._shared: set[nn.Module] = set()
        self._second: set[nn.Module] = set()  # layers that see (T, B, …)
        self._space = space
        self._cover(opens=opens)

    def _cover(self, apart: Collection[str] = (), *, opens: bool = True) -> None:
        """Take the gradients of all parameters but those apart from the modules that own them."""
        self._attributed = tuple(name for name in self._space.names if name not in apart)
        owners = Owners.of(self._model, self._space, opens=opens, apart=apart)
        self._covered, self._opened = owners.covered, owners.opened
        owning = self._covered.keys() | self._opened.keys()
        self._names = {module: name for name, module in self._model.named_modules() if module in owning}

    @property
    def reason(self) -> str:
        """Why this path."""
        return "a rule covers every attributed parameter's module"

    def begin(self) -> None:
        """Begin a scope: nothing that was learnt from batches before counts."""

    def add_to(
        self,
        sinks: Sequence[GradientSink],
        functions: Functions,
        batch: Batch,
        size: int,
        autocast: Autocast,
        admit: Callable[[list[Structure]], None] = lambda _: None,
    ) -> list[Tensor]:
        """Hand every layer's share of each function's gradient to its sink; returns the functions' values (B,).

        Args:
            sinks: take the gradients, one a function.
            functions: (model, batch) → (B,) for each function, by one forward pass or several.
            batch: the examples.
            size: their number B.
            autocast: context of the forward pass.
            admit: sees the batch's structure for each function before the backward passes, and may raise.

        Raises:
            Unsuited: a layer's output does not have the examples in front, or a parameter is used outside of its layer.
            GradientError: a layer's input was modified in place after the layer had seen it, or a reentrant checkpoint
                hides layers.
        """
        turn: list[GradientSink] = []  # its last is that of the backward pass under way
        anchor = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")
        current = Pass(size, anchor, partial(_last, turn))
        self._calls = []
        try:
            with self._tapping(current) as live, torch.enable_grad():
                with autocast():
                    values = [checked_values(each, size) for each in functions(self._model, batch)]
                calls, self._calls = self._calls, None  # recomputed layers of a checkpoint call the hooks once more
                admit([self._structure(each, calls, size, live) for each in values])
                parts = [(each, sink) for each, sink in zip(values, sinks, strict=True) if each.requires_grad]
                for number, (each, sink) in enumerate(parts, start=1):  # others reach no attributed parameter
                    turn.append(sink)
                    with sink.holding():
                        more = number < len(parts)  # a sum, as torch imports sympy to check gradients that it is given
                        torch.autograd.grad(each.sum(), [current.anchor], allow_unused=True, retain_graph=more)
        finally:
            self._calls = None
        return [each.detach().float() for each in values]

    def find_shared(self, function: Function, single: Batch, double: Batch) -> bool:
        """Learn which layers see no batch, and which see (T, B, …), by their outputs for one example and for two.

        A layer that only sees what another layer made need not be treated, so one is added at a time.

        Returns:
            Whether the model gives the same when the outputs of layers that see no batch are expanded to it. A bias, or
            positions, that are added to a batch are the same for all; a sum over such a layer's whole output, or its
            transpose, is not.

        Raises:
            Unsuited: some layer's output length does not follow the number of examples.
        """
        self._shared.clear()
        self._second.clear()
        plain: list[Tensor] = []
        drawn = torch.get_rng_state()
        for turn in range(len(self._covered) + 2):
            if self._shared:
                torch.set_rng_state(drawn)
            (shapes, one), (doubled, two) = self._shapes(function, single, 1), self._shapes(function, double, 2)
            plain = plain if self._shared else [*one, *two]
            if [module for module, _ in shapes] != [module for module, _ in doubled]:
                if turn:
                    return True  # the layers that are called depend on the values: the law decides
                continue  # a function may call the model otherwise the first time, to look at it
            odd = [(m, s, d) for (m, s), (_, d) in zip(shapes, doubled, strict=True) if not self._follows(m, s, d)]
            if not odd:
                return not self._shared or _are_same(plain, [*one, *two])
            module, shape, shape_of_two = odd[0]
            if module in self._shared or module in self._second:
                return True  # refused below if no batch can be cut
            if shape == shape_of_two:
                self._shared.add(module)
            elif self._covered[module][0].positional and shape_of_two[1:2] == tuple(2 * n for n in shape[1:2]) != ():
                self._second.add(module)
            else:
                return True
        return True

    def _follows(self, module: nn.Module, shape: tuple[int, ...], shape_of_two: tuple[int, ...]) -> bool:
        place = int(module in self._second)
        return shape_of_two[place : place + 1] == (2 * shape[place],)

    def _shapes(
        self, function: Function, batch: Batch, size: int
    ) -> tuple[list[tuple[nn.Module, tuple[int, ...]]], list[Tensor]]:
        """Shapes of the layers' outputs, and what the function gives."""
        shapes: list[tuple[nn.Module, tuple[int, ...]]] = []

        def seen(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if module in self._shared:
                output = expanded(output, size)
            shapes.append((module, tuple(output.shape) or (1,)))
            return output

        # As in training: without gradients, models may take other ways, and write into their parameters.
        with self._placement.running(self._space.names), self._hooked(seen), torch.enable_grad():
            given = [tensor.detach() for tensor in tensors_of(function(self._model, batch))]
        return shapes, given

    def _is_as_it_was(self, function: Function, batch: Batch, size: int) -> bool:
        """Whether another batch gives the same, too, when outputs of layers that see none are expanded to it."""
        shared, drawn = self._shared, torch.get_rng_state()
        self._shared = set()
        _, plain = self._shapes(function, batch, size)
        self._shared = shared
        torch.set_rng_state(drawn)
        return _are_same(plain, self._shapes(function, batch, size)[1])

    @contextmanager
    def _hooked(self, seen: Callable[..., Tensor | None]) -> Iterator[None]:
        # First among the module's hooks: another one may change the output.
        handles = [module.register_forward_hook(seen, prepend=True, with_kwargs=True) for module in self._covered]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _tapping(self, current: Pass, followed: Collection[str] = ()) -> Iterator[Live]:
        """Within, layers have taps; in the graph are other uses of their parameters and of followed ones."""
        seen, names = partial(self._on_output, current=current), [*self._attributed, *followed]
        with self._placement.running(names) as live, self._hooked(seen), self._opening(current):
            yield live

    @contextmanager
    def _opening(self, current: Pass, *, live: bool = False) -> Iterator[None]:
        """Within, opened modules run step by step; live where their parameters get a gradient, too."""
        try:
            for module, (forward, names) in self._opened.items():
                module.forward = partial(self._opened_forward, module, forward, names, current, live)
            yield
        finally:
            for module in self._opened:
                vars(module).pop("forward", None)

    def _opened_forward(
        self,
        module: nn.Module,
        forward: Forward,
        names: dict[str, str],
        current: Pass,
        live: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not torch.is_grad_enabled():
            return type(module).forward(module, *args, **kwargs)

        def tap(output: Tensor, x: Tensor, listener: Listener) -> Tensor:
            return self._tapped(self._names[module], output, x, listener, current, x.grad_fn)

        def note(output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
            return self._note(self._names[module], output, tuple(x.grad_fn for x in inputs), current.size)

        return forward(module, Opening(names, *current, tap, note, self._met, live), *args, **kwargs)

    def _met(self, state: Tensor) -> Tensor:
        """A state that an opened module is given, as it takes it."""
        return state

    def _on_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, *, current: Pass
    ) -> Tensor | None:
        if not torch.is_grad_enabled():  # the model itself wants no gradient here
            return None
        size, x = current.size, cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        inputs, name = x.grad_fn, self._names[module]
        require_batched(name, output, 2 if self._covered[module][0].positional and module not in self._shared else 0)
        if module in self._shared:
            unbatched = output.dim()
            output = expanded(output, size)
            x = expanded(x, size, unsqueeze=output.dim() > unbatched)
        listener = partial(self._on_gradient, module, size, current.taker)
        kind = "shared" if module in self._shared else "second" if module in self._second else ""
        return self._tapped(name, output, x, listener, current, inputs, kind)

    def _tapped(
        self,
        name: str,
        output: Tensor,
        x: Tensor,
        listener: Listener,
        current: Pass,
        inputs: Node | None,
        kind: str = "",
    ) -> Tensor:
        """The output with a tap behind it, which hands (x, g) to the listener."""
        apply = cast(Callable[..., Tensor], Tap.apply)  # some versions of torch leave it untyped
        tapped = apply(output, current.anchor, x.detach(), listener, name)
        return self._note(name, tapped, (inputs,), current.size, kind)

    def _note(self, name: str, tapped: Tensor, inputs: tuple[Node | None, ...], size: int, kind: str = "") -> Tensor:
        place = int(kind == "second")
        if tapped.dim() <= place or tapped.shape[place] % size or (place and tapped.shape[place] != size):
            raise Unsuited(
                f"the output of {name!r} has shape {tuple(tapped.shape)} in a batch of {size} examples; "
                "examples must come first"
            )
        if self._calls is not None:
            kind = kind or ("ragged or flat" if tapped.shape[0] != size else "batch")
            self._calls.append(((name, kind, tapped.dim()), Call(tapped.grad_fn, inputs, place)))
        return tapped

    def _on_gradient(
        self, module: nn.Module, size: int, taker: Callable[[], GradientSink], x: Tensor, g: Tensor
    ) -> None:
        if g.numel() == 0:
            return
        sink = taker()
        rule, names = self._covered[module]
        if x.device != g.device:  # accelerate moves inputs after the hooks have seen them
            x = x.to(g.device)
        if module in self._second:
            x, g = x.transpose(0, 1), g.transpose(0, 1)
        if not sink.accepts_half:
            x, g = (x.float() if x.is_floating_point() else x), g.float()
        rule.add(module, names, x, g, sink, size)

    def _structure(
        self, values: Tensor, calls: list[tuple[tuple[object, ...], Call]], size: int, live: Live
    ) -> Structure:
        """What autograd's graph says about a batch."""
        shapes = tuple(shape for shape, _ in calls)
        if values.grad_fn is None:
            return Structure((*shapes, size == 1), None)
        taps = [call for _, call in calls]
        order = self._graph(values.grad_fn, taps, live)
        lost = None if size == 1 else where_examples_are_lost(order, taps, values.grad_fn, size)
        return Structure((*shapes, size == 1, hash(tuple(map(label, order)))), lost)

    @staticmethod
    def _graph(root: Node, calls: Sequence[Call], live: Live) -> list[Node]:
        """Autograd's graph outside of the layers, in which no parameter may be, nor a reentrant checkpoint."""
        taps = {call.tap: call for call in calls}
        attributed = {id(p): name for name, several in live.items() for p in several}

        def edges(node: Node) -> list[Node]:
            call = taps.get(node)
            if call is not None:
                return [node for node in call.inputs if node is not None]
            children = [child for child, _ in node.next_functions if child is not None]
            for child in children:
                if label(child) == "AccumulateGrad" and id(child.variable) in attributed:
                    raise UsedElsewhere(attributed[id(child.variable)])
            return children

        order = walk([root], edges)
        if any(label(node) == "CheckpointFunction" for node in order):
            raise GradientError(REENTRANT)
        return order


def _last(turn: Sequence[GradientSink]) -> GradientSink:
    if not turn:
        raise Unsuited("the function differentiates layers by itself, as forces and gradient penalties do")
    return turn[-1]


def _are_same(plain: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return [tensor.shape for tensor in plain] == [tensor.shape for tensor in other] and all(
        torch.allclose(there.float(), here.float(), rtol=_SAME, atol=_SAME * float(there.float().norm()))
        for there, here in zip(plain, other, strict=True)
    )


def tensors_of(output: Any) -> list[Tensor]:
    """Tensors of numbers in whatever a model returns."""
    tensors: list[Tensor] = []
    tree = output if isinstance(output, Tensor | Mapping | tuple | list) else getattr(output, "__dict__", {})
    map_tensors(tree, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return [tensor for tensor in tensors if not tensor.is_complex()]


def expanded(tensor: Tensor, size: int, unsqueeze: bool | None = None) -> Tensor:
    """(1, …) or (…) → (size, …), without a copy: what sees no batch, before each example."""
    if unsqueeze is None:
        unsqueeze = tensor.dim() == 0 or tensor.shape[0] != 1
    return (tensor.unsqueeze(0) if unsqueeze else tensor).expand(size, *tensor.shape[0 if unsqueeze else 1 :])
