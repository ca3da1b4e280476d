"""Builds of banks in a bucket by two processes that are killed, while requests to the bucket go wrong.

    python tests/faults/killed_buckets.py --kills 200 --faults 200

Server, builders and checks are forks of this process, which has no threads. Whatever was killed is started again,
until the bank is whole; then its fingerprint must be that of a bank that was built at a stretch, and nothing may be
missing, doubled or left behind. Prints a JSON report.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bank"))
from bank_runs import Run, make_run
from buckets import BUCKET, bucket
from killed_banks import finished, forked

from source_proj import bank as banks

SHARE = 0.02  # of requests that meet a fault
KILLS = 8  # of the builders of one bank


def serve(pipe: int, faults: Any) -> None:
    """Serve the bucket for good, and count the faults."""
    with bucket(SHARE) as (app, settings):
        os.write(pipe, json.dumps(settings).encode())
        while True:
            time.sleep(0.1)
            faults.value = sum(app.faults.values())


def started() -> tuple[int, Any]:
    """Start the server in a fork, and let this environment lead there: its process, and the count of its faults."""
    read, write = os.pipe()
    faults = multiprocessing.Value("i", 0)
    server = forked(lambda: serve(write, faults))
    os.environ.update(json.loads(os.read(read, 10_000)))
    return server, faults


def said(work: Callable[[], str]) -> str:
    """What something in a fork returns."""
    read, write = os.pipe()
    finished(forked(lambda: os.write(write, work().encode())))
    answer = os.read(read, 10_000).decode()
    os.close(read)
    os.close(write)
    return answer


def seconds_of(work: Callable[[], object]) -> float:
    """Time that something takes in a fork."""
    start = time.perf_counter()
    finished(forked(work))
    return time.perf_counter() - start


def killed_and_whole(run: Run, url: str, draw: random.Random, duration: float) -> int:
    """Build a bank with two builders, each started again when it is killed: how many were."""

    def builder(index: int) -> int:
        return forked(lambda: run.build(url, shard=(index, 2), takeover=5))

    workers, kills = [builder(0), builder(1)], 0
    for _ in range(KILLS):
        time.sleep(draw.uniform(0, 0.2 * duration))
        index = draw.randrange(2)
        os.kill(workers[index], signal.SIGKILL)
        ended = finished(workers[index])
        kills += not ended
        workers[index] = builder(index)
        if ended:
            break
    for worker in workers:
        finished(worker)
    return kills


def checked(url: str) -> str:
    """The fingerprint of a bank of which nothing is missing, wrong or left behind once it is finalized again."""
    bank = banks.open(url)
    bank.finalize()  # removes what killed writers left
    report = banks.verify(url)
    if report.problems or report.leftovers:
        raise SystemExit(f"{url}: {report}")
    return bank.fingerprint


def main() -> None:
    """Kill and disturb until there was enough of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    server, faults = started()
    run = make_run()
    with tempfile.TemporaryDirectory() as folder:
        whole = said(lambda: run.build(Path(folder) / "bank").fingerprint)
    duration = seconds_of(lambda: run.build(f"s3://{BUCKET}/timed"))
    kills = made = 0
    while kills < args.kills or faults.value < args.faults:
        url = f"s3://{BUCKET}/bank_{made}"
        kills += killed_and_whole(run, url, draw, duration)
        fingerprint = said(lambda url=url: checked(url))
        if fingerprint != whole:
            raise SystemExit(f"{url} has fingerprint {fingerprint}, and must have {whole}")
        made += 1
        print(f"{kills} kills, {faults.value} faults, {made} banks whole", file=sys.stderr, flush=True)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    print(json.dumps({"kills": kills, "faults": faults.value, "banks": made}))


if __name__ == "__main__":
    main()
