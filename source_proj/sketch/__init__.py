"""The sketch: a random projection of gradients whose matrix is a pure function of seed, coordinate and column."""

from source_proj.sketch.modes import plain_modes, without_autocast
from source_proj.sketch.sketch import Sketch, exact_sketch

__all__ = ["Sketch", "exact_sketch", "plain_modes", "without_autocast"]
