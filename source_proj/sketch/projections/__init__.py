"""The kinds of random matrices, one a file; importing a file registers its kind."""

from source_proj.sketch.projections.base import HeldSketches, Projection, kinds, projection_class
from source_proj.sketch.projections.fast_jl import FastJLProjection
from source_proj.sketch.projections.identity import Identity
from source_proj.sketch.projections.kronecker import Kronecker
from source_proj.sketch.projections.rademacher import Rademacher
from source_proj.sketch.projections.sparse import Sparse
from source_proj.sketch.projections.tensor import TensorProjection

__all__ = [
    "FastJLProjection",
    "HeldSketches",
    "Identity",
    "Kronecker",
    "Projection",
    "Rademacher",
    "Sparse",
    "TensorProjection",
    "kinds",
    "projection_class",
]
