"""What stands behind a layer, and hears the gradient of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from source_proj._errors import GradientError
from source_proj.gradients.opened import Listener

__all__ = ["Tap"]


class Tap(torch.autograd.Function):
    """The identity, without a copy; its backward hands (x, g) to a listener."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _anchor: Tensor, x: Tensor, listener: Listener, name: str) -> Tensor:
        """The output itself."""
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.listener, ctx.name = listener, name
        return output.detach()  # no view to autograd, so that in-place operations may follow

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        """Let the listener hear."""
        if g is not None:
            ctx.listener(_saved(ctx), g)
        return g if ctx.needs_input_grad[0] else None, None, None, None, None


def _saved(ctx: Any) -> Tensor:
    try:
        x: Tensor = ctx.saved_tensors[0]
    except RuntimeError as problem:
        if "inplace operation" not in str(problem):
            raise
        raise GradientError(
            f"the input of {ctx.name!r} was modified in place after the layer had seen it, so its gradient is lost; "
            "replace the in-place operation"
        ) from problem
    return x
