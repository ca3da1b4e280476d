"""Calls of a module with other weights than its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.stateless import _reparametrize_module

__all__ = ["call_with", "exchanged"]


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], keywords: dict[str, Any] | None = None
) -> Any:
    """What a module returns with other parameters and buffers, wherever it uses the named ones.

    ``functional_call`` puts tensors in place by name. A module that is registered twice, as one block in the place of
    several layers is, has two names for each of its parameters; both are exchanged, and the second one's former value,
    which is the first one's new one, is what the module is left with (torch 2.13). So each place is named once here.

    Args:
        module: left as it was.
        tensors: by any name of a parameter or buffer, one of each.
        args: of the call.
        keywords: of the call.

    Example:
        >>> import torch
        >>> block = nn.Linear(1, 1, bias=False)
        >>> twice = nn.Sequential(nn.Sequential(block), nn.Sequential(block))
        >>> call_with(twice, {"0.0.weight": torch.tensor([[3.0]])}, (torch.ones(1, 1),))
        tensor([[9.]])
        >>> block.weight.requires_grad
        True
    """
    return functional_call(module, _placed(module, tensors), args, keywords, tie_weights=False)


@contextmanager
def exchanged(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, a module has other parameters and buffers, in the backward pass as well.

    What a module checkpoints (``torch.utils.checkpoint``) it computes once more on the way back, with the weights that
    it then has: after a `call_with` these would be its own. Calls within may exchange the same ones again.

    Args:
        module: afterwards as it was.
        tensors: by any name of a parameter or buffer, one of each.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> weight = torch.tensor([[3.0]], requires_grad=True)
        >>> with exchanged(layer, {"weight": weight}):
        ...     y = checkpoint(lambda x: layer(x).exp(), torch.ones(1, 1), use_reentrant=False)
        ...     (slope,) = torch.autograd.grad(y.sum(), weight)
        >>> bool(slope == y)
        True
    """
    with _reparametrize_module(module, _placed(module, tensors), tie_weights=False):
        yield


def _placed(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by one name of each place that they go to."""
    own = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    others = {id(tensor): tensors[name] for name, tensor in own if name in tensors}
    return {
        f"{prefix}.{name}" if prefix else name: others[id(tensor)]
        for prefix, part in module.named_modules()
        for name, tensor in chain(
            part.named_parameters(recurse=False, remove_duplicate=False),
            part.named_buffers(recurse=False, remove_duplicate=False),
        )
        if id(tensor) in others
    }
