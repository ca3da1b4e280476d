"""Mutants of banks, each opened, verified and scored in a process of its own.

    python tests/faults/fuzz_banks.py FOLDER --mutants 2000 --seed 0

Every outcome must be the right scores, or a `SourceProjError` that names a file of the bank; within 30 seconds and a
gibibyte. Prints each mutant that is otherwise, and a JSON report.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bank"))
from bank_runs import BATCH, SHARD, make_adam_run, make_data, make_model, make_run

import source_proj as sp
from source_proj import bank as banks

SECONDS, BYTES = 30, 1 << 30
VALUES = [
    None, True, -1, 0, 1, 2**31, 10**8, 10**10, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "x", "1",
    "../..", "\ud800", "\x1b[2J", "a" * 100_000, [], [0], [[]], {}, {"": None}, [None] * 1000,
]  # fmt: skip

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files], str]


# Mutations: each changes files in place, and says what it did ----------------------------------------------------


def some(draw: random.Random, files: Files, ends: str = "") -> str:
    """A file, metadata as often as data."""
    kinds = [[n for n in sorted(files) if n.endswith(".json")], [n for n in sorted(files) if not n.endswith(".json")]]
    names = [n for n in draw.choice(kinds) if n.endswith(ends)] or [n for n in sorted(files) if n.endswith(ends)]
    return draw.choice(names)


def flipped(draw: random.Random, files: Files) -> str:
    """Some bits."""
    name = some(draw, files)
    content = bytearray(files[name])
    for _ in range(draw.choice([1, 1, 1, 2, 50])):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    files[name] = bytes(content)
    return f"bits of {name}"


def cut(draw: random.Random, files: Files) -> str:
    """The end of a file gone, or more of it there."""
    name = some(draw, files)
    length = draw.choice(
        [0, 1, len(files[name]) // 2, max(0, len(files[name]) - 1), draw.randrange(len(files[name]) + 1)]
    )
    files[name] = files[name][:length] if draw.random() < 0.7 else files[name] + files[name][:length]
    return f"length of {name}"


def swapped(draw: random.Random, files: Files) -> str:
    """Two files in each other's place, alike if possible."""
    name = some(draw, files)
    alike = [n for n in sorted(files) if n != name and n.rpartition("/")[0].rpartition("/")[2] in name]
    alike = [n for n in alike if len(files[n]) == len(files[name])] or alike or sorted(files)
    other = draw.choice(alike)
    files[name], files[other] = files[other], files[name]
    return f"swap of {name} and {other}"


def overwritten(draw: random.Random, files: Files) -> str:
    """One file over another."""
    name, other = some(draw, files), some(draw, files)
    files[other] = files[name]
    return f"{name} over {other}"


def removed(draw: random.Random, files: Files) -> str:
    """A file, or all below a folder, gone."""
    name = some(draw, files)
    folder = name.rpartition("/")[0] if draw.random() < 0.4 else name
    for gone in [n for n in files if n == name or (folder and n.startswith(f"{folder}/"))]:
        del files[gone]
    return f"removal of {folder}"


def added(draw: random.Random, files: Files) -> str:
    """A file that does not belong."""
    folder = some(draw, files).rpartition("/")[0]
    name = f"{folder}/{draw.choice(['c.7.0', 'x.partial', 'zarr.json', 'note', 'c.0.0.0.choice.partial'])}".lstrip("/")
    files[name] = draw.choice([b"", b"{}", os.urandom(40), files[some(draw, files)]])
    return f"a new {name}"


def rechecked(draw: random.Random, files: Files) -> str:
    """Other content under a right checksum."""
    names = [n for n in sorted(files) if not n.endswith(".json") and "rows" not in n and len(files[n]) > 4]
    name = draw.choice(names)
    body = bytearray(files[name][:-4])
    body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
    files[name] = bytes(body) + struct.pack("<I", google_crc32c.value(bytes(body)))
    return f"content of {name}"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to all entries of a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, entry in inner for way in ((*path, key), *leaves(entry, (*path, key)))]


def edited(draw: random.Random, files: Files) -> str:
    """An entry of some metadata replaced, removed or doubled."""
    name = some(draw, files, ".json")
    try:
        document = json.loads(files[name])
        *way, last = draw.choice(leaves(document))
    except (ValueError, IndexError):
        return flipped(draw, files)
    inner = document
    for key in way:
        inner = inner[key]
    action = draw.random()
    if action < 0.15:
        del inner[last]
    elif action < 0.25 and isinstance(inner, dict):
        inner["another"] = inner[last]
    elif action < 0.4 and isinstance(inner[last], int) and not isinstance(inner[last], bool):
        inner[last] += draw.choice([-1, 1])
    else:
        inner[last] = draw.choice(VALUES)
    files[name] = json.dumps(document).encode()
    return f"{[*way, last]} of {name}"


