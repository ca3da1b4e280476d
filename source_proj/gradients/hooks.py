"""The hook path: per-example gradients of a whole batch from one forward and one backward pass.

No parameter requires a gradient during the pass, so torch computes no batch weight gradient. A tap behind each covered
layer keeps the layer's input x; when the gradient g of its output arrives, the layer's rule turns (x, g) into the
per-example gradient of its parameters, which goes straight into the sketch, and x is let go.

* The tap starts a graph where the layer's output carries none yet, so that nothing before the first attributed layer is
  differentiated. It is a node of its own rather than a hook on the output: a Linear's output of three dimensions is a
  view, and an in-place operation on a view throws the view's own node away, hooks included.
* Layers that see no batch (a position embedding of arange(T)) would lose the examples, as autograd sums over a
  broadcast: their output is expanded to the batch first. Which layers these are is found by comparing one example
  with two.
* Layers that see (B·r, …), examples outermost, are cut back into (B, r, …).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError
from source_proj.gradients.batches import Batch, batch_size
from source_proj.gradients.general import Autocast, Function, checked_values
from source_proj.gradients.rules import Rule, rule_for
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace

__all__ = ["HookPath", "Unsuited", "uncovered"]


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
        model: in evaluation mode by the time of the call; every attributed parameter's module must have a rule.
        space: the attributed parameters.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace) -> None:
        self._model = model
        self._covered, _ = _owners(model, space)
        self._names = {module: name for name, module in model.named_modules() if module in self._covered}
        self._shared: set[nn.Module] = set()

    def add_to(self, pieces: GradientSink, function: Function, batch: Batch, autocast: Autocast) -> Tensor:
        """Hand every layer's piece of ∇function to `pieces`; returns the values (B,).

        Raises:
            Unsuited: a layer's output does not have the examples in front.
            GradientError: a layer's input was modified in place after the layer had seen it.
        """
        size = batch_size(batch)
        anchor = torch.zeros((), requires_grad=True)
        seen = partial(self._on_output, size=size, anchor=anchor, pieces=pieces)
        with _frozen(self._model), self._hooked(seen), torch.enable_grad():
            with autocast():
                values = checked_values(function(self._model, batch), size)
            if values.requires_grad:  # else it reaches no attributed parameter
                torch.autograd.backward(values.sum())
        return values.detach().float()

    def find_shared(self, function: Function, one: Batch, two: Batch) -> None:
        """Learn which layers see no batch: their output has the same length for one example and for two.

        A layer that only sees what such a layer made need not be treated, so one is added at a time.

        Raises:
            Unsuited: some layer's output length does not follow the number of examples.
        """
        for _ in range(len(self._covered) + 1):
            single, double = self._lengths(function, one, 1), self._lengths(function, two, 2)
            if [module for module, _ in single] != [module for module, _ in double]:
                raise Unsuited("other layers are called for one example than for two")
            odd = [(module, n, m) for (module, n), (_, m) in zip(single, double, strict=True) if m != 2 * n]
            if not odd:
                return
            module, n, m = odd[0]
            if n != m or module in self._shared:
                raise Unsuited(
                    f"the output of {self._names[module]!r} has length {n} for one example and {m} for two; "
                    "examples must come first"
                )
            self._shared.add(module)

    def _lengths(self, function: Function, batch: Batch, size: int) -> list[tuple[nn.Module, int]]:
        lengths: list[tuple[nn.Module, int]] = []

        def seen(module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if module in self._shared:
                output = _expanded(output, size)
            lengths.append((module, output.shape[0]))
            return output

        with self._hooked(seen), torch.no_grad():
            function(self._model, batch)
        return lengths

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
        pieces: GradientSink,
    ) -> Tensor | None:
        if not torch.is_grad_enabled():  # the model itself wants no gradient here
            return None
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if module in self._shared:
            unbatched = output.dim()
            output = _expanded(output, size)
            x = _expanded(x, size, unsqueeze=output.dim() > unbatched)
        name = self._names[module]
        if output.shape[0] % size:
            raise Unsuited(
                f"the output of {name!r} has shape {tuple(output.shape)} in a batch of {size} examples; "
                "examples must come first"
            )
        listener = partial(self._on_gradient, module, size, pieces)
        apply = cast(Callable[..., Tensor], _Tap.apply)  # some versions of torch leave it untyped
        return apply(output, anchor, x.detach(), listener, name)

    def _on_gradient(self, module: nn.Module, size: int, pieces: GradientSink, x: Tensor, g: Tensor) -> None:
        rule, names = self._covered[module]
        if not pieces.accepts_half:
            x, g = (x.float() if x.is_floating_point() else x), g.float()
        rule.add(module, names, x, g, pieces, size)


def _expanded(tensor: Tensor, size: int, unsqueeze: bool | None = None) -> Tensor:
    """(1, …) or (…) → (size, …), without a copy."""
    if unsqueeze is None:
        unsqueeze = tensor.dim() == 0 or tensor.shape[0] != 1
    return (tensor.unsqueeze(0) if unsqueeze else tensor).expand(size, *tensor.shape[0 if unsqueeze else 1 :])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient: torch then computes no batch weight gradients."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
