"""Other attribution methods on the same bank, one per file, with the same verbs as Source."""

from source_proj.attribution.methods.arnoldi import ArnoldiInfluence
from source_proj.attribution.methods.data_inf import DataInf
from source_proj.attribution.methods.empirical_influence import empirical_influence
from source_proj.attribution.methods.grad_cos import GradCos
from source_proj.attribution.methods.grad_dot import GradDot
from source_proj.attribution.methods.hydra import Hydra
from source_proj.attribution.methods.influence import InfluenceFunction
from source_proj.attribution.methods.rep_sim import RepSim
from source_proj.attribution.methods.tracin import TracIn
from source_proj.attribution.methods.trak import Trak

__all__ = [
    "ArnoldiInfluence",
    "DataInf",
    "GradCos",
    "GradDot",
    "Hydra",
    "InfluenceFunction",
    "RepSim",
    "TracIn",
    "Trak",
    "empirical_influence",
]
