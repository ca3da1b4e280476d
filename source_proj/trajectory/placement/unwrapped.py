"""The model within what training put around it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["unwrapped"]

_Model = TypeVar("_Model")

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: _Model) -> _Model:
    """The module within DataParallel, DistributedDataParallel, AveragedModel and what torch.compile returns.

    These put parts into the names of all parameters, by which a bank knows them: a bank that was built with one can be
    asked with the plain model, and the other way round. Gradients are the same. All else is given back as it is, also
    classes derived from these, whose forward may be another.

    Args:
        model: any module; what is none is left to whoever refuses it.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> unwrapped(nn.DataParallel(model)) is model
        True
    """
    while True:
        if type(model) in _PARALLEL:
            model = model.module  # type: ignore[attr-defined]
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):  # to import it takes seconds
            model = model._orig_mod
        else:
            return model
