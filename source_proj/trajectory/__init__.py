"""The trajectory of a training run: checkpoints, the optimizer's action, stages and segments."""

from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.optimizer import SGD
from source_proj.trajectory.segments import segment_times, split_segments
from source_proj.trajectory.stages import Stage, Trajectory

__all__ = ["SGD", "Checkpoint", "Stage", "Trajectory", "segment_times", "split_segments"]
