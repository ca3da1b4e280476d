"""From which layer on do transforms cost less than outer products? The tensor sketch's two routes and the sparse map.

    python examples/speed/tensor_routes.py                           # a minute on one core
    python examples/speed/tensor_routes.py --dim 1024 --steps 1 16 128
    python examples/speed/tensor_routes.py --device cuda --widths 768 2048 4096 --steps 128 --batch 8

Gradients of square linear layers, from output gradients and inputs of some steps (tokens); microseconds an example,
medians of interleaved calls in one process. The last column is the route that the sketch takes by itself.
"""

import argparse
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from source_proj import kernels

from _bounds import Way, interleaved  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    backend = kernels.choose_backend(None, a.device.type)
    table = Table(title=f"microseconds an example, k = {a.dim}, batch {a.batch}, {backend}", box=None)
    for name in ("steps", "width", "sparse", "outer", "transforms", "chosen"):
        table.add_column(name, justify="right")
    for steps in a.steps:
        for width in a.widths:
            left, right = (torch.randn(a.batch, steps, width, device=a.device) for _ in range(2))
            out, matrix = torch.zeros(a.batch, a.dim, device=a.device), kernels.TensorMap(a.dim, 1, 0, (width, width))
            add = partial(kernels.tensor_add_outer_, out, left, right, matrix, backend=backend)
            sparse = partial(kernels.sparse_add_outer_, out, left, right, 0, seed=1, backend=backend)
            ways = [Way("sparse", sparse), Way("outer", partial(add, spectral=False))]
            ways += [Way("transforms", partial(add, spectral=True)), Way("chosen", add)]
            times = interleaved(ways, a.repetitions, a.device)
            table.add_row(str(steps), str(width), *(f"{1e6 * times[way.backend] / a.batch:.1f}" for way in ways))
    Console().print(table)


if __name__ == "__main__":
    main()
