"""Many processes, and machines: which of them this one is, and how far they have come."""

from source_proj.distribute.launch import Worker, this_worker
from source_proj.distribute.status import Status, WorkerStatus, status

__all__ = ["Status", "Worker", "WorkerStatus", "status", "this_worker"]
