"""Layers' rules, and beside them the parameters that no rule covers, followed by themselves (`bare.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from source_proj.gradients.bare import BareUses, Unfollowed
from source_proj.gradients.batches import Batch
from source_proj.gradients.general import Function
from source_proj.gradients.hooks import HookPath, Pass
from source_proj.gradients.kept import tensors_held
from source_proj.gradients.opened import Listener
from source_proj.gradients.owners import uncovered
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.suited import Unsuited, require_batched
from source_proj.trajectory.placement import Placement

__all__ = ["BARE", "BarePath"]

BARE = "parameters of no layer"
"""Name of the taps where such meet the examples."""


class BarePath(HookPath):
    """As `HookPath`, whether or not all modules have rules.

    Args:
        placement: of the model, whole.
        space: the attributed parameters.
    """

    def __init__(self, placement: Placement, space: ParameterSpace) -> None:
        super().__init__(placement, space)
        self._uses: BareUses | None = None
        self._set_apart({})

    def _set_apart(self, elsewhere: dict[str, str]) -> None:
        """Take these parameters, and those without a rule, from no module."""
        self._elsewhere = elsewhere  # parameter → why its module's rule does not do
        self._missing = {**uncovered(self._model, self._space, apart=elsewhere), **elsewhere}
        self._cover(self._missing)
        bare = [name for name in self._space.names if name in self._missing]
        self._bare = ParameterSpace.of_names(self._model, bare)

    def find_shared(
        self, function: Function, single: Batch, double: Batch, also: Callable[[], bool] = lambda: True
    ) -> bool:
        """As `HookPath.find_shared`; a layer whose output neither lies along the batch nor broadcasts has no rule.

        Args:
            function: of the passes.
            single: a batch of one example.
            double: of two.
            also: whether a model gives the same for other batches, too, when such outputs are expanded to them.
        """
        try:
            same = super().find_shared(function, single, double) and also()
        except Exception:  # the model's own, of shapes that it did not make
            if not self._shared:
                raise
            same = False
        return same or (self._shared_apart() and self.find_shared(function, single, double, also))

    def _shared_apart(self) -> bool:
        """Set what layers that see no batch hold apart, to be followed into it by itself; whether there is any."""
        held = {id(p) for module in self._shared for p in module.parameters(recurse=False)}
        names = [name for name, p in self._space.parameters(self._model).items() if id(p) in held]
        if names:
            self._set_apart({**self._elsewhere, **dict.fromkeys(names, "its module sees no batch")})
        return bool(names)

    @contextmanager
    def _following(
        self,
        current: Pass,
        kind: Callable[..., BareUses] = BareUses,
        entered: Callable[[Any], AbstractContextManager[object]] = lambda uses: uses,
        **options: Any,
    ) -> Iterator[BareUses]:
        """Within, these parameters have taps where they meet the examples."""

        def tap(output: Tensor, listener: Listener, x: Tensor) -> Tensor:
            try:
                require_batched(BARE, output, 0)
            except Unsuited as problem:
                raise Unfollowed("a parameter of no layer is used within a transform of torch.func") from problem
            return self._tapped(BARE, output, x, listener, current, x.grad_fn)

        parameters, owned = self._bare.parameters(self._model), self._space.parameters(self._model)
        names = {id(p): name for name, p in owned.items() if name not in parameters}
        followed = {id(p) for p in parameters.values()}
        others = [(p, names.get(id(p))) for p in self._model.parameters() if id(p) not in followed]
        uses = kind(parameters, tensors_held(self._model), current.size, current.taker, tap, others=others, **options)
        self._uses = uses
        try:
            with entered(uses):
                yield uses
        finally:
            self._uses = None

    def _met(self, state: Tensor) -> Tensor:
        return state if self._uses is None else self._uses.met(state)
