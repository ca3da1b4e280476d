"""Modules through which no per-example gradient can be taken."""

from __future__ import annotations

from torch import nn

from source_proj._errors import GradientError

__all__ = ["Unsuited", "UsedElsewhere", "refuse_unsuited"]

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


def refuse_unsuited(model: nn.Module) -> None:
    """Refuse batch statistics and quantised modules by name.

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