def claiming(draw: random.Random, files: Files) -> str:
    """More rows than there are, in all metadata alike."""
    before, after = draw.choice([(90, 10**8), (90, 10**10), (90, 91), (32, 10**9), (30, 10**8)])
    for name in [n for n in files if n.endswith("zarr.json")]:
        files[name] = json.dumps(replaced(json.loads(files[name]), before, after)).encode()
    for name in [n for n in files if "/seal/c." in n]:
        if draw.random() < 0.5:
            del files[name]
    return f"{after} for {before} everywhere"


def replaced(value: Any, before: int, after: int) -> Any:
    """A document with one number for another."""
    if isinstance(value, dict):
        return {key: replaced(entry, before, after) for key, entry in value.items()}
    if isinstance(value, list):
        return [replaced(entry, before, after) for entry in value]
    return after if value == before and not isinstance(value, bool) else value


MUTATIONS: list[Mutation] = [
    flipped, flipped, cut, swapped, swapped, overwritten, removed, added, rechecked, edited, edited, edited, claiming,
]  # fmt: skip


# Judging ---------------------------------------------------------------------------------------------------------


def in_fork(work: Callable[[], Any]) -> Any:
    """What something returns in a fork, as JSON has it; how the fork ended, if it did not return."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            answer = json.dumps(work())
        except BaseException as error:
            answer = json.dumps({"wrong": f"{type(error).__name__}: {error}"[:2000]})
        os.write(write, answer.encode()[: 1 << 16])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"wrong": f"ended with status {status} and without a word"}


def scores(path: Path, *, cache: bool) -> list[list[float]]:
    """What a bank says of three queries."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that is made again says so
        source = sp.Source(banks.open(path), model=make_model(), cache=cache, progress=False)
        values: list[list[float]] = np.asarray(source.score(make_data(3, seed=7))).tolist()
    return values


def judged(path: Path, right: list[list[float]], *, cache: bool) -> dict[str, str]:
    """Open, verify and score a mutant, bounded in time and memory."""
    signal.alarm(SECONDS)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + BYTES, before + BYTES))
    report = banks.verify(path)
    try:
        found = scores(path, cache=cache)
    except sp.SourceProjError as error:
        if str(path) not in str(error):
            return {"wrong": f"names no file: {error}"[:2000]}
        if report.ok:
            return {"wrong": f"verify finds nothing, but: {error}"[:2000]}
        return {"refused": str(error)[:200]}
    return {"right": ""} if found == right else {"wrong": "other scores, without a word"}


def fuzz(folder: Path, mutants: int, seed: int, seconds: float) -> dict[str, Any]:
    """Judge mutants of two banks until there were enough, or the time is up."""
    originals = {"sgd": folder / "sgd", "adam": folder / "adam"}
    in_fork(lambda: built(originals))
    rights = {name: in_fork(lambda path=path: scores(path, cache=True)) for name, path in originals.items()}
    contents = {
        name: {f.relative_to(path).as_posix(): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
        for name, path in originals.items()
    }
    counts = {"right": 0, "refused": 0, "wrong": 0}
    start = time.monotonic()
    for number in range(mutants):
        if time.monotonic() - start > seconds:
            break
        draw = random.Random(f"{seed}-{number}")
        name = draw.choice(sorted(originals))
        files = dict(contents[name])
        what = [draw.choice(MUTATIONS)(draw, files) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
        path = folder / "mutant"
        for file, content in files.items():
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_bytes(content)
        cache = draw.random() < 0.4
        outcome = in_fork(lambda path=path, right=rights[name], cache=cache: judged(path, right, cache=cache))
        (kind,) = outcome
        counts[kind] += 1
        if kind == "wrong":
            print(f"mutant {number} of seed {seed}, {name}, {what}: {outcome['wrong']}", file=sys.stderr, flush=True)
        shutil.rmtree(path)
    return {**counts, "mutants": sum(counts.values())}


def built(originals: dict[str, Path]) -> None:
    """A bank with appended rows and copies of weights, and one with metrics that are crossed; their fits beside."""
    torch.set_num_threads(1)
    run = make_run()
    bank = run.build(originals["sgd"])
    bank.append(run.model, run.task, make_data(30, seed=1), batch_size=BATCH, shard_rows=SHARD, progress=False)
    make_adam_run().build(originals["adam"])


def main() -> None:
    """Fuzz, and fail if any outcome was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    report = fuzz(args.folder, args.mutants, args.seed, args.seconds)
    print(json.dumps(report))
    raise SystemExit(report["wrong"] > 0)


if __name__ == "__main__":
    main()
