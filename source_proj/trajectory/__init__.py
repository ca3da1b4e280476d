"""The trajectory of a training run: checkpoints, the optimizer's action, stages and segments."""

from source_proj.trajectory.checkpoint import Checkpoint
from source_proj.trajectory.moved import weights_stamp
from source_proj.trajectory.optimizers import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    Moments,
    NAdam,
    Optimizer,
    ParameterGroup,
    PreconditionedOptimizer,
    RAdam,
    RMSprop,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    moments,
)
from source_proj.trajectory.options import Schedule
from source_proj.trajectory.preconditioning import ResolvedRun
from source_proj.trajectory.record import (
    CapturedCurvature,
    CaptureRecord,
    CheckpointRef,
    PreconditionerMode,
    RunRecord,
    SegmentRecord,
    StageRecord,
)
from source_proj.trajectory.recording.companion import Stateful
from source_proj.trajectory.recording.recorder import Recorder
from source_proj.trajectory.scale import Scale
from source_proj.trajectory.schedules import scheduler_rates
from source_proj.trajectory.segments import Segments, split_segments
from source_proj.trajectory.stages import Stage
from source_proj.trajectory.trained import trained_parameters
from source_proj.trajectory.trajectory import Trajectory

__all__ = [
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "CaptureRecord",
    "CapturedCurvature",
    "Checkpoint",
    "CheckpointRef",
    "Moments",
    "NAdam",
    "Optimizer",
    "ParameterGroup",
    "PreconditionedOptimizer",
    "PreconditionerMode",
    "RAdam",
    "RMSprop",
    "Recorder",
    "ResolvedRun",
    "RunRecord",
    "Scale",
    "Schedule",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "SegmentRecord",
    "Segments",
    "Stage",
    "StageRecord",
    "Stateful",
    "Trajectory",
    "moments",
    "scheduler_rates",
    "split_segments",
    "trained_parameters",
    "weights_stamp",
]
