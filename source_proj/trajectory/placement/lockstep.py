"""Processes that run one model together: each pass is one of all of them, or they wait for each other forever."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from source_proj._errors import SourceProjError

__all__ = ["Lockstep"]

T = TypeVar("T")


class Lockstep:
    """The processes of a sharded model; without a group, this process alone, where nothing is asked of others.

    Args:
        group: of torch.distributed; its first process leads.
        device: of the tensors that its backend sends.

    Example:
        >>> alone = Lockstep()
        >>> alone.size, alone.any(True), alone.from_leader(lambda: 3)
        (1, True, 3)
    """

    def __init__(self, group: Any = None, device: torch.device | str = "cpu") -> None:
        self.group, self._device = group, device
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @property
    def leads(self) -> bool:
        """Whether this process reads, claims and seals for all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of the processes."""
        if self.group is None:
            return flag
        value = torch.tensor([int(flag)], device=self._device, dtype=torch.int64)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return bool(value)

    def barrier(self) -> None:
        """Wait for all."""
        self.any(False)

    def from_leader(self, make: Callable[[], T]) -> T:
        """What the leader makes; what it raises, all raise."""
        if self.group is None:
            return make()
        result: list[Any] = [None]
        if self.leads:
            try:
                result = [(make(), None)]
            except Exception as error:
                result = [(None, _sendable(error))]
        dist.broadcast_object_list(result, group=self.group, group_src=0, device=torch.device(self._device))
        value, problem = result[0]
        if problem is not None:
            raise problem
        return value  # type: ignore[no-any-return]

    def followed(self, items: Iterator[T]) -> Iterator[T]:
        """The leader's items, which are asked for one by one; the others' own are not."""
        while (item := self.from_leader(lambda: next(items, None))) is not None:
            yield item

    def tensor_from_leader(self, tensor: torch.Tensor) -> torch.Tensor:
        """The leader's tensor, given one of its shape and type elsewhere."""
        sent = tensor.to(self._device).contiguous()
        dist.broadcast(sent, group=self.group, group_src=0)
        return sent

    def require_same(self, value: object, what: str) -> None:
        """Refuse processes that were told different things.

        Raises:
            SourceProjError: names all values.
        """
        if self.group is None:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        if any(other != value for other in values):
            raise SourceProjError(
                f"the {self.size} processes of a sharded model act as one, and must be given the same {what}; they "
                f"were given {values}"
            )


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return SourceProjError(f"{type(error).__name__}: {error}")
    return error
