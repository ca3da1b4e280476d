"""Capture: the rows of a bank from the very passes that train a model."""

from source_proj.bank.capture.capture import Capture
from source_proj.bank.capture.indexed import IndexedDataset
from source_proj.bank.capture.recorder import Recorder
from source_proj.bank.capture.write import CapturedStage, write_captured

__all__ = ["Capture", "CapturedStage", "IndexedDataset", "Recorder", "write_captured"]
