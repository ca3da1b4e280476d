"""Drawing the same random numbers once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["drawing_from", "random_state"]


def random_state(beside: Tensor) -> Tensor:
    """State of the generator that is drawn from on a tensor's device."""
    return torch.cuda.get_rng_state(beside.device) if beside.is_cuda else torch.get_rng_state()


@contextmanager
def drawing_from(state: Tensor | None, beside: Tensor) -> Iterator[None]:
    """Within, draw on a tensor's device what was drawn from a state on; None changes nothing."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([beside.device] if beside.is_cuda else []):
        if beside.is_cuda:
            torch.cuda.set_rng_state(state, beside.device)
        else:
            torch.set_rng_state(state)
        yield
