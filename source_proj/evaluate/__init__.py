"""Judge attribution scores against retraining: LDS, calibration, mislabelled examples, subset removal."""

from source_proj.evaluate.calibration import Calibration, calibration
from source_proj.evaluate.linear_datamodeling import LDS, Difference, compare, lds, mean_lds, noise_ceiling
from source_proj.evaluate.mislabelled import Mislabel, mislabel
from source_proj.evaluate.removal import SubsetRemoval, subset_removal
from source_proj.evaluate.retrain import StackedState, half_subsets, retrain, stacked_outputs, train_stacked

__all__ = [
    "LDS",
    "Calibration",
    "Difference",
    "Mislabel",
    "StackedState",
    "SubsetRemoval",
    "calibration",
    "compare",
    "half_subsets",
    "lds",
    "mean_lds",
    "mislabel",
    "noise_ceiling",
    "retrain",
    "stacked_outputs",
    "subset_removal",
    "train_stacked",
]
