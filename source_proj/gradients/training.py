"""Per-example gradients of the passes that train a model, sketched while its own backward pass runs.

`HookPath` makes the passes itself. Here somebody else's training loop makes them: hooks stay on the live model, and
every forward pass in training mode puts a tap behind each covered layer. The loop's own backward pass brings the output
gradients to the taps, and the layers' rules turn them into rows. Row b of a pass is then what example b added to the
gradient that the optimizer will use, in whatever unit the loss was: a mean over the batch, divided for accumulation,
scaled for half precision. So the rows of a step sum to R p.grad, which `TrainingPath` leaves its caller to assert.

That law sees layers that are missed, used elsewhere or counted twice. It doesn't see examples that depend on each other
within the batch, whose shares of the sum are no gradients of theirs: normalisation over the batch is refused by name,
and where autograd's graph of a pass can't be followed example by example to all of its layers (`layout.py`), their
outputs must be the same for two random halves of the batch (`followed.py`).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from source_proj._errors import GradientError
from source_proj.gradients.batches import batch_size, is_compared, own_copy
from source_proj.gradients.beside import used_elsewhere
from source_proj.gradients.followed import FollowedPath
from source_proj.gradients.hooks import Pass
from source_proj.gradients.opened import Listener
from source_proj.gradients.probing import is_probed
from source_proj.gradients.proof import WatchedSink, gradient_sink, share_sink
from source_proj.gradients.sink import GradientSink, SinkByParameter
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.suited import UsedElsewhere, refuse_unsuited
from source_proj.sketch import Sketch, without_autocast
from source_proj.trajectory.placement import placement_of

__all__ = ["INDEX", "LABELS", "Sampler", "TrainingPass", "TrainingPath"]

INDEX = "index"
"""Name of the batch entry that says which examples a pass is of; the model doesn't get to see it."""

LABELS = "labels"
"""Name of the batch entry that tasks read targets from; a model that takes no such argument doesn't get to see it."""

Sampler = Callable[[Any, Mapping[str, Any] | None, int], tuple[Sequence[Tensor], Sequence[Tensor]] | None]
"""From a pass's output, its keyword arguments where labels are among them, and its size: tensors of the output, and the
gradients of another function by them; None for none."""


@dataclass(eq=False)
class TrainingPass:
    """One forward pass in training mode, and what its backward pass has brought so far.

    Attributes:
        size: number of examples B.
        rows: (B, dim) float32, what each example added to R p.grad.
        sink: adds to the rows.
        shares: the same for each parameter apart, if that was asked for.
        index: which examples, where the batch said so.
        batch: the model's keyword arguments where "labels" are among them, else None.
        reached: whether a backward pass came.
        turn: the sink of the backward pass under way.
        sampled: (B, dim) float32, rows of the sampler's function; None where there was none.
        beside: passes that waited for their backward pass when this one began.
        graph: autograd's number of the last backward pass, at whose end the sink adds what it holds back.
        spacing: of the coarsest number format of its output gradients.
    """

    size: int
    rows: Tensor
    sink: GradientSink
    shares: SinkByParameter | None
    index: Tensor | Sequence[int] | None
    batch: Mapping[str, Any] | None
    turn: GradientSink
    sampled: Tensor | None = None
    beside: tuple[TrainingPass, ...] = ()
    reached: bool = False
    graph: int | None = None
    spacing: float = torch.finfo(torch.float32).eps


