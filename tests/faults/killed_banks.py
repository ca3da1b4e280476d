"""Builds and appends in processes that are stopped and killed; a program, so that importing is done once.

    python tests/faults/killed_banks.py all FOLDER --kills 1000
    python tests/faults/killed_banks.py resumed=12,instants=10 FOLDER

Every writer runs in a fork of this process. Prints a JSON report; what is not as it must be ends the program. "all"
keeps its counts in the folder, and goes on from there when it is called again.
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
from forks import dies_at, events_of, finished, forked, killed_after, timed
from killed_files import fitted, outputs, recorded

from source_proj import bank as banks
from source_proj._errors import BankError
from source_proj._io.files import write_file
from source_proj.bank.build.row_encoder import RowEncoder
from source_proj.distribute import this_worker

LONGEST = 0.7  # of the time of a whole build, before a kill

Report = dict[str, object]


def require_whole(path: Path, whole: Path, *, sealed: bool = False) -> None:
    """Hold a bank to one that was built at a stretch, and to `verify`; nothing may be left behind.

    Args:
        path: the bank.
        whole: the other one.
        sealed: whether its writers must have finished it by themselves. One that was killed when the bank was whole
            already may leave temporary files all the same.
    """
    if sealed and not banks.open(path).finalized:
        raise SystemExit(f"{path} was left unfinished")
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
        require_whole(path, folder / "whole", sealed=True)
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
        moments += [(index, event) for event in range(1, events_of(lambda work=work, path=path: work(path), path) + 1)]
        shutil.rmtree(path)
    draw.shuffle(moments)
    done = 0
    for index, event in moments[:kills]:
        work, begin, whole = works[index]
        path = folder / f"instant_{index}_{event}"
        if begin is not None:
            shutil.copytree(begin, path)
        done += not finished(forked(lambda work=work, path=path, event=event: (dies_at(event, path), work(path))))
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


Scenario = Callable[[Run, Path, int, int], Report]

SCENARIOS: dict[str, tuple[Scenario, int]] = {
    "resumed": (resumed, 10),
    "together": (together, 5),
    "taken_over": (taken_over, 5),
    "racing": (racing, 0),
    "instants": (instants, 15),
    "straggled": (straggled, 5),
    "outputs": (outputs, 30),
    "fitted": (fitted, 10),
    "recorded": (recorded, 15),
}
"""What can be asked for, and how many kills of each are in a turn of all."""


def everything(folder: Path, kills: int, seed: int) -> None:
    """All scenarios, one after the other, until there were enough kills; what was done in a folder before counts."""
    folder.mkdir(parents=True, exist_ok=True)
    book, run = folder / "kills.json", make_run(n=2 * SHARD)
    counts: list[int] = json.loads(book.read_text()) if book.exists() else []
    while sum(counts) < kills:
        name = list(SCENARIOS)[len(counts) % len(SCENARIOS)]
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)  # of a turn that was stopped
        place.mkdir()
        scenario, share = SCENARIOS[name]
        report = scenario(run, place, share, seed + len(counts))
        shutil.rmtree(place)
        counts.append(int(str(report["kills"])))
        write_file(book, json.dumps(counts).encode())
        print(f"{name}: {counts[-1]} kills, {report['banks']} whole; {sum(counts)} kills in all", flush=True)
    each = {name: sum(counts[place :: len(SCENARIOS)]) for place, name in enumerate(SCENARIOS)}
    print(json.dumps({"kills": sum(counts), **each}), flush=True)


def several(folder: Path, wanted: dict[str, int], seed: int) -> None:
    """Each scenario with so many kills, in a folder of its own; the report of one that failed is its error."""
    reports: dict[str, Report] = {}
    for name, kills in wanted.items():
        place = folder / name
        place.mkdir()
        try:
            reports[name] = SCENARIOS[name][0](make_run(), place, kills, seed)
        except (Exception, SystemExit) as error:
            reports[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reports))
    raise SystemExit(any("error" in report for report in reports.values()))


def main() -> None:
    """Run some scenarios, or all of them with as many kills together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", help=f"all, or some with their kills: resumed=12,racing=0; of {[*SCENARIOS]}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20, help="of all together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.scenarios == "all":
        everything(args.folder.absolute(), args.kills, args.seed)
    else:
        wanted = dict(scenario.split("=") for scenario in args.scenarios.split(","))
        several(args.folder.absolute(), {name: int(kills) for name, kills in wanted.items()}, args.seed)


if __name__ == "__main__":
    main()
