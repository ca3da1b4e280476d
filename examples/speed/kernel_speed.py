"""How fast is each kernel of the sketch and of the search on each backend that is here, beside the machine's limits?

    python examples/speed/kernel_speed.py                        # CPU, or the GPU if there is one; within two minutes
    python examples/speed/kernel_speed.py --device cpu --threads 1 --kernels sparse --json sparse.json
    python examples/speed/kernel_speed.py --build-fast-jl        # on a GPU with nvcc: also fast-jl
    python examples/speed/kernel_speed.py --dtype bfloat16 --batch 512  # on a GPU

Times are medians of interleaved repetitions in this one process. Bytes are those of the gradients' factors, counted
once; operations are multiplications and additions of the gradients and of their projection, without signs and columns.
The bound is the longer of two times: those bytes at the bandwidth of a large copy (bytes read and written), and those
operations at the rate of a large matrix product of the operands' type. Both are medians of the same rounds, and
"reached" is the bound over the time: other work on the machine disturbs it, and may lift it above 100 %; so may
half-precision products that sum to the float32 one, which searches on GPUs use. Where a backend is too slow for the
whole, a slice is timed and scaled up, and the table says so.

Beside this library's backends stand a product with a matrix that is kept ("matmul"), TRAK's BasicProjector where the
package traker is there ("trak"), and fast-jl on CUDA devices.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import source_proj as sp
from source_proj import kernels
from source_proj.kernels import scoring

from _bounds import Machine, Way, interleaved  # isort: skip
from _fast_jl_build import build_fast_jl  # isort: skip

KERNELS = ("sparse", "linear", "linear-tokens", "convolution", "dense", "kronecker", "search")
BACKENDS = ("native", "triton", "torch", "fast-jl")
STORAGES = (torch.float32, torch.float16, torch.int8)
FOUND = 10  # rows that a search keeps
SLICED = 16  # the part of dense signs made by a CPU for a GPU that is timed


@dataclass(frozen=True)
class Case:
    """One kernel: what it is timed on, what it must move (bytes) and compute (operations), and the ways to do it."""

    kernel: str
    shapes: str
    bytes: int
    operations: int
    ways: list[Way]
    product: str | None = None  # the rate that bounds the operations; None: that of the operands' type


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds."""

    kernel: str
    backend: str
    shapes: str
    seconds: float
    bytes: int
    operations: int
    bound: str
    bound_seconds: float
    reached: float
    scaled: int


def sketches(kind: str, a: argparse.Namespace, missing: dict[str, str]) -> Iterator[sp.Sketch]:
    """A sketch for each backend that can serve the kind on the device; for the others, why not goes into missing."""
    for backend in a.backends:
        try:
            sketch = sp.Sketch(a.dim, kind, backend=backend)
            sketch.serving(a.device.type)
            yield sketch
        except ValueError as error:
            if backend != "fast-jl" or kind == "rademacher":
                missing[f"{backend} ({kind})"] = str(error)


