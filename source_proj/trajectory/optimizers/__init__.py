"""Optimizers: one a file, known to every reader of runs by being defined. Adding one is a file and a line here."""

from source_proj.trajectory.optimizers.adam import Adam
from source_proj.trajectory.optimizers.base import Optimizer, Options, PreconditionedOptimizer
from source_proj.trajectory.optimizers.groups import ParameterGroup
from source_proj.trajectory.optimizers.moments import Moments, moments
from source_proj.trajectory.optimizers.rmsprop import RMSprop
from source_proj.trajectory.optimizers.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "Moments",
    "Optimizer",
    "Options",
    "ParameterGroup",
    "PreconditionedOptimizer",
    "RMSprop",
    "moments",
]
