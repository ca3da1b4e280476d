"""Per-example gradients of a batch, sketched layer by layer."""

from source_proj.gradients.batches import nonfinite_examples
from source_proj.gradients.engine import METHODS, GradientEngine, gradient_engine
from source_proj.gradients.mixed import slow_parameters
from source_proj.gradients.private_copy import private_copy, require_own_weights, require_takes
from source_proj.gradients.products import batched_products
from source_proj.gradients.proof import Refuted
from source_proj.gradients.space import ParameterSpace

__all__ = [
    "METHODS",
    "GradientEngine",
    "ParameterSpace",
    "Refuted",
    "batched_products",
    "gradient_engine",
    "nonfinite_examples",
    "private_copy",
    "require_own_weights",
    "require_takes",
    "slow_parameters",
]
