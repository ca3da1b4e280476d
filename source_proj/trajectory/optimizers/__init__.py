"""Optimizers: one a file, known to every reader of runs by being defined. Adding one is a file and a line here."""

from source_proj.trajectory.optimizers.adafactor import Adafactor
from source_proj.trajectory.optimizers.adagrad import Adagrad
from source_proj.trajectory.optimizers.adam import Adam
from source_proj.trajectory.optimizers.adamax import Adamax
from source_proj.trajectory.optimizers.base import Optimizer, Options, PreconditionedOptimizer, Updates
from source_proj.trajectory.optimizers.groups import ParameterGroup
from source_proj.trajectory.optimizers.moments import Moments, is_untouched, moments, names_parameters, updates_counted
from source_proj.trajectory.optimizers.nadam import NAdam
from source_proj.trajectory.optimizers.radam import RAdam
from source_proj.trajectory.optimizers.rmsprop import RMSprop
from source_proj.trajectory.optimizers.schedule_free_adamw import ScheduleFreeAdamW
from source_proj.trajectory.optimizers.schedule_free_sgd import ScheduleFreeSGD
from source_proj.trajectory.optimizers.sgd import SGD

__all__ = [
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "Moments",
    "NAdam",
    "Optimizer",
    "Options",
    "ParameterGroup",
    "PreconditionedOptimizer",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Updates",
    "is_untouched",
    "moments",
    "names_parameters",
    "updates_counted",
]
