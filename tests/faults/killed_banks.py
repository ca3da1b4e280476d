"""Builds and appends in processes that are stopped and killed; a program, so that importing is done once.

    python tests/faults/killed_banks.py all FOLDER --kills 1000

Every build runs in a fork of this process, which itself never computes: torch's threads and autograd would not survive
the fork. Prints a JSON report; a bank that is not as it must be ends the program.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bank"))
from bank_runs import BATCH, SHARD, Run, assert_same, content, make_data, make_run

import source_proj.gradients  # noqa: F401 (imported before the fork)
from source_proj import bank as banks
from source_proj._errors import BankError
from source_proj._io import files
from source_proj.bank.build.row_encoder import RowEncoder
from source_proj.distribute import this_worker

LONGEST = 0.7  # of the time of a whole build, before a kill

Report = dict[str, object]


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


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes in a fork."""
    start = time.perf_counter()
    finished(forked(work))
    return time.perf_counter() - start


def require_whole(path: Path, whole: Path, *, finalize: bool = True) -> None:
    """Hold a bank to one that was built at a stretch, and to `verify`; nothing may be left behind."""
    if finalize:
        banks.open(path).finalize()  # removes what killed writers left
    assert_same(path, whole)
    report = banks.verify(path)
    if report.problems or report.leftovers:
        raise SystemExit(f"{path}: {report}")


def state(path: Path) -> str:
    """How far a killed build had come."""
    if not (path / "zarr.json").exists():
        return "begun" if path.exists() else "not begun"
    marks = sum(1 for _ in path.glob("*/*/*/committed/c.*") if not _.name.endswith(".partial"))
    partial = sum(1 for _ in path.rglob("*.partial"))
    return f"{marks} shards" + (", writing" if partial else "")


def resumed(run: Run, folder: Path, kills: int, seed: int) -> Report:
    """Kill builds at random moments, resuming each until it is whole, until there were enough kills."""
    draw = random.Random(seed)
    duration = timed(lambda: run.build(folder / "whole"))
    progress: list[str] = []
    made = 0
    while len(progress) < kills:
        path = folder / f"resumed_{made}"
        while True:
            child = forked(lambda path=path: run.build(path))
            if not killed_after(child, draw.uniform(0, LONGEST * duration)):
                break
            progress.append(state(path))
        require_whole(path, folder / "whole")
        shutil.rmtree(path)
        made += 1
    return {"kills": len(progress), "killed": progress, "banks": made}


def together(run: Run, folder: Path, kills: int, seed: int) -> Report:
    """Two builders on one bank from the first moment, one of them killed; then the rest by another."""
    draw = random.Random(seed)
    duration = timed(lambda: run.build(folder / "whole"))
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
        require_whole(path, folder / "whole")
        shutil.rmtree(path)
        made += 1
    return {"kills": len(refusals), "refusals": refusals, "banks": made}


def refusal(path: Path) -> str:
    """What finalizing says."""
    try:
        banks.open(path).finalize()
    except BankError as error:
        return str(error)
    return "finalized"


def taken_over(run: Run, folder: Path, kills: int, seed: int) -> Report:
    """Two to four workers, as a launcher numbers them, one of which is killed; the others make the bank alone."""
    draw = random.Random(seed)
    duration = timed(lambda: run.build(folder / "whole"))
    killed = made = 0

    def work(path: Path, index: int, count: int) -> None:
        os.environ.update(RANK=str(index), WORLD_SIZE=str(count))
        run.build(path, shard=this_worker().shard, takeover=60)

    while killed < kills:
        path, count = folder / f"taken_over_{made}", 2 + made % 3
        workers = [forked(lambda i=i, path=path, count=count: work(path, i, count)) for i in range(count)]
        killed += killed_after(workers.pop(draw.randrange(count)), draw.uniform(0, LONGEST * duration))
        for worker in workers:
            finished(worker)
        require_whole(path, folder / "whole", finalize=False)
        shutil.rmtree(path)
        made += 1
    return {"kills": killed, "banks": made}


def racing(run: Run, folder: Path, kills: int, seed: int) -> Report:
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
        require_whole(path, folder / "whole")
    return {"kills": 0, "banks": 3}


# Kills at a chosen instant ---------------------------------------------------------------------------------------


