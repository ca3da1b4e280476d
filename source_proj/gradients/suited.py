"""Modules through which no per-example gradient can be taken."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError

__all__ = ["Unsuited", "UsedElsewhere", "refuse_unsuited", "require_batched"]

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized", "torch.ao.nn.sparse")


class Unsuited(GradientError):
    """The hook path cannot give this model's gradients; the general path can."""


class UsedElsewhere(Unsuited):
    """A parameter is used outside of its module's forward.

    Attributes:
        name: of the parameter.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} is used outside of its module's forward")
        self.name = name


def require_batched(name: str, output: Tensor, least: int) -> None:
    """Refuse a layer's output that can hold no examples in front.

    Args:
        name: of the layer.
        output: what it gave.
        least: dims that its output for a batch has at least.

    Raises:
        Unsuited: it has fewer dims, or is of a transform of torch.func, which hides how many examples there are.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(output):
        raise Unsuited(
            f"{name!r} is called within a transform of torch.func (vmap, grad, jvp), in which its examples are not to "
            "be seen: call it with the whole batch, or attribute through other parameters"
        )
    if output.dim() < least:
        raise Unsuited(
            f"{name!r} was called with {tuple(output.shape)} for its output, one example without a batch: examples "
            "must come first"
        )


def refuse_unsuited(model: nn.Module) -> None:
    """Refuse batch statistics, quantised modules and merged adapters by name.

    Raises:
        GradientError: examples would depend on each other, or no gradient would pass.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise GradientError(
                f"{type(module).__name__} {name!r} keeps no running statistics, so that examples depend on each other "
                "also in evaluation; set track_running_stats=True or use another normalisation"
            )
        if type(module).__module__.startswith(_QUANTISED):
            raise GradientError(
                f"{type(module).__name__} {name!r} is quantised, and no gradient passes through it; "
                "attribute with the model as it was before quantisation"
            )
        if getattr(module, "merged_adapters", None):  # a layer of PEFT's
            raise GradientError(
                f"{type(module).__name__} {name!r} has its adapters {module.merged_adapters} merged into its own "
                "weights, and no gradient reaches them: call model.unmerge_adapter() first, or attribute through whole "
                "weights with model.merge_and_unload()"
            )
