"""Modes of torch's that a caller may be in, and that nothing computed here may depend on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["plain_modes", "without_autocast"]


@contextmanager
def without_autocast() -> Iterator[None]:
    """In full precision also where the caller's model runs under autocast."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def plain_modes() -> Iterator[None]:
    """In full precision, and with tensors that gradients can be taken through, whatever the caller is in.

    Products under ``torch.autocast`` have the precision of half the bits, and are kept with fits; no gradient goes
    through what was loaded or copied in ``torch.inference_mode``. Also a decorator, but of no generator.

    Example:
        >>> rows = torch.full((1, 1), 1 / 3)
        >>> with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ...     halved = rows @ rows
        ...     with plain_modes():
        ...         whole = rows @ rows
        >>> halved.dtype, halved.is_inference(), whole.dtype, whole.is_inference()
        (torch.bfloat16, True, torch.float32, False)
    """
    with torch.inference_mode(False), without_autocast(), _without_stale_weights():
        yield


@contextmanager
def _without_stale_weights() -> Iterator[None]:
    """Without autocast's copies of weights, which live until its outermost block ends, one with enabled=False too.

    Within the caller's block a pass over one checkpoint would leave them to the next one's.
    """
    outer = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(kept and not outer)  # blocks that are entered here inherit it
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
