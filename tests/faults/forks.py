"""Work in processes that are stopped and killed; forks of one that has imported everything, and never computes.

torch's threads and autograd would not survive a fork: whatever computes does so in a fork of its own.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch._dynamo
import torch.utils.serialization.config  # noqa: F401 (torch.load does)

import source_proj.gradients  # noqa: F401

__all__ = ["dies_at", "events_of", "finished", "forked", "killed_after", "timed"]

os.fsync = lambda descriptor: None  # guards against power failures, which no kill is; on a busy disk it takes seconds

EVENTS = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}


def forked(work: Callable[[], object]) -> int:
    """Run something in a fork; returns the process's id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def finished(child: int) -> bool:
    """Wait for a fork: whether it ended by itself, and not by a signal. An error ends this program."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a process failed with exit code {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def killed_after(child: int, seconds: float) -> bool:
    """Kill a fork after a while: whether it was still at work."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return not finished(child)


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes in a fork."""
    start = time.perf_counter()
    finished(forked(work))
    return time.perf_counter() - start


def dies_at(event: int, folder: Path) -> Callable[[], int]:
    """Let this process be killed before its n-th opening, naming or removing of a file below a folder; counts them."""
    count = 0

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if name in EVENTS and str(arguments[0]).startswith(str(folder)):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def events_of(work: Callable[[], object], folder: Path) -> int:
    """How many such events something takes."""
    read, write = os.pipe()

    def counting() -> None:
        count = dies_at(-1, folder)
        work()
        os.write(write, str(count()).encode())

    finished(forked(counting))
    os.close(write)
    with os.fdopen(read) as pipe:
        return int(pipe.read())
