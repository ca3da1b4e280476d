"""A build handed to an executor, share by share."""

from collections.abc import Callable
from functools import partial
from typing import Any

from source_proj._errors import BankError
from source_proj._io.executors import Executor, map_in_order
from source_proj._io.progress import Progress, progress_bar
from source_proj.bank.store import open_store
from source_proj.trajectory.placement import Placement

__all__ = ["fill_by", "require_whole"]

_SHARES = 16  # each loads all checkpoints once more


def require_whole(
    executor: Executor | None, shard: tuple[int, int] | None, takeover: float | None, placement: Placement
) -> None:
    """Refuse an executor for what is a share itself, or for a model that cannot be sent.

    Raises:
        ValueError: both were given.
    """
    if executor is not None and not placement.is_whole:
        raise ValueError(
            f"executor= sends the model to workers, and this one is {placement.kind}: leave executor= out, and let the "
            "processes share the build by shard= or takeover="
        )
    if executor is not None and (shard is not None or takeover is not None):
        raise ValueError(
            f"executor= makes the shares of a build itself, got shard={shard!r} and takeover={takeover!r} with it: "
            "leave them out"
        )


def fill_by(executor: Executor, build: Callable[..., Any], where: str, most: int, progress: Progress) -> None:
    """Let an executor make all rows of a bank that has been created.

    Args:
        executor: its workers reach the bank's path.
        build: :func:`build` with all arguments but the path and the share's.
        where: the bank's path, whatever folder a worker is in.
        most: shares that are of use: as many as there are shards.
        progress: shows the shares that are done.
    """
    count = min(most, _SHARES)
    with progress_bar(progress, "build", count, "shares") as bar:
        for _ in map_in_order(executor, partial(_share, build, where), [(i, count) for i in range(count)]):
            bar.update(1)


def _share(build: Callable[..., Any], where: str, shard: tuple[int, int]) -> None:
    if not open_store(where).exists("zarr.json"):
        raise BankError(
            f"a worker of the executor finds no bank at {where}, where one was begun: all workers must reach that path "
            "(memory:// serves threads only)"
        )
    build(path=where, shard=shard, progress=False)
