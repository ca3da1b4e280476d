"""Clean, choose and check training sets: harmful and mislabelled examples, near-duplicates, selections, retraining."""

from source_proj.curate.aggregates import Aggregate, aggregate
from source_proj.curate.cleaning import Cleaning
from source_proj.curate.duplicates import near_duplicates
from source_proj.curate.harm import drop_worst, harmful
from source_proj.curate.mislabelled import mislabelled
from source_proj.curate.selection import select
from source_proj.curate.verification import Interval, Verification, verify

__all__ = [
    "Aggregate",
    "Cleaning",
    "Interval",
    "Verification",
    "aggregate",
    "drop_worst",
    "harmful",
    "mislabelled",
    "near_duplicates",
    "select",
    "verify",
]
