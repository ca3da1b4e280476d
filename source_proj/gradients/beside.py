"""What no layer's hook sees of a live model, in passes that somebody else makes: opened modules, bare parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode

from source_proj._errors import GradientError
from source_proj.gradients.bare import BareUses, Unfollowed
from source_proj.gradients.bare_path import BarePath
from source_proj.gradients.checkpointing import checkpoints, wrapping
from source_proj.gradients.hooks import Pass
from source_proj.gradients.space import ParameterSpace
from source_proj.gradients.suited import UsedElsewhere
from source_proj.trajectory.placement import Placement

__all__ = ["BesidePath", "cannot_capture", "used_elsewhere"]


def _always() -> bool:
    return True


def _never() -> bool:
    return False


class BesidePath(BarePath):
    """A path with taps beside the layers' hooks while somebody else's pass runs, and while its layers are recomputed.

    Args:
        placement: of the live model.
        space: the attributed parameters.
    """

    def __init__(self, placement: Placement, space: ParameterSpace) -> None:
        super().__init__(placement, space)
        self._awake = _always  # whether the pass under way is that of training
        self._recomputes = False  # whether what checkpointing computes once more has its taps then

    @contextmanager
    def _beside_layers(self, current: Pass, awake: Callable[[], bool] = _always) -> Iterator[None]:
        """Within, what no layer's hook sees has taps: modules that are opened, and parameters of no layer.

        Args:
            current: the pass.
            awake: says whether what runs is that pass.
        """
        before, self._awake = self._awake, awake
        try:
            with ExitStack() as stack:
                stack.enter_context(self._opening(current, live=True))
                if self._missing:
                    options = {"missing": self._missing, "awake": awake, "live": True}
                    stack.enter_context(self._following(current, _Uses, _entered, **options))
                stack.enter_context(self._recomputing(current))
                yield
        finally:
            self._awake = before

    @contextmanager
    def _recomputing(self, current: Pass) -> Iterator[None]:
        """Within, layers that checkpoint learn to compute once more as they do now, after this has ended."""
        uses = self._uses

        def as_now(function: Callable[..., Any]) -> Callable[..., Any]:
            again = False

            def called(*args: Any) -> Any:
                nonlocal again
                if again:
                    with self._once_more(current, uses):
                        return function(*args)
                again, before, self._recomputes = True, self._recomputes, True
                try:
                    return function(*args)
                finally:
                    self._recomputes = before

            return called

        with ExitStack() as stack:
            for layer in filter(checkpoints, self._model.modules()):
                stack.enter_context(wrapping(layer, as_now))
            yield

    @contextmanager
    def _once_more(self, current: Pass, uses: BareUses | None) -> Iterator[None]:
        """What `_beside_layers` was for a pass, during its backward pass; the taps of now are those of nobody."""
        before = self._awake, self._uses, self._recomputes
        self._awake, self._uses, self._recomputes = _always, uses, True
        try:
            with self._opening(current, live=True), ExitStack() as stack:
                if isinstance(uses, _Uses):
                    uses.awake = _always
                    stack.enter_context(_entered(uses))
                yield
        finally:
            self._awake, self._uses, self._recomputes = before

    def _refuse_recomputed(self, patterns: list[str]) -> None:
        """Refuse taps in what activation checkpointing computes once more, where nobody sets them again."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        checkpointed = hooks is not None and getattr(hooks[0], "__module__", "") == torch.utils.checkpoint.__name__
        if checkpointed and not self._recomputes:
            raise GradientError(
                "rows can't be captured of attention or recurrent modules, experts, or parameters of no layer within "
                f"activation checkpointing: leave them out by parameters={patterns}, checkpoint less, or build the "
                "bank after training"
            )

    def _opened_forward(self, module: nn.Module, *given: Any, **kwargs: Any) -> Any:
        forward, names, current, live, *args = given
        if not self._awake():
            return type(module).forward(module, *args, **kwargs)
        self._refuse_recomputed([f"!{self._names[module]}.*"])
        return super()._opened_forward(module, forward, names, current, live, *args, **kwargs)


class _Uses(BareUses):
    """Those of a pass that somebody else makes: asleep beside it, and what it refuses comes with a remedy.

    Args:
        given: to `BareUses`.
        missing: parameter → why no rule gives its gradient.
        awake: says whether what runs is that pass.
        options: likewise.
    """

    def __init__(self, *given: Any, missing: Mapping[str, str], awake: Callable[[], bool], **options: Any) -> None:
        super().__init__(*given, **options)
        self._missing, self.awake = missing, awake

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, with what stands for bare parameters in their place."""
        if not self.awake():
            return func(*args, **(kwargs or {}))
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except UsedElsewhere as problem:
            if self.awake is _always:  # before the first pass, where it may be set apart
                raise
            raise used_elsewhere(problem) from problem
        except Unfollowed as problem:
            names = self.names_among((args, kwargs)) or list(self._missing)
            raise cannot_capture(self._missing, names, str(problem)) from problem


def cannot_capture(missing: Mapping[str, str], names: Sequence[str], reason: str) -> GradientError:
    """What to say of parameters that no layer's rule covers, and that can't be followed."""
    listed = "; ".join(f"{name}: {missing[name]}" for name in names[:10])
    return GradientError(
        f"rows can't be captured of some parameters ({listed}), as {reason}: leave them out by "
        f"parameters={[f'!{name}' for name in names[:10]]}, or build the bank after training"
    )


def used_elsewhere(problem: UsedElsewhere) -> GradientError:
    """What to say of a parameter that a pass, unlike the first one, uses outside of its layer."""
    return GradientError(
        f"{problem}: leave it out by parameters={[f'!{problem.name}']}, or build the bank after training"
    )


@contextmanager
def _entered(mode: _Uses) -> Iterator[None]:
    """As `with mode`, also where a pass is interrupted and leaves it on the stack of modes.

    The end of a mode around the pass then takes this one off in its own place.
    """
    below = _get_current_function_mode()
    TorchFunctionMode.__enter__(mode)
    try:
        yield
    finally:
        mode.awake = _never
        stack = [torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())]
        last = mode if any(each is mode for each in stack) else below
        if stack and last is not None and stack[-1] is last:
            _pop_mode()
