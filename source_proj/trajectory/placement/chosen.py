"""Which placement a model has."""

from __future__ import annotations

import sys

from torch import nn

from source_proj._errors import SourceProjError
from source_proj.trajectory.placement.base import Placement
from source_proj.trajectory.placement.refused import refuse_parallelism

__all__ = ["placement_of"]


def placement_of(model: nn.Module) -> Placement:
    """Where a model's parameters are, as `fully_shard` or accelerate left them.

    Raises:
        SourceProjError: they are split in a way that is refused, or have no data; names it.
    """
    refuse_parallelism(model)
    if "torch.distributed.tensor" in sys.modules:  # without it nothing can be sharded
        from source_proj.trajectory.placement.sharded import Sharded, is_sharded

        if is_sharded(model):
            _refuse_meta(model)
            return Sharded(model)
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        from source_proj.trajectory.placement.dispatched import Dispatched

        return Dispatched(model)
    _refuse_meta(model)
    return Placement(model)


def _refuse_meta(model: nn.Module) -> None:
    name = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if name is not None:
        raise SourceProjError(
            f"parameter {name!r} of the model is on the device 'meta', where it has no data: make the model with "
            "weights, or give it some by model.to_empty(device='cpu') (the checkpoints' own are loaded anyway)"
        )
