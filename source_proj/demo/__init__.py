"""Demo: attribution on handwritten digits from start to end, checked by retraining (needs the ``demo`` extra)."""

from source_proj.demo.check import Removal, retrain_without, verdict
from source_proj.demo.digits import Digits, load_digits, make_network, train
from source_proj.demo.run import Demo, run

__all__ = [
    "Demo",
    "Digits",
    "Removal",
    "load_digits",
    "make_network",
    "retrain_without",
    "run",
    "train",
    "verdict",
]
