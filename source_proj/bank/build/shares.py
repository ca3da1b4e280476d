"""A build handed to an executor, share by share."""

from collections.abc import Callable
from functools import partial
from typing import Any

from source_proj._io.executors import Executor, map_in_order
from source_proj._io.progress import Progress, progress_bar

__all__ = ["fill_by", "require_whole"]

_SHARES = 16  # each loads all checkpoints once more


def require_whole(executor: Executor | None, shard: tuple[int, int] | None, takeover: float | None) -> None:
    """Refuse an executor for what is a share itself.

    Raises:
        ValueError: both were given.
    """
    if executor is not None and (shard is not None or takeover is not None):
        raise ValueError(
            f"executor= makes the shares of a build itself, got shard={shard!r} and takeover={takeover!r} with it: "
            "leave them out"
        )


def fill_by(executor: Executor, build: Callable[..., Any], most: int, progress: Progress) -> None:
    """Let an executor make all rows of a bank that has been created.

    Args:
        executor: its workers reach the bank's path.
        build: :func:`build` with all arguments but the share's.
        most: shares that are of use: as many as there are shards.
        progress: shows the shares that are done.
    """
    count = min(most, _SHARES)
    with progress_bar(progress, "build", count, "shares") as bar:
        for _ in map_in_order(executor, partial(_share, build), [(i, count) for i in range(count)]):
            bar.update(1)


def _share(build: Callable[..., Any], shard: tuple[int, int]) -> None:
    build(shard=shard, progress=False)
