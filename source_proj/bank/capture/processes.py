"""Distributed training: each process captures its own examples, and sums are added up on the first."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from source_proj._errors import GradientError

__all__ = [
    "count",
    "from_first",
    "is_first",
    "largest",
    "mean",
    "means",
    "rank",
    "refuse_join",
    "sum_to_first",
    "wait",
]

_CHUNK = 1 << 24  # numbers that are sent at once


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that records."""
    return rank() == 0


def wait() -> None:
    """Go on once all processes have come here."""
    if count() > 1:
        dist.barrier()


def sum_to_first(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all processes on the first, and by zeros on the others."""
    if count() == 1:
        return
    for part in tensor.view(-1).split(_CHUNK):
        sent = part.to(_device(part))
        dist.reduce(sent, dst=0)
        part.copy_(sent if is_first() else torch.zeros_like(part))


def mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if count() == 1:
        return tensor
    sent = tensor.to(_device(tensor))
    dist.all_reduce(sent)
    return sent.to(tensor.device) / count()


def means(*numbers: float) -> list[float]:
    """The mean of each of some numbers over all processes."""
    return mean(torch.tensor(numbers, dtype=torch.float64, device="cpu")).tolist()


def refuse_join(module: nn.Module, *_: Any) -> None:
    """A hook before a module's forward passes.

    Raises:
        GradientError: it trains within ``join()``, where a process that has ended takes no part in sums of others' own.
    """
    parallel = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if module.training and parallel is not None and parallel._join_config.enable:
        raise GradientError(
            "processes that end one before another, as within DistributedDataParallel.join(), can't add up what they "
            "capture: give each as many batches (DistributedSampler does), or leave capture= out and build the bank "
            "after training"
        )


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if count() == 1:
        return number
    numbers = [0] * count()
    dist.all_gather_object(numbers, number)
    return max(numbers)


def from_first(thing: Any) -> Any:
    """What the first process has, of tensors and plain values."""
    if count() == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things, src=0)
    return things[0]


def _device(tensor: Tensor) -> torch.device:
    """Where the processes' backend can take a tensor."""
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device