class TrainingPath(FollowedPath):
    """Rows of the passes that train a model; ends, and leaves the model as it was, by `close`.

    Passes in evaluation mode, without gradients, or during a backward pass (activation checkpointing) are none of
    training.

    Args:
        model: the module that is trained; not compiled.
        space: the attributed parameters.
        sketch: the projection.

    Attributes:
        passes: those since `clear`.
        watched: whether the coming passes keep each parameter's share apart.
        sampler: gives another function of the outputs, whose rows the coming passes bring too; None for none.

    Raises:
        GradientError: the model is compiled, quantised or spread, or captured already and has more than plain layers.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, sketch: Sketch) -> None:
        refuse_unsuited(model)
        _refuse_compiled(model)
        placement = placement_of(model)
        if not placement.is_whole:
            raise GradientError(
                f"the model is {placement.kind}, and rows are captured of whole models alone: leave capture= out and "
                "build the bank after training"
            )
        super().__init__(placement, space)
        if self._opened or self._missing:
            _refuse_captured(model)
        self._sketch = sketch
        self.passes: list[TrainingPass] = []
        self.watched = False
        self.sampler: Sampler | None = None
        self._open: TrainingPass | None = None
        self._several = 0  # passes of several examples
        self._nested = 0  # calls of the model within that pass, as another path's probes are
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # to the pass that is open, before it began
        self._within = ExitStack()  # taps beside the layers' hooks, of the pass that is open
        self._kept_back = _kept_back(model)
        self._mixing = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        weakly = partial(_WeakHook, self)
        handles = [
            model.register_forward_pre_hook(weakly("_begin"), with_kwargs=True),
            model.register_forward_hook(weakly("_finish"), with_kwargs=True, always_call=True),
            *(m.register_forward_hook(weakly("_on_layer"), prepend=True, with_kwargs=True) for m in self._covered),
        ]
        self.close = weakref.finalize(self, _remove, handles, self._within)

    @property
    def interrupted(self) -> bool:
        """Whether a forward pass began and never ended, as by Ctrl-C: what came then was taken for a part of it."""
        return self._open is not None

    def clear(self) -> None:
        """Forget the passes so far."""
        self._within.close()
        self.passes = []
        self._open, self._nested, self._calls, self._given = None, 0, None, None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        back = {name: kwargs[name] for name in self._kept_back if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in back}
        if self._open is not None or is_probed():
            self._nested += 1
        elif model.training and torch.is_grad_enabled() and not _in_backward():
            labels = {LABELS: back[LABELS]} if LABELS in back else {}
            self._begin_pass(args, kwargs, back.get(INDEX), {**kwargs, **labels})
        return (args, kwargs) if back else None

    def _begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: Any, told: dict[str, Any]) -> None:
        self._refuse_mixing()
        batch = (args, kwargs) if args and kwargs else args or kwargs
        size = batch_size(batch) if index is None else len(index)
        if not self._shared_known:
            self._find_shared(args, kwargs, size)
        device = self._placement.device
        rows = torch.zeros(size, self._sketch.dim, device=device, dtype=torch.float32)
        sink, shares = gradient_sink([rows], self._sketch, self._space, [None]), None
        if self.watched:
            shares = share_sink(size, self._space, device)
            sink = WatchedSink(sink, shares, set(self._space.names))
        self._open = TrainingPass(size, rows, sink, shares, index, told if told.get(LABELS) is not None else None, sink)
        self._open.beside = tuple(each for each in self.passes if not each.reached)
        self.passes.append(self._open)
        if (size > 1) not in self._looked_ahead:
            self._look_ahead(args, kwargs, size)
        if size > 1:
            self._several += 1
            if self._looks:
                self._compare(args, kwargs, size, training=True)
            else:
                if is_compared(self._several - 1) and not self._is_drawn:
                    self._compare(args, kwargs, size, training=False)
                self._calls, self._given = [], own_copy((args, kwargs), keep_flags=True)  # which the pass may change
        if self._opened or self._missing:
            current = self._open
            through = Pass(size, self._anchor, partial(self._heard, current))
            self._within.enter_context(self._beside_layers(through, lambda: self._open is current and not self._nested))

    def _finish(self, _model: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        if self._nested:
            self._nested -= 1
            return
        self._within.close()
        current, self._open = self._open, None
        calls, given, self._calls, self._given = self._calls, self._given, None, None
        if current is None:
            return
        if output is None:  # the forward pass raised
            self.passes.remove(current)
            return
        if calls is not None and given is not None:
            try:
                lost = self._is_lost(calls, output, current.size)
            except UsedElsewhere as problem:
                raise used_elsewhere(problem) from problem
            if lost:
                self._looks = True  # a pass unlike the first one; the next are looked at before they are made
                self._compare(*given, current.size, training=True)
        if self.sampler is not None and (asked := self.sampler(output, current.batch, current.size)) is not None:
            self._add_sampled(current, *asked)

    def _add_sampled(self, current: TrainingPass, heads: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Go back through the pass's graph once more, before the loop does; nothing is added to any p.grad."""
        current.sampled = torch.zeros_like(current.rows)
        current.turn = gradient_sink([current.sampled], self._sketch, self._space, [None])
        try:
            with current.turn.holding():
                torch.autograd.grad(heads, [self._anchor], gradients, retain_graph=True, allow_unused=True)
        finally:
            current.turn = current.sink

    def _on_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        if self._nested or module not in self._covered:  # a parameter of it may be followed by itself by now
            return None
        current = self._open
        if current is None and _in_backward() and self.passes:  # layers that checkpointing computes once more
            current = self.passes[-1]
        if current is None:
            return None
        return self._on_output(
            module, args, kwargs, output, current=Pass(current.size, self._anchor, lambda: current.turn)
        )  # fmt: skip

    def _on_gradient(
        self, module: nn.Module, size: int, taker: Callable[[], GradientSink], x: Tensor, g: Tensor
    ) -> None:
        sink = taker()
        for each in self.passes:
            if each.turn is not sink:
                continue
            self._heard(each)
            super()._on_gradient(module, size, taker, x, g)

    def _heard(self, current: TrainingPass) -> GradientSink:
        """The sink of the backward pass under way, which has reached a tap."""
        if current.turn is current.sink:
            current.reached = True
            _hold_until_its_end(current)
        return current.turn

    def _tapped(self, name: str, output: Tensor, x: Tensor, listener: Listener, *given: Any, **options: Any) -> Tensor:
        def heard(x: Tensor, g: Tensor) -> None:
            with torch.no_grad(), without_autocast():
                listener(x, g)

        return super()._tapped(name, output, x, heard, *given, **options)

    def _note(self, name: str, tapped: Tensor, *given: Any, **options: Any) -> Tensor:
        if self._open is not None:
            self._open.spacing = max(self._open.spacing, torch.finfo(tapped.dtype).eps)
        return super()._note(name, tapped, *given, **options)

    def _opened_forward(self, module: nn.Module, *given: Any, **kwargs: Any) -> Any:
        device = self._placement.device.type
        if self._open is not None and torch.is_autocast_enabled(device):
            self._open.spacing = max(self._open.spacing, torch.finfo(torch.get_autocast_dtype(device)).eps)
        return super()._opened_forward(module, *given, **kwargs)

    def _refuse_mixing(self) -> None:
        mixing = [name for name, module in self._mixing if module.training]
        if mixing:
            raise GradientError(
                f"batch normalisation in training mode mixes the examples of a batch, so that no gradient is one "
                f"example's own: {mixing[:5]}. Put these modules into evaluation mode (module.eval()) while training, "
                "use GroupNorm or LayerNorm, or build the bank after training"
            )


