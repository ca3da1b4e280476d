"""The bank: a zarr v3 store of sketched training gradients, and its resumable build."""

from source_proj.bank.build import build
from source_proj.bank.data import batches, dataset_size, placed
from source_proj.bank.metrics import Metrics
from source_proj.bank.rows import EncodedBlock, RowBlock, StageBank
from source_proj.bank.store import Bank
from source_proj.bank.store import open_bank as open
from source_proj.bank.verify import VerifyReport, verify

__all__ = [
    "Bank",
    "EncodedBlock",
    "Metrics",
    "RowBlock",
    "StageBank",
    "VerifyReport",
    "batches",
    "build",
    "dataset_size",
    "open",
    "placed",
    "verify",
]