def given_rows(kernel: str, kind: str, d: int, a: argparse.Namespace, missing: dict[str, str]) -> Case:
    """Gradients that are there as rows (B, d)."""
    rows = torch.randn(a.batch, d, device=a.device).to(a.dtype)
    out = torch.zeros(a.batch, a.dim, device=a.device)
    ways = []
    for sketch in sketches(kind, a, missing):
        scale = SLICED if kind == "rademacher" and sketch.backend == "torch" and a.device.type == "cuda" else 1
        ways.append(Way(str(sketch.backend), partial(sketch.add_, out, rows[:, : d // scale]), scale))
    operations = a.batch * d
    if kind == "rademacher":
        operations *= 2 * a.dim
        ways += dense_rivals(rows, out, missing)
    return Case(kernel, f"B={a.batch} d={d:,} k={a.dim:,}", rows.nbytes, operations, ways)


def dense_rivals(rows: Tensor, out: Tensor, missing: dict[str, str]) -> list[Way]:
    """What projects rows by a dense matrix elsewhere."""
    (_, d), k = rows.shape, out.shape[1]
    signs = torch.randint(0, 2, (d, k), device=rows.device, dtype=torch.int8).to(rows.dtype).mul_(2).sub_(1)
    ways = [Way("matmul", lambda: torch.addmm(out.to(rows), rows, signs))]
    if rows.dtype != torch.float32:
        return ways
    try:
        from trak.projectors import BasicProjector, ProjectionType
    except ImportError as error:
        missing["trak (rademacher)"] = f"{error}; pip install traker"
        return ways
    projector = BasicProjector(d, k, 0, ProjectionType.rademacher, rows.device)
    return [*ways, Way("trak", lambda: projector.project(rows, model_id=0))]


def linear(kernel: str, kind: str, steps: int, a: argparse.Namespace, missing: dict[str, str]) -> Case:
    """The gradient of a linear layer's weight (o, i), from output gradients and inputs of T steps."""
    o = i = a.features
    left, right = (torch.randn(a.batch, steps, n, device=a.device).to(a.dtype) for n in (o, i))
    out = torch.zeros(a.batch, a.dim, device=a.device)
    ways = [Way(str(s.backend), partial(s.add_outer_, out, left, right, 0)) for s in sketches(kind, a, missing)]
    operations = a.batch * o * i * (2 * steps + 1)
    if kind == "kronecker":
        k_o, k_i = kernels.kronecker_split(a.dim)
        operations = 2 * a.batch * steps * (o * k_o + i * k_i + k_o * k_i)
    shapes = f"B={a.batch} T={steps} {o}x{i} k={a.dim:,}"
    return Case(kernel, shapes, left.nbytes + right.nbytes, operations, ways)


def convolution(kernel: str, a: argparse.Namespace, missing: dict[str, str]) -> Case:
    """The gradient of a 3x3 convolution's weight, stride one, padded by one."""
    c, side = a.channels, a.side
    plane = (side + 2) ** 2
    left = torch.randn(a.batch, c, side * side, device=a.device).to(a.dtype)
    right = torch.randn(a.batch, c, plane, device=a.device).to(a.dtype)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    windows = (row * (side + 2) + column).flatten()
    taps = (torch.arange(3)[:, None] * (side + 2) + torch.arange(3)).flatten()
    out = torch.zeros(a.batch, a.dim, device=a.device)
    ways = [
        Way(str(s.backend), partial(s.add_windows_, out, left, right, taps, windows, 0))
        for s in sketches("sparse", a, missing)
    ]
    operations = a.batch * c * c * 9 * (2 * side * side + 1)
    shapes = f"B={a.batch} {c}x{c}x3x3 on {side}x{side} k={a.dim:,}"
    return Case(kernel, shapes, left.nbytes + right.nbytes, operations, ways)


def searches(kernel: str, a: argparse.Namespace) -> Iterator[Case]:
    """The strongest rows of a matrix B, for few and many queries and each storage of B."""
    scale = torch.rand(a.rows, device=a.device)
    for storage in STORAGES:
        rows = torch.randint(-127, 128, (a.rows, a.dim), device=a.device, dtype=torch.int8).to(storage)
        for count in a.queries:
            queries = torch.randn(count, a.dim, device=a.device)
            ways = [
                Way(backend, partial(scoring.top_k, queries, rows, FOUND, scale, backend=backend))
                for backend in scoring.scoring_backends(a.device.type)
                if backend in a.backends
            ]
            name = str(storage).removeprefix("torch.")
            shapes = f"Q={count:,} N={a.rows:,} {name} k={a.dim:,}"
            yield Case(kernel, shapes, rows.nbytes, 2 * count * rows.numel(), ways, "float32 product")


def cases(a: argparse.Namespace, missing: dict[str, str]) -> Iterator[Case]:
    """The kernels that were asked for, one at a time: their inputs need not fit into memory together."""
    make: dict[str, Callable[[str], Case]] = {
        "sparse": lambda name: given_rows(name, "sparse", a.coordinates, a, missing),
        "linear": lambda name: linear(name, "sparse", 1, a, missing),
        "linear-tokens": lambda name: linear(name, "sparse", a.steps, a, missing),
        "convolution": lambda name: convolution(name, a, missing),
        "dense": lambda name: given_rows(name, "rademacher", a.dense_coordinates, a, missing),
        "kronecker": lambda name: linear(name, "kronecker", a.steps, a, missing),
    }
    for name in a.kernels:
        yield from searches(name, a) if name == "search" else [make[name](name)]


def measure(case: Case, machine: Machine, a: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """The lines of one kernel, and the machine's rates in the same rounds."""
    times = interleaved([*machine.ways, *case.ways], a.repetitions, a.device)
    rates, product = machine.rates(times), case.product or f"{str(a.dtype).removeprefix('torch.')} product"
    bounds = {"copy": case.bytes / rates["copy"], product: case.operations / rates[product]}
    bound = max(bounds, key=lambda name: bounds[name])
    rows = []
    for way in case.ways:
        taken = times[way.backend]
        work = (case.bytes, case.operations, bound, bounds[bound], bounds[bound] / taken)
        rows.append(Row(case.kernel, way.backend, case.shapes, taken, *work, way.scale))
    return rows, rates


def table(rows: list[Row]) -> Table:
    """All lines for people."""
    made = Table(box=None, header_style="bold")
    for name in ("kernel", "backend", "sizes"):
        made.add_column(name, no_wrap=True)
    for name in ("ms", "GB/s", "GFLOP/s", "bound, ms", "reached"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("bound by", no_wrap=True)
    for row in rows:
        rates = (f"{row.bytes / row.seconds / 1e9:.2f}", f"{row.operations / row.seconds / 1e9:.1f}")
        times = (f"{row.seconds * 1e3:.2f}{'*' if row.scaled > 1 else ''}", *rates, f"{row.bound_seconds * 1e3:.2f}")
        made.add_row(row.kernel, row.backend, row.shapes, *times, f"{row.reached:.1%}", row.bound)
    return made


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; of two defaults the first is for CPUs, the second for GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, help="default: cuda if it is there")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the second: on a GPU")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=64, help="examples, B")
    parser.add_argument("--dim", type=int, default=4096, help="numbers per sketch, k; fast-jl wants a multiple of 512")
    parser.add_argument("--coordinates", type=int, help="d of the sparse map; default: 1,000,000, or 2^24")
    parser.add_argument("--dense-coordinates", type=int, help="d of the dense one; default: 2^13, or 2^20")
    parser.add_argument("--features", type=int, help="of the linear layer; default: 512, or 4,096")
    parser.add_argument("--steps", type=int, default=128, help="T of linear-tokens and kronecker")
    parser.add_argument("--channels", type=int, default=128, help="of the convolution")
    parser.add_argument("--side", type=int, default=16, help="of its images")
    parser.add_argument("--rows", type=int, help="of the search, N; default: 30,000, or 400,000")
    parser.add_argument("--queries", nargs="+", type=int, default=[1, 8, 64, 1000], help="of the search, Q")
    parser.add_argument("--copied", type=int, default=1 << 25, help="numbers of the copy that gives the bandwidth")
    parser.add_argument("--product", type=int, help="rows of the product that gives the rate; default: 1,024, or 8,192")
    parser.add_argument("--build-fast-jl", action="store_true", help="download fast-jl's source and build it here")
    parser.add_argument("--json", type=Path, help="write everything to this file, too")
    a = parser.parse_args(arguments)
    a.device = a.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = a.device.type == "cuda"
    if a.dtype != "float32" and not on_gpu:
        parser.error(f"--dtype {a.dtype} needs a CUDA device: on a CPU every kernel works in float32")
    a.dtype = getattr(torch, a.dtype)
    sizes = {"coordinates": (10**6, 1 << 24), "dense_coordinates": (1 << 13, 1 << 20)}
    sizes |= {"features": (512, 4096), "product": (1024, 8192), "rows": (30_000, 400_000)}
    for name, defaults in sizes.items():
        setattr(a, name, getattr(a, name) or defaults[on_gpu])
    return a


def main(arguments: list[str] | None = None) -> None:
    a = parse(arguments)
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    console = Console(width=None if Console().is_terminal else 140)
    missing: dict[str, str] = {}
    name = torch.cuda.get_device_name(a.device) if a.device.type == "cuda" else f"CPU, {a.threads} threads"
    rows: list[Row] = []
    every: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        if a.build_fast_jl:
            build_fast_jl(Path(folder))
        machine = Machine(a.device, a.copied, a.product)
        for case in cases(a, missing):
            found, rates = measure(case, machine, a)
            rows += found
            every.append(rates)
    rates = {key: median(one[key] for one in every) for key in every[0]}
    units = {key: "GB/s" if key == "copy" else "GFLOP/s" for key in rates}
    console.print(f"{name}: " + ", ".join(f"{key} {rate / 1e9:,.1f} {units[key]}" for key, rate in rates.items()))
    console.print(table(rows))
    if any(row.scaled > 1 for row in rows):
        console.print(f"* timed on 1/{SLICED} of the coordinates and scaled up")
    for what, why in missing.items():
        console.print(f"not here: {what}: {why}", highlight=False, markup=False)
    if a.json:
        content = {"device": name, "torch": torch.__version__, "rates": rates, "missing": missing}
        a.json.write_text(json.dumps({**content, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
