"""Layer rules for nearly all parameters, and other ways for the few that no rule covers.

A class token, a table of positions, a scale: one parameter that a module uses by itself would send a whole vision
transformer the general way, whose gradients are examples x parameters. Instead these few are followed in the layers'
own pass (`bare.py`); where that can't be, they take a forward and a backward pass of their own by `vmap(grad)`, in
which nothing else has a gradient. A use that is not followed shows in autograd's graph, whether or not examples have a
share in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod

from torch import Tensor, nn

from source_proj.gradients.bare import Unfollowed
from source_proj.gradients.bare_path import BarePath
from source_proj.gradients.batches import Batch
from source_proj.gradients.general import CHUNK_BYTES, Autocast, Function, Functions, GeneralPath
from source_proj.gradients.hooks import Pass, Structure
from source_proj.gradients.owners import uncovered
from source_proj.gradients.sink import GradientSink
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.suited import Unsuited, UsedElsewhere
from source_proj.trajectory.placement import Placement
from source_proj.trajectory.placement.base import Live

__all__ = ["MixedPath", "slow_parameters"]

_SHARE = 3  # the few are at most one number in so many


def slow_parameters(model: nn.Module, space: ParameterSpace) -> str | None:
    """In words, which parameters no rule covers, where these are many; None where they cost little."""
    missing = uncovered(model, space)
    if _are_few(missing, space):
        return None
    (name, why), *more = missing.items()
    others = f" (and {len(more)} more)" if more else ""
    return f"gradients may go by torch's vmap or one example at a time, slower than by layers: {name}: {why}{others}"


def _are_few(names: Collection[str], space: ParameterSpace) -> bool:
    """Whether these parameters are few enough of the attributed ones to take a pass of their own."""
    sizes = dict(zip(space.names, map(prod, space.shapes), strict=True))
    return _SHARE * sum(sizes[name] for name in names) <= space.size


class MixedPath(BarePath):
    """As `BarePath`, with other ways for what can't be followed.

    Args:
        placement: of the model, whole.
        space: the attributed parameters.
    """

    def __init__(self, placement: Placement, space: ParameterSpace) -> None:
        self._unfollowed: Unfollowed | None = None
        super().__init__(placement, space)

    @property
    def reason(self) -> str:
        """Which parameters have no rule, and why; and why they have a pass of their own, where they do."""
        if not self._missing:
            return super().reason
        named = "; ".join(f"{name}: {why}" for name, why in list(self._missing.items())[:10])
        apart = [f"in a pass of their own: {self._unfollowed}"] if self._unfollowed else ["followed by themselves"]
        notes = "; ".join([*apart, *([self._rest.note] if self._rest.note else [])])
        return f"{super().reason}, but for a few ({named}), {notes}"

    def begin(self) -> None:
        """Know nothing of how parameters are used: what a batch gets may not depend on those of another scope."""
        self._unfollowed = None
        if self._elsewhere:
            self._set_apart({})
        self._rest.begin()

    def _set_apart(self, elsewhere: dict[str, str]) -> None:
        super()._set_apart(elsewhere)
        self._rest = GeneralPath(self._placement, self._bare)

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
        given = (sinks, functions, batch, size, autocast, admit)
        if self._unfollowed is None:
            try:
                return super().add_to(*given)
            except UsedElsewhere as problem:  # by the forward pass, before anything was added
                if problem.name in self._missing:
                    self._unfollowed = Unfollowed(f"{problem.name!r} is used where nothing is followed")
                    return self.add_to(*given)
                self._set_apart({**self._elsewhere, problem.name: str(problem)})
                return self.add_to(*given)
            except Unfollowed as problem:  # likewise
                self._unfollowed = problem
        if not self._own_pass_pays(size):
            raise Unsuited(self.reason) from self._unfollowed
        values = super().add_to(*given)
        with self._placement.running(()):
            for number, sink in enumerate(sinks):
                self._rest.add_to(sink, _one(functions, number), batch, size, autocast)
        return values

    def _own_pass_pays(self, size: int) -> bool:
        """Whether a pass for the few costs less than the general path, which small models take in one piece."""
        return _are_few(self._missing, self._space) and 4 * size * self._space.size > CHUNK_BYTES

    @contextmanager
    def _tapping(self, current: Pass, _: Collection[str] = ()) -> Iterator[Live]:
        followed = [] if self._unfollowed else list(self._missing)
        with ExitStack() as stack:
            live = stack.enter_context(super()._tapping(current, followed))
            if followed:  # what stands for them is in the graph of what was made of them, too, and not followed
                uses = stack.enter_context(self._following(current))
                live |= {name: [*live[name], leaf] for name, leaf in uses.taps.leaves.items()}
            yield live


def _one(functions: Functions, number: int) -> Function:
    def function(model: nn.Module, batch: Batch) -> Tensor:
        return functions(model, batch)[number]

    return function
