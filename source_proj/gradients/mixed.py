"""Layer rules for nearly all parameters, and other ways for the few that no rule covers.

A class token, a table of positions, a scale: one parameter that a module uses by itself would send a whole vision
transformer the general way, whose gradients are examples x parameters. Instead these few are followed in the layers'
own pass (`bare.py`); where that can't be, they take a forward and a backward pass of their own by `vmap(grad)`, in
which nothing else has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod

from torch import Tensor, nn

from source_proj.gradients.bare import BareUses, Unfollowed
from source_proj.gradients.batches import Batch
from source_proj.gradients.general import Autocast, Function, Functions, GeneralPath
from source_proj.gradients.hooks import HookPath, Pass, Structure, uncovered
from source_proj.gradients.opened import Listener
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace
from source_proj.trajectory.placement import Placement
from source_proj.trajectory.placement.base import Live

__all__ = ["MixedPath", "are_few", "slow_parameters"]

_SHARE = 3  # the few are at most one number in so many


def are_few(names: Collection[str], space: ParameterSpace) -> bool:
    """Whether these parameters are few enough of the attributed ones to take a pass of their own."""
    sizes = dict(zip(space.names, map(prod, space.shapes), strict=True))
    return _SHARE * sum(sizes[name] for name in names) <= space.size


def slow_parameters(model: nn.Module, space: ParameterSpace) -> str | None:
    """In words, which parameters no rule covers and what that costs; None where layers give all gradients."""
    missing = uncovered(model, space)
    if not missing:
        return None
    (name, why), *more = missing.items()
    cost = (
        "a forward and a backward pass more for parameters that no layer's rule covers"
        if are_few(missing, space)
        else "gradients go by torch's vmap or one example at a time, slower than by layers"
    )
    return f"{cost}: {name}: {why}{f' (and {len(more)} more)' if more else ''}"


class MixedPath(HookPath):
    """As `HookPath`, for models of which some parameters' modules have no rule.

    Args:
        placement: of the model, whole.
        space: the attributed parameters.
        missing: parameter → why no rule gives its gradient.
    """

    def __init__(self, placement: Placement, space: ParameterSpace, missing: Mapping[str, str]) -> None:
        covered = [name for name in space.names if name not in missing]
        super().__init__(placement, ParameterSpace.of_names(placement.model, covered))
        self._missing = dict(missing)
        self._bare = ParameterSpace.of_names(placement.model, list(missing))
        self._rest = GeneralPath(placement, self._bare)
        self._why_apart = ""

    @property
    def reason(self) -> str:
        """Which parameters have no rule, and why; and why they have a pass of their own, where they do."""
        named = "; ".join(f"{name}: {why}" for name, why in list(self._missing.items())[:10])
        apart = [f"in a pass of their own: {self._why_apart}"] if self._why_apart else ["followed by themselves"]
        notes = "; ".join([*apart, *([self._rest.note] if self._rest.note else [])])
        return f"{super().reason}, but for a few ({named}), {notes}"

    def begin(self) -> None:
        """Try to follow the few again, and `vmap`: what a batch gets may not depend on batches of another scope."""
        self._why_apart = ""
        self._rest.begin()

    def add_to(
        self,
        sinks: Sequence[GradientSink],
        functions: Functions,
        batch: Batch,
        size: int,
        autocast: Autocast,
        admit: Callable[[list[Structure]], None] = lambda _: None,
    ) -> list[Tensor]:
        """As `HookPath.add_to`."""
        if not self._why_apart:
            try:
                return super().add_to(sinks, functions, batch, size, autocast, admit)
            except Unfollowed as problem:  # by the forward pass, before anything was added
                self._why_apart = str(problem)
        values = super().add_to(sinks, functions, batch, size, autocast, admit)
        with self._placement.running(()):
            for number, sink in enumerate(sinks):
                self._rest.add_to(sink, _one(functions, number), batch, size, autocast)
        return values

    @contextmanager
    def _tapping(self, current: Pass) -> Iterator[Live]:
        with ExitStack() as stack:
            live = stack.enter_context(super()._tapping(current))
            if not self._why_apart:
                stack.enter_context(self._following(current))
            yield live

    def _following(self, current: Pass) -> BareUses:
        def tap(output: Tensor, listener: Listener) -> Tensor:
            return self._tapped("parameters of no layer", output, output.new_empty(0), listener, current, None)

        return BareUses(self._bare.parameters(self._model), self._model.buffers(), current.size, current.taker, tap)


def _one(functions: Functions, number: int) -> Function:
    def function(model: nn.Module, batch: Batch) -> Tensor:
        return functions(model, batch)[number]

    return function
