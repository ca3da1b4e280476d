"""The sketch: a random projection of gradients whose matrix is a pure function of seed, coordinate and column."""

from source_proj.sketch.sketch import Sketch, exact_sketch, without_autocast

__all__ = ["Sketch", "exact_sketch", "without_autocast"]
