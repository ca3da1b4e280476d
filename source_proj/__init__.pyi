"""The public names and where they live; the package loads each when it is first asked for."""

from source_proj import curate, distribute, evaluate, integrations, report
from source_proj._errors import BankError, GradientError, MismatchError, SourceProjError
from source_proj.attribution.condense import condense
from source_proj.attribution.features import QueryFeatures
from source_proj.attribution.hits import Hit, Hits
from source_proj.attribution.hits_file import HitsFile
from source_proj.attribution.methods import (
    ArnoldiInfluence,
    DataInf,
    GradCos,
    GradDot,
    Hydra,
    InfluenceFunction,
    RepSim,
    TracIn,
    Trak,
    empirical_influence,
)
from source_proj.attribution.parts import PartScores
from source_proj.attribution.predicted_change import PredictedChange
from source_proj.attribution.scores import Scores
from source_proj.attribution.self_influence import SelfInfluence
from source_proj.attribution.source import Segment, Source
from source_proj.bank import Bank, StageBank, build, open
from source_proj.bank.capture import IndexedDataset, Recorder
from source_proj.bank.examples import Example, Examples
from source_proj.distribute import plan
from source_proj.sketch import Sketch
from source_proj.task import Answer, Answers, CausalLM, Classification, Regression, Task, TokenQueries
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
    RMSprop,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    Stage,
    Trajectory,
    scheduler_rates,
)

__version__: str

__all__ = [
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "Answer",
    "Answers",
    "ArnoldiInfluence",
    "Bank",
    "BankError",
    "CausalLM",
    "Checkpoint",
    "Classification",
    "DataInf",
    "Example",
    "Examples",
    "GradCos",
    "GradDot",
    "GradientError",
    "Hit",
    "Hits",
    "HitsFile",
    "Hydra",
    "IndexedDataset",
    "InfluenceFunction",
    "MismatchError",
    "NAdam",
    "ParameterGroup",
    "PartScores",
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
    "SelfInfluence",
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
    "condense",
    "curate",
    "distribute",
    "empirical_influence",
    "evaluate",
    "integrations",
    "open",
    "plan",
    "report",
    "scheduler_rates",
]
