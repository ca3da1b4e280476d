"""How fast are score and top_k, against the matrix products that they cannot do without?

    python examples/speed/score.py                     # 1,000 queries x 100,000 rows, k = 4,096; about 6 GB, minutes
    python examples/speed/score.py --rows 20000 --queries 200
    python examples/speed/score.py --codecs            # the search in rows of each codec in memory, no bank; a minute

The bank is a real one, of a linear model on generated features. Each timing is the median of interleaved repetitions
in this one process. For each number of queries the bound is what the machine cannot beat: one read of the held rows at
the speed of a sum, or their multiplications at the speed of a large float32 product, whichever takes longer. Both
speeds are measured in the same rounds. Rows are once held in memory, and once read from the bank for every call. The
fit has a file of its own, fit.py.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import source_proj as sp
from source_proj.bank.codecs import find_codec
from source_proj.kernels.scoring import Strongest

CODECS = ("float32", "float16", "int8", "int4", "int2", "int1")


class Generated(Dataset[Any]):
    """Rows of normal features with decaying scales, each a function of its index."""

    def __init__(self, count: int, dim: int, first: int = 0) -> None:
        self.count, self.first = count, first
        self.scale = torch.arange(1, dim + 1) ** -0.5

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.first + index)
        x = torch.randn(len(self.scale), generator=generator) * self.scale
        return x, x[:1] + torch.randn(1, generator=generator)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(repetitions: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, called in turn; one that takes seconds needs no call to warm up."""
    for function in functions:
        if seconds(function) > 1:
            break
    times = [[seconds(function) for function in functions] for _ in range(repetitions)]
    return [median(column) for column in zip(*times, strict=True)]


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Memory that a call takes beyond what was resident before it; None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the high-water mark starts anew
    except OSError:
        return None

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    before = field("VmRSS")
    function()
    return field("VmHWM") - before


def time_queries(bank: sp.Bank, model: nn.Module, count: int, repetitions: int) -> None:
    """Score and top_k with rows in memory and without, against one read of their bytes and the product in float32."""
    sources = {
        "held": sp.Source(bank, model=model, progress=False, memory="1TB").fit(),
        "read": sp.Source(bank, model=model, progress=False, memory=1).fit(),
    }
    b = torch.cat([block.rows for block in bank.stages[0].iter_rows(0)])  # the bare product has the very same operands
    (n, k), checkpoint = b.shape, bank.final_checkpoint()
    square = torch.randn(2048, 2048)
    features = sources["held"].sketch(Generated(count, k, first=10**9))[0]
    for few in sorted({1, min(8, count), min(64, count), count}):
        rows = features.at(checkpoint)[:few].clone()
        part = sp.QueryFeatures({checkpoint.hash(): rows}, features.ids[:few], features.sketch)
        out = torch.empty(few, n)
        # A sum of float32 reads memory as fast as torch can; rows as they are banked have as many bytes a second.
        calls: list[Callable[[], object]] = [
            b.view(-1).sum,
            lambda: torch.mm(square, square),
            partial(torch.mm, rows, b.T, out=out),
        ]
        for source in sources.values():
            calls += [partial(source.score, part), partial(source.top_k, part, 10)]
        read, large, product, *ours = interleaved(repetitions, *calls)
        flops, speed = 2 * n * k * few, 2 * len(square) ** 3 / large
        print(
            f"{few} queries: memory {b.nbytes / read / 1e9:.1f} GB/s, large products {speed / 1e9:.1f} GFLOP/s; "
            f"the bare float32 product of this shape {product * 1e3:.1f} ms, {flops / product / 1e9:.1f} GFLOP/s"
        )
        for index, (where, source) in enumerate(sources.items()):
            scored, searched = ours[2 * index : 2 * index + 2]
            reading, multiplying = read * source.nbytes() / b.nbytes, flops / speed
            bound = max(reading, multiplying)
            memory = peak_bytes(partial(source.top_k, part, 10))
            shown = "?" if memory is None else f"{memory / 2**20:.0f} MiB"
            print(
                f"  {where:8s} {source.nbytes() / 2**20:6.0f} MiB of rows   score {scored * 1e3:8.1f} ms   "
                f"top_k(10) {searched * 1e3:8.1f} ms: {source.nbytes() / searched / 1e9:5.1f} GB/s, "
                f"{flops / searched / 1e9:5.1f} GFLOP/s   bound ({'memory' if reading > multiplying else 'product'}) "
                f"{bound * 1e3:8.1f} ms, {bound / searched:4.0%} reached   "
                f"peak memory {shown} (Q x N: {few * n * 4 / 2**20:.0f} MiB)",
                flush=True,
            )


def time_codecs(n: int, k: int, repetitions: int) -> None:
    """The ten strongest of random rows in memory, by codec, against a read at the speed of a sum, or large products."""
    counts = (1, 4, 16, 64, 256)
    rows = {name: random_rows(name, n, k) for name in CODECS}
    queries = torch.randn(max(counts), k)
    read, square = rows["float32"][0].view(-1), torch.randn(2048, 2048)
    for count in counts:
        searches = [partial(search, name, queries[:count], *rows[name]) for name in CODECS]
        reading, large, *times = interleaved(repetitions, read.sum, lambda: torch.mm(square, square), *searches)
        speed, flops = read.nbytes / reading, 2 * len(square) ** 3 / large
        print(f"{count} queries: memory {speed / 1e9:.1f} GB/s, large products {flops / 1e9:.0f} GFLOP/s")
        for name, spent in zip(CODECS, times, strict=True):
            nbytes, work = find_codec(name).nbytes(n, k), 2 * n * k * count
            print(
                f"  {name:8s} {nbytes / 2**20:6.0f} MiB of rows   top_k(10) {spent * 1e3:8.1f} ms: "
                f"{n / spent / 1e6:6.2f} million rows/s, {nbytes / spent / 1e9:5.1f} GB/s, "
                f"{nbytes / spent / speed:4.0%} of memory's, {work / spent / 1e9:6.1f} GFLOP/s, "
                f"{work / spent / flops:4.0%} of products'",
                flush=True,
            )


def random_rows(name: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    codec = find_codec(name)
    codes, scale = codec.empty(n, k)
    for part in codes.split(1024):
        part.copy_(torch.randn(part.shape) if codec.dtype.is_floating_point else torch.randint(1, 255, part.shape))
    return codes, torch.rand(n) if scale is None else scale.uniform_()


def search(name: str, queries: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Find each query's ten strongest rows."""
    find_codec(name).search(Strongest(len(queries), 10), queries, codes, scale, first=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--bank", type=Path, help="keep the bank here, and use it if it is there")
    parser.add_argument("--codecs", action="store_true", help="time the codecs alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Linear(args.dim, 1, bias=False)
    print(f"{torch.get_num_threads()} threads, {args.rows} rows, k = {args.dim}, torch {torch.__version__}")
    if args.codecs:
        time_codecs(args.rows, args.dim, args.repetitions)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = args.bank or Path(folder) / "bank"
        trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 1000, lr=0.01)])
        train = Generated(args.rows, args.dim)
        spent = time.perf_counter()
        bank = sp.build(
            model, sp.Regression(), trajectory, train, path, sketch=sp.Sketch(args.dim), batch_size=500
        )  # fmt: skip
        print(f"bank built in {time.perf_counter() - spent:.1f} s; bytes: {bank.nbytes()}")
        time_queries(bank, model, args.queries, args.repetitions)


if __name__ == "__main__":
    main()
