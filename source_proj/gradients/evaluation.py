"""Evaluation mode, as per-example gradients need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.overrides import _get_current_function_mode

from source_proj.gradients.checkpointing import checkpoints, wrapping

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards; layers of transformers go on checkpointing."""
    modules = list(model.modules())  # once: it takes as long as a small layer
    training = [module for module in modules if module.training]
    for (
        module
    ) in training:  # by its flag: eval() of a module's own may fold weights into others, or make tables of them
        _set_training(module, False)
    try:
        with ExitStack() as stack:
            for module in training:
                if checkpoints(module):
                    stack.enter_context(_training_outside(module))
            for module in filter(_fused, modules):
                stack.enter_context(_training_without_dropout(module))
            yield
    finally:
        for module in training:
            _set_training(module, True)


def _set_training(module: nn.Module, flag: bool) -> None:
    own = vars(module)
    if "training" in own:  # `Module.__setattr__` would look through parameters and buffers first
        own["training"] = flag
    else:  # compiled by TorchScript
        module.training = flag


def _fused(module: nn.Module) -> bool:
    """Whether this is a recurrent layer on a GPU, where cuDNN goes backward in training mode alone."""
    return isinstance(module, nn.RNNBase) and any(p.device.type == "cuda" for p in module.parameters())


@contextmanager
def _training_without_dropout(layer: Any) -> Iterator[None]:
    """What evaluation mode is, in training mode."""
    before, layer.dropout, layer.training = layer.dropout, 0.0, True
    try:
        yield
    finally:
        layer.dropout, layer.training = before, False


@contextmanager
def _training_outside(layer: Any) -> Iterator[None]:
    """Let a layer checkpoint, which it does in training mode alone, and evaluate what it checkpoints.

    What follows torch's functions follows those that are computed once more, during the backward pass, too.
    """

    def evaluated(function: Callable[..., Any]) -> Callable[..., Any]:
        following = _get_current_function_mode()

        def called(*args: Any) -> Any:
            again = following if _get_current_function_mode() is not following else None
            layer.training = False
            try:
                with again or nullcontext():
                    return function(*args)
            finally:
                layer.training = True

        return called

    layer.training = True
    try:
        with wrapping(layer, evaluated):
            yield
    finally:
        layer.training = False
