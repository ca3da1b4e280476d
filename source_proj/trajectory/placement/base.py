"""The placement of an ordinary model, and what any other one must say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from source_proj.trajectory.placement.leftovers import Leftovers
from source_proj.trajectory.placement.lockstep import Lockstep

__all__ = ["Live", "Placement", "State", "entries_to_load", "requiring_only"]

State = Callable[[], Mapping[str, Tensor]]  # reads a model's state where it is needed
Live = dict[str, list[Tensor]]  # by name, the tensors that autograd has of a parameter: several if made anew


class Placement:
    """How one comes by the parameters of a model: this one has all of them in this process, whole, at any time.

    Args:
        model: the model.

    Attributes:
        is_copied: whether `copy.deepcopy` makes another model of it; else passes are the model's own.
        is_whole: whether its parameters stay, so that `torch.func.functional_call` can put others in their place.
        kind: what it is called.
        lockstep: the processes that run the model together.
    """

    is_copied = True
    is_whole = True
    kind = "whole"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lockstep = Lockstep()
        self._left: Leftovers | None = None

    @property
    def device(self) -> torch.device:
        """Where batches go, and where rows are summed."""
        return next(self.model.parameters()).device

    def devices(self, names: Collection[str]) -> list[torch.device]:
        """The devices on which the layers of the named parameters run."""
        return list(dict.fromkeys(p.device for name, p in self.model.named_parameters() if name in names))

    def spacing(self, names: Collection[str]) -> float:
        """The relative spacing of the coarsest number format in which the named parameters take part in a pass."""
        return max(torch.finfo(p.dtype).eps for name, p in self.model.named_parameters() if name in names)

    def load(self, state: State) -> None:
        """Put a state into the model.

        Args:
            state: gives all of the model's entries, by name; called by the first of its processes alone.
        """
        self.model.load_state_dict(entries_to_load(state(), self.model), strict=False)  # `state` has been checked

    def remember(self) -> None:
        """From now on each pass finds what modules hold as it is now: nothing that others left, of other weights.

        For a model that is nobody else's; one that is split or moved keeps what its passes leave.
        """
        self._left = Leftovers(self.model) if type(self) is Placement else None

    def forget(self) -> None:
        """Put back what passes left since `remember`."""
        if self._left is not None:
            self._left.put_back()

    @contextmanager
    def other_weights(self) -> Iterator[None]:
        """Within, the model gets other weights: what passes left is gone before, and what is loaded stays."""
        self.forget()
        yield
        self.remember()

    @contextmanager
    def running(self, names: Collection[str]) -> Iterator[Live]:
        """Within, passes may be made, and only the named parameters require a gradient, as the graph shows then.

        Gives the parameters as autograd has them, once the forward pass is over.
        """
        self.forget()
        with requiring_only(self.model, names) as present:
            yield {name: [present[name]] for name in names}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The model's own weights and flags come back at the end, where `load` is called on the model itself."""
        yield


@contextmanager
def requiring_only(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Only the named parameters require a gradient; gives all parameters, each by all of its names."""
    present = dict(model.named_parameters(remove_duplicate=False))  # once: it takes as long as a small layer
    wanted = {id(present[name]) for name in names}
    before = {name: p.requires_grad for name, p in present.items() if p.requires_grad != (id(p) in wanted)}
    for name, flag in before.items():
        present[name].requires_grad_(not flag)
    try:
        yield present
    finally:
        if before:
            for name, p in model.named_parameters(remove_duplicate=False):  # others, where accelerate makes them anew
                if name in before:
                    p.requires_grad_(before[name])


def entries_to_load(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Those entries of a state that are not the model's own tensors, as those beside an adapter's are.

    Such need not be put where they are, and some could not be, as quantised or offloaded ones.
    """
    own = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if value is not own.get(name)}
