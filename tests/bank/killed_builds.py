"""Builds in processes that are killed; a program, so that the importing is done once and the killing often.

Every build runs in a fork of this process, which itself never computes: torch's threads and autograd would not survive
the fork. Prints a JSON report.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bank_runs import Run, make_run

import source_proj.gradients  # noqa: F401 (imported before the fork)
from source_proj import bank as banks
from source_proj._errors import BankError

LONGEST = 0.7  # of the time of a whole build, before a kill


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
        raise SystemExit(f"a build failed with exit code {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def killed_after(child: int, seconds: float) -> bool:
    """Kill a fork after a while: whether it was still at work."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return not finished(child)


def resumed(run: Run, folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill builds at random moments, resuming each until it is whole, until there were enough kills."""
    draw = random.Random(seed)
    start = time.perf_counter()
    finished(forked(lambda: run.build(folder / "whole")))
    duration = time.perf_counter() - start
    progress: list[str] = []
    made = 0
    while len(progress) < kills:
        path = folder / f"resumed_{made}"
        while True:
            child = forked(lambda path=path: run.build(path))
            if not killed_after(child, draw.uniform(0, LONGEST * duration)):
                break
            progress.append(state(path))
        made += 1
    return {"killed": progress, "banks": made}


def state(path: Path) -> str:
    """How far a killed build had come."""
    if not path.exists():
        return "not begun"
    marks = sum(1 for _ in path.glob("*/*/*/committed/c.*"))
    partial = sum(1 for _ in path.rglob("*.partial"))
    return f"{marks} shards" + (", writing" if partial else "")


def together(run: Run, folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Two builders on one bank from the first moment, one of them killed; then the rest by another."""
    draw = random.Random(seed)
    start = time.perf_counter()
    finished(forked(lambda: run.build(folder / "whole")))
    duration = time.perf_counter() - start
    refusals: list[str] = []
    made = 0
    while len(refusals) < kills:
        path = folder / f"together_{made}"
        dying, living = (forked(lambda i=i, path=path: run.build(path, shard=(i, 2))) for i in range(2))
        killed = killed_after(dying, draw.uniform(0, LONGEST * duration))
        finished(living)
        if killed:
            refusals.append(refusal(path))
        finished(forked(lambda path=path: run.build(path, shard=(0, 2))))
        banks.open(path).finalize()
        made += 1
    return {"refusals": refusals, "banks": made}


def refusal(path: Path) -> str:
    try:
        banks.open(path).finalize()
    except BankError as error:
        return str(error)
    return "finalized"


def racing(run: Run, folder: Path) -> dict[str, object]:
    """Workers that all begin at one moment, two with their shares and two that each want to do it all."""
    finished(forked(lambda: run.build(folder / "whole")))
    for attempt in range(3):
        path = folder / f"racing_{attempt}"
        moment = time.time() + 0.05

        def work(shard: tuple[int, int] | None, path: Path = path, moment: float = moment) -> None:
            time.sleep(max(0.0, moment - time.time()))
            run.build(path, shard=shard)

        for child in [forked(lambda shard=shard: work(shard)) for shard in ((0, 2), (1, 2), None, None)]:
            finished(child)
        banks.open(path).finalize()
    return {"banks": 3}


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    scenarios: dict[str, Callable[[], dict[str, object]]] = {
        "resumed": lambda: resumed(make_run(), folder, 20, seed),
        "together": lambda: together(make_run(), folder, 4, seed),
        "racing": lambda: racing(make_run(), folder),
    }
    print(json.dumps(scenarios[scenario]()))
