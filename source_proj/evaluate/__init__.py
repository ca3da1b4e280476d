"""Judge attribution scores against retraining: LDS, leave-one-out, calibration, mislabelled examples, removal."""

from source_proj.evaluate.calibration import Calibration, calibration
from source_proj.evaluate.comparison import Candidate, Comparison, MethodResult, compare_methods
from source_proj.evaluate.figures import plot_calibration, plot_inspection, plot_lds, plot_removal
from source_proj.evaluate.ground_truth import GroundTruth
from source_proj.evaluate.left_out import LeaveOneOut, leave_one_out
from source_proj.evaluate.linear_datamodeling import LDS, Difference, compare, lds, mean_lds
from source_proj.evaluate.mislabelled import Mislabel, mislabel
from source_proj.evaluate.noise import noise_ceiling
from source_proj.evaluate.removal import (
    RemovalDifference,
    SubsetRemoval,
    compare_removal,
    random_same_class,
    subset_removal,
)
from source_proj.evaluate.retrain import StackedState, half_subsets, retrain, stacked_outputs, train_stacked
from source_proj.evaluate.tables import table
from source_proj.evaluate.unrolling import ExactUnrolling

__all__ = [
    "LDS",
    "Calibration",
    "Candidate",
    "Comparison",
    "Difference",
    "ExactUnrolling",
    "GroundTruth",
    "LeaveOneOut",
    "MethodResult",
    "Mislabel",
    "RemovalDifference",
    "StackedState",
    "SubsetRemoval",
    "calibration",
    "compare",
    "compare_methods",
    "compare_removal",
    "half_subsets",
    "lds",
    "leave_one_out",
    "mean_lds",
    "mislabel",
    "noise_ceiling",
    "plot_calibration",
    "plot_inspection",
    "plot_lds",
    "plot_removal",
    "random_same_class",
    "retrain",
    "stacked_outputs",
    "subset_removal",
    "table",
    "train_stacked",
]
