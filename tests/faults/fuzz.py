"""Mutants of banks, fits, recorded runs, checkpoints and ground truths, each read in a process of its own.

    python tests/faults/fuzz.py FOLDER --kind all --mutants 2000 --seed 0

Every outcome must be the right answer, or a `SourceProjError` that names a file; within 30 seconds and a gibibyte.
Prints each mutant that is otherwise, and a JSON report.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_subjects import KINDS, Subject
from mutations import Files, write
from tqdm import tqdm

import source_proj as sp
from source_proj._io.files import walk

SECONDS, BYTES = 30, 1 << 30
RESIDENT = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of this process before it forks


def in_fork(work: Callable[[], Any]) -> Any:
    """What something returns in a fork, as JSON has it; how the fork ended, if it did not return."""
    read, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            torch.set_num_threads(1)
            answer = json.dumps(work())
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            answer = json.dumps({"wrong": f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"[:2000]})
        with os.fdopen(write_end, "w") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"wrong": f"ended with status {status} and without a word"}


def answers(subject: Subject, path: Path) -> list[Any]:
    """What an unmutated folder answers, as JSON has it."""
    return [json.loads(json.dumps(question(path))) for question in subject.questions]


def judged(subject: Subject, path: Path, right: list[Any], chosen: list[int], *, forged: bool) -> dict[str, str]:
    """Ask a mutant some questions, bounded in time and memory."""
    os.chdir(path.parent)
    signal.alarm(SECONDS)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + 4 * BYTES,) * 2)  # threads take address space, not memory
    problems = None if subject.problems is None else subject.problems(path)
    refusals = []
    for number in chosen:
        try:
            answer = json.loads(json.dumps([*subject.questions, *subject.lenient][number](path)))
        except sp.SourceProjError as error:
            refusals.append(str(error))
            continue
        free = forged or number >= len(subject.questions)
        if not free and answer != right[number]:
            return {"wrong": f"another answer to question {number}, without a word"}
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > RESIDENT + BYTES:
        return {"wrong": "took over a gibibyte"}
    if (path.parent / "pwned").exists():
        return {"wrong": "ran what a file contains"}
    nameless = [refusal for refusal in refusals if str(path) not in refusal]
    if nameless:
        return {"wrong": f"names no file: {nameless[0]}"[:2000]}
    if refusals and problems is not None and not problems:
        return {"wrong": f"verifying finds nothing, but: {refusals[0]}"[:2000]}
    return {"refused": refusals[0][:200]} if refusals else {"right": ""}


def content(path: Path) -> Files:
    """All files of a folder."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in walk(path)}


def mutant(draw: random.Random, subject: Subject, files: Files, path: Path) -> list[str]:
    """Write a mutant, and say what was done to it."""
    own = {name: entry for name, entry in files.items() if name.startswith(subject.below)}
    rest = {name: entry for name, entry in files.items() if name not in own}
    done = [draw.choice(subject.mutations)(draw, own) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    write({**rest, **own}, path)
    return done


def remove(path: Path) -> None:
    """Remove a mutant, whatever it has become."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def fuzz(folder: Path, kind: str, mutants: int, seed: int, seconds: float) -> dict[str, int]:
    """Judge mutants of one kind until there were enough, or the time is up."""
    path, kept = folder / "mutant", []
    for subject in KINDS[kind]:
        in_fork(lambda subject=subject: subject.build(path))
        kept.append((subject, content(path), in_fork(lambda subject=subject: answers(subject, path))))
        remove(path)
        if isinstance(kept[-1][2], dict):
            raise SystemExit(f"{kind}, unmutated: {kept[-1][2]['wrong']}")
    counts = Counter(right=0, refused=0, wrong=0)
    start = time.monotonic()
    for number in tqdm(range(mutants), kind, mininterval=10, unit=" mutants", disable=None):
        if time.monotonic() - start > seconds:
            break
        draw = random.Random(f"{seed}-{number}")
        subject, files, right = draw.choice(kept)
        done = mutant(draw, subject, files, path)
        forged = any(what.startswith("forged") for what in done)
        strict = len(subject.questions)
        chosen = [draw.randrange(strict), *(strict + draw.randrange(n) for n in [len(subject.lenient)] if n)]
        begun = time.monotonic()
        outcome = in_fork(lambda s=subject, r=right, c=chosen, f=forged: judged(s, path, r, c, forged=f))
        ((word, why),) = outcome.items()
        counts[word] += 1
        if word == "wrong":
            took = time.monotonic() - begun
            print(f"{kind} {number} of seed {seed}, {done}, {took:.0f} s: {why}", file=sys.stderr, flush=True)
        remove(path)
    return {**counts, "mutants": counts.total()}


def main() -> None:
    """Fuzz, and fail if any outcome was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--mutants", type=int, default=2000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each kind")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(KINDS) if args.kind == "all" else [args.kind]
    each = -(-args.mutants // len(kinds))
    report = {kind: fuzz(folder, kind, each, args.seed, args.seconds) for kind in kinds}
    print(json.dumps(report))
    raise SystemExit(any(counts["wrong"] for counts in report.values()))


if __name__ == "__main__":
    main()
