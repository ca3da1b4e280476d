"""Which training examples made a model behave as it does: SOURCE in a random-projection feature bank."""

from importlib.metadata import version as _version

from source_proj import curate, evaluate, integrations, report
from source_proj._errors import BankError, GradientError, MismatchError, SourceProjError
from source_proj.attribution.hits import Hits
from source_proj.attribution.methods import (
    GradCos,
    GradDot,
    Hydra,
    InfluenceFunction,
    RepSim,
    TracIn,
    Trak,
    empirical_influence,
)
from source_proj.attribution.queries import QueryFeatures
from source_proj.attribution.scores import PredictedChange, Scores
from source_proj.attribution.source import Segment, SegmentScores, Source
from source_proj.bank import Bank, StageBank, build, open
from source_proj.sketch import Sketch
from source_proj.task import CausalLM, Classification, Regression, Task, TokenQueries
from source_proj.trajectory import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    Checkpoint,
    NAdam,
    ParameterGroup,
    RAdam,
    Recorder,
    RMSprop,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    Stage,
    Trajectory,
)

__version__ = _version("source-proj")

__all__ = [
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "Bank",
    "BankError",
    "CausalLM",
    "Checkpoint",
    "Classification",
    "GradCos",
    "GradDot",
    "GradientError",
    "Hits",
    "Hydra",
    "InfluenceFunction",
    "MismatchError",
    "NAdam",
    "ParameterGroup",
    "PredictedChange",
    "QueryFeatures",
    "RAdam",
    "RMSprop",
    "Recorder",
    "Regression",
    "RepSim",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Scores",
    "Segment",
    "SegmentScores",
    "Sketch",
    "Source",
    "SourceProjError",
    "Stage",
    "StageBank",
    "Task",
    "TokenQueries",
    "TracIn",
    "Trajectory",
    "Trak",
    "build",
    "curate",
    "empirical_influence",
    "evaluate",
    "integrations",
    "open",
    "report",
]


def __dir__() -> list[str]:
    return __all__
