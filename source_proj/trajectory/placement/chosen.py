"""Which placement a model has."""

from __future__ import annotations

import sys

from torch import nn

from source_proj.trajectory.placement.base import Placement
from source_proj.trajectory.placement.refused import refuse_parallelism

__all__ = ["placement_of"]


def placement_of(model: nn.Module) -> Placement:
    """Where a model's parameters are, as `fully_shard` or accelerate left them.

    Raises:
        SourceProjError: they are split in a way that is refused; names it.
    """
    refuse_parallelism(model)
    if "torch.distributed.tensor" in sys.modules:  # without it nothing can be sharded
        from source_proj.trajectory.placement.sharded import Sharded, is_sharded

        if is_sharded(model):
            return Sharded(model)
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        from source_proj.trajectory.placement.dispatched import Dispatched

        return Dispatched(model)
    return Placement(model)
