"""Other attribution methods on the same bank, one a file, with the same verbs as Source."""

from source_proj.methods.grad_cos import GradCos
from source_proj.methods.grad_dot import GradDot
from source_proj.methods.influence import InfluenceFunction
from source_proj.methods.tracin import TracIn
from source_proj.methods.trak import Trak

__all__ = ["GradCos", "GradDot", "InfluenceFunction", "TracIn", "Trak"]
