"""The trajectory of a training run: checkpoints, the optimizer's action, stages and segments."""

from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizers import (
    SGD,
    Adam,
    Moments,
    Optimizer,
    ParameterGroup,
    PreconditionedOptimizer,
    RMSprop,
    moments,
    optimizer_from_spec,
)
from source_proj.trajectory.recording.recorder import Recorder, Stateful
from source_proj.trajectory.segments import Segments, segment_decays, segment_times, split_segments
from source_proj.trajectory.stages import MetricKind, Schedule, Stage
from source_proj.trajectory.trajectory import Trajectory

__all__ = [
    "SGD",
    "Adam",
    "Checkpoint",
    "MetricKind",
    "Moments",
    "Optimizer",
    "ParameterGroup",
    "PreconditionedOptimizer",
    "RMSprop",
    "Recorder",
    "Schedule",
    "Segments",
    "Stage",
    "Stateful",
    "Trajectory",
    "moments",
    "optimizer_from_spec",
    "segment_decays",
    "segment_times",
    "split_segments",
]