def dies_at(event: int) -> Callable[[], int]:
    """Let this process be killed before its n-th flush, renaming, linking, making or removing; counts them."""
    count = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    files._sync_path = counted(files._sync_path)
    for owner, name in ((os, "link"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
        setattr(owner, name, counted(getattr(owner, name)))
    return lambda: count


def events_of(work: Callable[[], object]) -> int:
    """How many such events something takes."""
    read, write = os.pipe()

    def counting() -> None:
        count = dies_at(-1)
        work()
        os.write(write, str(count()).encode())

    finished(forked(counting))
    return int(os.read(read, 20))


def instants(run: Run, folder: Path, kills: int, seed: int) -> Report:
    """Kill a build, or an append without ids, before one file event after another, and call it again."""
    draw = random.Random(seed)
    finished(forked(lambda: run.build(folder / "whole")))
    shutil.copytree(folder / "whole", folder / "appended")
    finished(forked(lambda: append(run, folder / "appended")))
    works: list[tuple[Callable[[Path], object], Path | None, Path]] = [
        (run.build, None, folder / "whole"),
        (lambda path: append(run, path), folder / "whole", folder / "appended"),
    ]
    moments = []
    for index, (work, begin, _) in enumerate(works):
        path = folder / f"counted_{index}"
        if begin is not None:
            shutil.copytree(begin, path)
        moments += [(index, event) for event in range(1, events_of(lambda work=work, path=path: work(path)) + 1)]
        shutil.rmtree(path)
    draw.shuffle(moments)
    done = 0
    for index, event in moments[:kills]:
        work, begin, whole = works[index]
        path = folder / f"instant_{index}_{event}"
        if begin is not None:
            shutil.copytree(begin, path)
        done += not finished(forked(lambda work=work, path=path, event=event: (dies_at(event), work(path))))
        finished(forked(lambda work=work, path=path: work(path)))
        require_whole(path, whole)
        shutil.rmtree(path)
    return {"kills": done, "banks": min(kills, len(moments)), "moments": len(moments)}


def append(run: Run, path: Path) -> None:
    """Append rows with default ids."""
    options = {"batch_size": BATCH, "shard_rows": SHARD, "progress": False}
    banks.open(path).append(run.model, run.task, make_data(30, seed=1), **options)


# Stragglers with other bits --------------------------------------------------------------------------------------


def nudged(run: Run, path: Path) -> None:
    """Build as a machine does whose float arithmetic rounds otherwise: every array of gradients differs."""
    real = RowEncoder.__call__

    def call(self: RowEncoder, place: object, batch: object) -> dict[str, torch.Tensor]:
        encoded = real(self, place, batch)  # type: ignore[arg-type]
        return {
            name: values.clamp(max=126) + 1 if values.dtype == torch.int8 else values * (1 + 2**-20)
            for name, values in encoded.items()
        }

    RowEncoder.__call__ = call  # type: ignore[method-assign,assignment]
    run.build(path)


def straggled(run: Run, folder: Path, kills: int, seed: int) -> Report:
    """Stop a builder with other bits anywhere, let another one build and seal, let the first go on, and kill it.

    A straggler that was stopped counts as a kill, whether or not it had come to its end when it was killed.
    """
    draw = random.Random(seed)
    duration = timed(lambda: run.build(folder / "whole"))
    finished(forked(lambda: nudged(run, folder / "nudged")))
    sides = [content(folder / name) for name in ("whole", "nudged")]
    killed, of_both = 0, 0
    for made in range(kills):
        path = folder / f"straggled_{made}"
        child = forked(lambda path=path: nudged(run, path))
        time.sleep(draw.uniform(0, duration))
        os.kill(child, signal.SIGSTOP)
        finished(forked(lambda path=path: run.build(path)))
        sealed = content(path)
        os.kill(child, signal.SIGCONT)
        killed += killed_after(child, draw.uniform(0, 0.3 * duration))
        require_unmixed(path, sealed, sides)
        of_both += len(origins(sealed, sides)) == 2
        shutil.rmtree(path)
    return {"kills": kills, "killed": killed, "banks": kills, "of_both": of_both}


def require_unmixed(path: Path, sealed: dict[str, np.ndarray], sides: list[dict[str, np.ndarray]]) -> None:
    """A sealed bank stays as it is, and every shard of it is one builder's."""
    now = content(path)
    for name, values in sealed.items():
        if isinstance(values, np.ndarray) and values.tobytes() != now[name].tobytes():
            raise SystemExit(f"{path}: {name} changed after the seal")
    if None in origins(now, sides):
        raise SystemExit(f"{path} holds a shard of two builders")
    report = banks.verify(path)
    if report.problems:
        raise SystemExit(f"{path}: {report}")


def origins(bank: dict[str, np.ndarray], sides: list[dict[str, np.ndarray]]) -> set[int | None]:
    """Whose shards a bank is made of; None for one that is of neither side alone."""
    names = [name for name in bank if name.rpartition("/")[2] in ("rows", "scale", "d1", "d2")]
    found: set[int | None] = set()
    for group in {name.rpartition("/")[0] for name in names}:
        own = [name for name in names if name.startswith(f"{group}/")]
        for start in range(0, len(bank[own[0]]), SHARD):
            cut = slice(start, start + SHARD)
            same = [all(np.array_equal(bank[n][cut], side[n][cut]) for n in own) for side in sides]
            found.add(same.index(True) if any(same) else None)
    return found


SCENARIOS: dict[str, Callable[[Run, Path, int, int], Report]] = {
    "resumed": resumed,
    "together": together,
    "taken_over": taken_over,
    "racing": racing,
    "instants": instants,
    "straggled": straggled,
}


def main() -> None:
    """Run one scenario, or all of them with as many kills together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", choices=[*SCENARIOS, "all"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.scenario != "all":
        print(json.dumps(SCENARIOS[args.scenario](make_run(), args.folder, args.kills, args.seed)))
        return
    total = 0
    for turn in range(1_000):
        for name, scenario in SCENARIOS.items():
            folder = args.folder / f"{name}_{turn}"
            folder.mkdir(parents=True)
            report = scenario(make_run(), folder, min(100, args.kills // 4 + 1), args.seed + turn)
            shutil.rmtree(folder)
            total += int(str(report["kills"]))
            print(f"{name}: {report['kills']} kills, {report['banks']} banks whole; {total} in all", flush=True)
        if total >= args.kills:
            return


if __name__ == "__main__":
    main()
