"""Where a model's parameters are: whole on one device, over several, or sharded over processes."""

from source_proj.trajectory.placement.base import Placement
from source_proj.trajectory.placement.chosen import placement_of
from source_proj.trajectory.placement.lockstep import Lockstep
from source_proj.trajectory.placement.refused import refuse_parallelism, require_shapes, require_shapes_of
from source_proj.trajectory.placement.unwrapped import unwrapped

__all__ = [
    "Lockstep",
    "Placement",
    "placement_of",
    "refuse_parallelism",
    "require_shapes",
    "require_shapes_of",
    "unwrapped",
]
