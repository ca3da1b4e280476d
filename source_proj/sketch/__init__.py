"""The sketch: a random projection of gradients whose matrix is a pure function of seed, coordinate and column."""

from source_proj.sketch.sketch import Sketch

__all__ = ["Sketch"]
