"""How long does a fit take beside the build, and beside the one product that it cannot do without?

    python examples/speed/fit.py                                    # 6,000 rows, k = 1,024 to 16,384; minutes
    python examples/speed/fit.py --rows 1000000 --dims 1024 --checkpoints 1 --queries 1000 --input 1024

Each line is a bank of a small MLP on generated data, built and fitted in this process. Times are CPU time of all
threads, which a busy machine changes least. The bound is Ĥ itself: N C k² multiplications and additions (half of a
full product, as Ĥ is symmetric), and the k³/3 of its Cholesky factor, at the speed of a large float32 product; of fewer
rows than columns, N C and k exchanged; above k = 4,096 those of blocks of 4,096 columns, which ``--blocks 1`` joins.
Eigenvectors, which are computed for k up to 1,024, are not in the bound. Peaks are the process's resident memory.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from score import Generated
from torch import nn

import source_proj as sp


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def product_rate() -> float:
    """Operations a CPU second of a large float32 product."""
    a = torch.randn(2048, 2048)
    torch.mm(a, a)
    return 2 * len(a) ** 3 / min(cpu_seconds(lambda: torch.mm(a, a)) for _ in range(3))


def measure(rows: int, dim: int, checkpoints: int, inputs: int, queries: int, blocks: int | None, folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 1))
    points = [sp.Checkpoint(model.state_dict(), 1000 * (c + 1), lr=0.01) for c in range(checkpoints)]
    train = Generated(rows, inputs)
    build = partial(sp.build, model, sp.Regression(), sp.Trajectory(points), train, folder / "bank", progress=False)
    built = cpu_seconds(lambda: build(sketch=sp.Sketch(dim), batch_size=64))
    bank = sp.open(folder / "bank")
    source = sp.Source(bank, model=model, blocks=blocks, progress=False)
    fitted = cpu_seconds(source.fit)
    peak, rate = peak_gigabytes(), product_rate()
    count = blocks or -(-dim // 4096)
    few, many = sorted((rows * checkpoints, dim // count))
    bound = count * (many * few**2 + few**3 / 3) / rate
    banked = sum(size for kind, size in bank.nbytes().items() if kind != "fits")
    print(
        f"{rows:8d} rows x {checkpoints}, k = {dim:6d}: build {built:7.1f} s, fit {fitted:7.1f} s, "
        f"{fitted / built:5.2f} of it, bound {bound:7.1f} s ({rate / 1e9:.0f} GFLOP/s); bank {banked / 1e6:7.1f} MB, "
        f"fits {bank.fits.nbytes() / 1e6:6.1f} MB; peak {peak:.2f} GB",
        flush=True,
    )
    features = source.sketch(Generated(queries, inputs, first=10**9))
    searched = cpu_seconds(lambda: source.top_k(features, 10))
    again = cpu_seconds(lambda: source.top_k(features, 10))
    print(f"{'':10s}top_k of {queries} queries {searched:.2f} s, again {again:.2f} s; peak {peak_gigabytes():.2f} GB")
    scored = cpu_seconds(lambda: source.score(features, out=folder / "scores.zarr"))
    print(f"{'':10s}score of {queries} queries to zarr {scored:.2f} s; peak {peak_gigabytes():.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[6000])
    parser.add_argument("--dims", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--checkpoints", type=int, default=6)
    parser.add_argument("--input", type=int, default=784, help="features of an example")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--blocks", type=int, help="sketches that the bank's is taken as; default: of 4,096 columns")
    args = parser.parse_args()
    for rows in args.rows:
        for dim in args.dims:
            with tempfile.TemporaryDirectory() as folder:
                measure(rows, dim, args.checkpoints, args.input, args.queries, args.blocks, Path(folder))


if __name__ == "__main__":
    main()
