"""The sketch: a random projection of gradients whose matrix is a pure function of seed, coordinate and column."""

from source_proj.sketch.sketch import Sketch, without_autocast

__all__ = ["Sketch", "without_autocast"]
