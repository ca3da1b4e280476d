"""Many processes, and machines: which of them this one is, and how far they have come."""

from source_proj.distribute.launch import Worker, this_worker
from source_proj.distribute.plan import Plan, plan
from source_proj.distribute.status import Status, WorkerStatus, status

__all__ = ["Plan", "Status", "Worker", "WorkerStatus", "plan", "status", "this_worker"]
