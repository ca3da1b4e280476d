"""The bank: a zarr v3 store of sketched training gradients, and its resumable build."""

from source_proj.bank.bank import Bank
from source_proj.bank.bank import open_bank as open
from source_proj.bank.build.build import build
from source_proj.bank.build.data import batches, dataset_size
from source_proj.bank.read.metrics import Decay, Metrics
from source_proj.bank.read.stage_bank import EncodedBlock, RowBlock, StageBank
from source_proj.bank.verify import VerifyReport, verify

__all__ = [
    "Bank",
    "Decay",
    "EncodedBlock",
    "Metrics",
    "RowBlock",
    "StageBank",
    "VerifyReport",
    "batches",
    "build",
    "dataset_size",
    "open",
    "verify",
]