def _refuse_compiled(model: nn.Module) -> None:
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    if compiled or hasattr(model, "_orig_mod") or isinstance(model, torch.jit.ScriptModule):
        raise GradientError(
            "a compiled model runs past the hooks that capture rows, or is cut at every layer by them: train the "
            "module itself, without torch.compile, or leave capture= out and build the bank after training"
        )


def _refuse_captured(model: nn.Module) -> None:
    """Refuse two at a time, of which one would take the other's taps for uses outside of a module."""
    hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _WeakHook)]
    if any(hook.is_alive for hook in hooks):
        raise GradientError(
            "another Recorder captures rows of this model, and those of attention or recurrent modules, experts, or "
            "parameters of no layer can be captured by one at a time: call its close() first"
        )


def _kept_back(model: nn.Module) -> list[str]:
    """What a batch may have beside the model's arguments, and the model does not take."""
    known = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return [name for name in (INDEX, LABELS) if name not in known and not (name == LABELS and anything)]


def _remove(handles: Sequence[RemovableHandle], within: ExitStack) -> None:
    within.close()  # of a pass that was interrupted
    for handle in handles:
        handle.remove()


def _hold_until_its_end(current: TrainingPass) -> None:
    """Let the sink hold pieces back until the backward pass under way has ended, and no tensor of it is used anew."""
    graph = _graph_task()
    if graph == current.graph:
        return
    current.graph = graph
    current.sink.release()  # what a pass around this one, or one that failed, has brought
    current.sink.hold()
    torch.autograd.Variable._execution_engine.queue_callback(current.sink.release)


def _in_backward() -> bool:
    return _graph_task() != -1


def _graph_task() -> int:
    return torch._C._current_graph_task_id()


class _WeakHook:
    """Calls a path's method while somebody holds the path; a copy of it, as of a copied model, calls nothing."""

    def __init__(self, path: TrainingPath, name: str) -> None:
        self._path, self._name = weakref.ref(path), name

    @property
    def is_alive(self) -> bool:
        """Whether somebody holds the path."""
        return self._path() is not None

    def __call__(self, *given: Any) -> Any:
        """Hand on what torch gives."""
        alive = self._path()
        return None if alive is None else getattr(alive, self._name)(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nothing, ()


class _Nothing:
    """What is left of a hook in a copied model."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""
