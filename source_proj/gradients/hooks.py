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
* The graph of every batch is looked at before the backward pass: a parameter that is used outside of its layer's
  forward has an edge there, and where the examples lie is followed from layer to layer (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError
from source_proj.gradients.batches import Batch
from source_proj.gradients.general import REENTRANT, Autocast, Function, Functions, checked_values
from source_proj.gradients.layout import Call, Node, label, walk, where_examples_are_lost
from source_proj.gradients.rules import Rule, rule_for
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace
from source_proj.trajectory.placement import Placement
from source_proj.trajectory.placement.base import Live

__all__ = ["HookPath", "Structure", "Unsuited", "alone", "evaluating", "uncovered"]


@dataclass(frozen=True)
class Structure:
    """How one batch went through the layers.

    Attributes:
        signature: equal for batches that call the same layers alike, by the same operations.
        lost: the first operation behind which no dim is known to hold the examples; None if all are followed.
    """

    signature: tuple[object, ...]
    lost: str | None


class Unsuited(GradientError):
    """The hook path cannot give this model's gradients; the general path can."""


class _Tap(torch.autograd.Function):
    """The identity, without a copy; its backward hands (x, g) to a listener."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, _anchor: Tensor, x: Tensor, listener: Callable[[Tensor, Tensor], None], name: str
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.listener, ctx.name = listener, name
        return output.detach()  # no view to autograd, so that in-place operations may follow

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if g is not None:
            ctx.listener(_saved(ctx), g)
        return g if ctx.needs_input_grad[0] else None, None, None, None, None


def _saved(ctx: Any) -> Tensor:
    try:
        x: Tensor = ctx.saved_tensors[0]
    except RuntimeError as problem:
        if "inplace operation" not in str(problem):
            raise
        raise GradientError(
            f"the input of {ctx.name!r} was modified in place after the layer had seen it, so its gradient is lost; "
            "replace the in-place operation"
        ) from problem
    return x


def alone(function: Function) -> Functions:
    """One function as several."""
    return lambda model, batch: (function(model, batch),)


def uncovered(model: nn.Module, space: ParameterSpace) -> dict[str, str]:
    """Attributed parameter → why no rule gives its gradient; empty when the hook path may be tried."""
    return _owners(model, space)[1]


def _owners(
    model: nn.Module, space: ParameterSpace
) -> tuple[dict[nn.Module, tuple[Rule, dict[str, str]]], dict[str, str]]:
    """Module → (rule, {local name: full name}) for all owners of attributed parameters, and what is not covered."""
    full = {id(p): name for name, p in space.parameters(model).items()}
    covered: dict[nn.Module, tuple[Rule, dict[str, str]]] = {}
    missing: dict[str, str] = {}
    for module in model.modules():
        own = {local: full[id(p)] for local, p in module.named_parameters(recurse=False) if id(p) in full}
        if not own:
            continue
        rule = rule_for(module)
        for local, name in own.items():
            if isinstance(rule, str):
                missing[name] = rule
            elif local not in rule.parameters:
                missing[name] = f"the rule of {type(module).__name__} knows no parameter {local!r}"
        if isinstance(rule, Rule):
            covered[module] = rule, own
    return covered, missing


class HookPath:
    """Per-example gradients by layer rules.

    Args:
        placement: of the model, in evaluation mode by the time of the call; every attributed parameter's module must
            have a rule.
        space: the attributed parameters.
    """

    def __init__(self, placement: Placement, space: ParameterSpace) -> None:
        self._placement = placement
        self._model = model = placement.model
        self._attributed = space.names
        self._covered, _ = _owners(model, space)
        self._names = {module: name for name, module in model.named_modules() if module in self._covered}
        self._shared: set[nn.Module] = set()
        self._calls: list[tuple[tuple[object, ...], Call]] | None = None  # None outside of a forward pass

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
        anchor = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")
        turn: list[GradientSink] = []  # its last is that of the backward pass under way
        seen = partial(self._on_output, size=size, anchor=anchor, taker=lambda: turn[-1])
        self._calls = []
        try:
            with self._placement.running(self._attributed) as live, self._hooked(seen), torch.enable_grad():
                with autocast():
                    values = [checked_values(each, size) for each in functions(self._model, batch)]
                calls, self._calls = self._calls, None  # recomputed layers of a checkpoint call the hooks once more
                admit([self._structure(each, calls, size, live) for each in values])
                parts = [(each, sink) for each, sink in zip(values, sinks, strict=True) if each.requires_grad]
                for number, (each, sink) in enumerate(parts, start=1):  # others reach no attributed parameter
                    turn.append(sink)
                    with sink.holding():
                        ones, more = torch.ones_like(each), number < len(parts)
                        torch.autograd.grad(each, [anchor], ones, allow_unused=True, retain_graph=more)
        finally:
            self._calls = None
        return [each.detach().float() for each in values]

    def find_shared(self, function: Function, single: Batch, double: Batch) -> None:
        """Learn which layers see no batch: their output is of the same shape for one example and for two.

        A layer that only sees what such a layer made need not be treated, so one is added at a time.

        Raises:
            Unsuited: some layer's output length does not follow the number of examples.
        """
        self._shared.clear()
        for _ in range(len(self._covered) + 1):
            shapes, doubled = self._shapes(function, single, 1), self._shapes(function, double, 2)
            if [module for module, _ in shapes] != [module for module, _ in doubled]:
                return  # the layers that are called depend on the values: the law decides
            odd = [(m, s, d) for (m, s), (_, d) in zip(shapes, doubled, strict=True) if d[:1] != (2 * s[0],)]
            if not odd:
                return
            module, shape, shape_of_two = odd[0]
            if shape != shape_of_two or module in self._shared:
                return  # refused below if no batch can be cut
            self._shared.add(module)

    def _shapes(self, function: Function, batch: Batch, size: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        shapes: list[tuple[nn.Module, tuple[int, ...]]] = []

        def seen(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if module in self._shared:
                output = _expanded(output, size)
            shapes.append((module, tuple(output.shape) or (1,)))
            return output

        with self._hooked(seen), torch.no_grad():
            function(self._model, batch)
        return shapes

    @contextmanager
    def _hooked(self, seen: Callable[..., Tensor | None]) -> Iterator[None]:
        # First among the module's hooks: another one may change the output.
        handles = [module.register_forward_hook(seen, prepend=True, with_kwargs=True) for module in self._covered]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_output(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
        *,
        size: int,
        anchor: Tensor,
        taker: Callable[[], GradientSink],
    ) -> Tensor | None:
        if not torch.is_grad_enabled():  # the model itself wants no gradient here
            return None
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        inputs = x.grad_fn
        if module in self._shared:
            unbatched = output.dim()
            output = _expanded(output, size)
            x = _expanded(x, size, unsqueeze=output.dim() > unbatched)
        name = self._names[module]
        if output.dim() == 0 or output.shape[0] % size:
            raise Unsuited(
                f"the output of {name!r} has shape {tuple(output.shape)} in a batch of {size} examples; "
                "examples must come first"
            )
        listener = partial(self._on_gradient, module, size, taker)
        apply = cast(Callable[..., Tensor], _Tap.apply)  # some versions of torch leave it untyped
        tapped = apply(output, anchor, x.detach(), listener, name)
        if self._calls is not None:
            rows = output.shape[0] // size
            kind = "shared" if module in self._shared else "ragged or flat" if rows != 1 else "batch"
            self._calls.append(((name, kind, output.dim()), Call(tapped.grad_fn, inputs)))
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
        taps = {call.tap: call for _, call in calls}
        attributed = {id(p): name for name, several in live.items() for p in several}

        def edges(node: Node) -> list[Node]:
            call = taps.get(node)
            if call is not None:
                return [] if call.inputs is None else [call.inputs]
            children = [child for child, _ in node.next_functions if child is not None]
            for child in children:
                if label(child) == "AccumulateGrad" and id(child.variable) in attributed:
                    used = attributed[id(child.variable)]
                    raise Unsuited(f"{used!r} is used outside of its module's forward")
            return children

        order = walk([values.grad_fn], edges)
        labels = tuple(map(label, order))
        if "CheckpointFunction" in labels:
            raise GradientError(REENTRANT)
        lost = None if size == 1 else where_examples_are_lost(order, list(taps.values()), values.grad_fn, size)
        return Structure((*shapes, size == 1, hash(labels)), lost)


def _expanded(tensor: Tensor, size: int, unsqueeze: bool | None = None) -> Tensor:
    """(1, …) or (…) → (size, …), without a copy."""
    if unsqueeze is None:
        unsqueeze = tensor.dim() == 0 or tensor.shape[0] != 1
    return (tensor.unsqueeze(0) if unsqueeze else tensor).expand(size, *tensor.shape[0 if unsqueeze else 1 :])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards; layers of transformers go on checkpointing."""
    training = [module for module in model.modules() if module.training]
    if training:  # it takes as long as a small layer
        model.eval()
    try:
        with ExitStack() as stack:
            for module in training:
                if _checkpoints_activations(module):
                    stack.enter_context(_training_outside(module))
            yield
    finally:
        for module in training:
            module.training = True


def _checkpoints_activations(module: nn.Module) -> bool:
    """Whether a layer of transformers is told to, in the way that autograd can follow."""
    known = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    function = getattr(module, "_gradient_checkpointing_func", None) if known else None
    return (
        getattr(module, "gradient_checkpointing", False)
        and getattr(function, "keywords", {}).get("use_reentrant", True) is False
    )


@contextmanager
def _training_outside(layer: Any) -> Iterator[None]:
    """Let a layer checkpoint, which it does in training mode alone, and evaluate what it checkpoints."""
    checkpoint = layer._gradient_checkpointing_func

    def evaluated(function: Callable[..., Any], *args: Any) -> Any:
        layer.training = False
        try:
            return function(*args)
        finally:
            layer.training = True

    layer._gradient_checkpointing_func = lambda function, *args: checkpoint(partial(evaluated, function), *args)
    layer.training = True
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint
        layer.training = False
