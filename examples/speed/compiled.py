"""What the sketch's Triton kernels become for a GPU, without having one: registers, spills, telling instructions.

    python examples/speed/compiled.py [--dim 4096] [--capability 90] [--only linear] [--keep DIRECTORY]

The library's own launchers get tensors in main memory, and what they would launch is compiled instead, so that block
sizes, types and alignments are those of real calls; the assembler comes with triton. Columns:

* registers of a thread; spills: instructions that reach a thread's stack; shared: bytes of a program; resident:
  programs that a multiprocessor has room for;
* wide: loads and copies of main memory of 16 bytes a thread, out of all of them; tensor: instructions of tensor cores;
  barriers;
* loop: instructions of the longest loop; bound, for given rows: bytes of input a second that issuing that loop allows
  at most, on a GPU of 132 multiprocessors at 1.7 GHz, to be held beside the bandwidth of its memory.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from source_proj import kernels

__all__ = ["Compiled", "compiled", "launches", "main"]

SHARED = {80: 167936, 90: 233472}  # bytes of a multiprocessor
REGISTERS, THREADS, PROCESSORS, CLOCK = 65536, 2048, 132, 1.7e9
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of a warp a cycle

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);")


@dataclass(frozen=True)
class Compiled:
    """One kernel of one launch: what the assembler made of it."""

    name: str
    warps: int
    registers: int
    shared: int
    resident: int
    count: Counter[str]
    loop: Counter[str]

    def instructions(self, *starts: str, having: str = "") -> int:
        """How many instructions' names start with one of the given ones and hold another part."""
        return sum(n for name, n in self.count.items() if name.startswith(starts) and having in name)

    @property
    def spills(self) -> int:
        """Instructions that reach a thread's stack."""
        return self.instructions("LDL", "STL")

    @property
    def tensor(self) -> int:
        """Instructions of tensor cores."""
        return self.instructions("HMMA", "HGMMA")

    @property
    def wide(self) -> int:
        """Loads and copies from main memory of 16 bytes a thread."""
        return self.instructions("LDG", having=".128")

    def bound(self, inputs: int) -> float:
        """Inputs a second that the loop's instructions allow, for a program that handles so many in one turn."""
        cycles = self.loop.total() * self.warps / SCHEDULERS
        return PROCESSORS * CLOCK * inputs / cycles

    def row(self) -> str:
        """The columns that this module's text explains."""
        loads = self.instructions("LDG")
        return (
            f"{self.name:13} {self.registers:9} {self.spills:6} {self.shared:7} {self.resident:8} "
            f"{f'{self.wide}/{loads}':>7} {self.tensor:6} {self.instructions('BAR'):8} {self.loop.total():5}"
        )


class _NoDevice:
    """What triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """For which processor to compile."""
        return self._target

    def get_current_device(self) -> int:
        """One device for each target: triton keeps what it compiled by device."""
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        del device
        return 0


@contextmanager
def _compiling(capability: int) -> Iterator[dict[str, Any]]:
    """Within, launches compile and do not run; yields their kernels by name."""
    found: dict[str, Any] = {}
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        found[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)
        return found[self.__name__]

    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    triton.runtime.driver.set_active(_NoDevice(capability))  # for the rest of this process
    with (
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        yield found


def tensor_launches(dim: int, dtype: torch.dtype) -> list[Callable[[], None]]:
    """Those of the tensor sketch for a layer of GPT-2: given rows, what surrounds the transforms, and an embedding."""
    matrix = kernels.TensorMap(dim, 1, 768, (768, 2304))

    def tensor() -> None:
        rows = torch.zeros(32, 768 * 64, dtype=dtype)
        kernels.tensor_add_(torch.zeros(32, dim), rows, 768, matrix, backend="triton")

    def transforms() -> None:
        left, right = torch.zeros(4, 16, 768, dtype=dtype), torch.zeros(4, 16, 2304, dtype=dtype)
        kernels.tensor_add_outer_(torch.zeros(4, dim), left, right, matrix, backend="triton", spectral=True)

    def table() -> None:
        index, values = torch.arange(4096), torch.zeros(4096, 768, dtype=dtype)
        words = kernels.TensorMap(dim, 1, 768, (4096, 768))
        kernels.tensor_add_at_(torch.zeros(8, dim), values, index % 8, index, words, backend="triton")

    return [tensor, transforms, table]


def sparse_launches(dim: int, dtype: torch.dtype) -> list[Callable[[], None]]:
    """Given rows, layers of GPT-2 and ResNet, and dense signs. Layers with several steps multiply by cuBLAS."""
    sparse: dict[str, Any] = {"seed": 1, "backend": "triton"}

    def rows() -> None:
        kernels.sparse_add_(torch.zeros(32, dim), torch.zeros(32, 64 * dim, dtype=dtype), 0, **sparse)

    def step() -> None:
        left, right = torch.zeros(32, 1, 768, dtype=dtype), torch.zeros(32, 1, 768, dtype=dtype)
        kernels.sparse_add_outer_(torch.zeros(32, dim), left, right, 768, **sparse)

    def columns() -> None:
        left, right = torch.zeros(8, 128, 256, dtype=dtype), torch.zeros(8, 128, 18 * 18, dtype=dtype)
        taps = (18 * torch.arange(3)[:, None] + torch.arange(3)).flatten()
        windows = (18 * torch.arange(16)[:, None] + torch.arange(16)).flatten()
        kernels.sparse_add_windows_(torch.zeros(8, dim), left, right, taps, windows, 0, **sparse)

    def embedding() -> None:
        index = torch.arange(4096)
        given = (torch.zeros(4096, 768, dtype=dtype), index % 8, 768 * index)
        kernels.sparse_add_at_(torch.zeros(8, dim), *given, **sparse)

    def dense() -> None:
        kernels.rademacher_add_(torch.zeros(128, dim), torch.zeros(128, 16 * dim, dtype=dtype), 0, **sparse)

    return [rows, step, columns, embedding, dense]


def norm_launches(dtype: torch.dtype) -> list[Callable[[], None]]:
    """Sums of a layer norm of GPT-2 and of a batch norm of ResNet."""
    from source_proj.kernels.triton_norms import channel_sums_triton, row_sums_triton

    def along() -> None:
        x, g = (torch.zeros(16, 512, 768, dtype=dtype) for _ in range(2))
        row_sums_triton(x, g, 1e-5, centred=True)

    def channels() -> None:
        x, g = (torch.zeros(16, 128, 1024, dtype=dtype) for _ in range(2))
        channel_sums_triton(x, g, torch.zeros(128), torch.ones(128))

    return [along, channels]


def launches(dim: int) -> dict[str, Callable[[], None]]:
    """The shapes that matter, of float32 and bfloat16, by name."""
    return {
        f"{launch.__name__} {name}": launch
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for launch in (*sparse_launches(dim, dtype), *tensor_launches(dim, dtype), *norm_launches(dtype))
    }


def compiled(launch: Callable[[], None], capability: int, keep: Path | None = None) -> list[Compiled]:
    """The kernels that a launch would have run, for compute capability 80 (8.0) or 90, but the one that adds partials.

    With a directory to keep them in, their assembly is written there.
    """
    with _compiling(capability) as found:
        launch()
    return [_inspect(name, kernel, capability, keep) for name, kernel in found.items() if "partials" not in name]


def _inspect(name: str, kernel: Any, capability: int, keep: Path | None) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage, assembly = _tool("--dump-resource-usage", file), _tool("-sass", file)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}.{capability}.sass").write_text(assembly)
    used = re.search(r"REG:(\d+)", usage)
    if used is None:
        raise RuntimeError(f"cuobjdump says {usage!r}, which names no registers; another version of triton brings it")
    registers, warps, shared = int(used[1]), kernel.metadata.num_warps, kernel.metadata.shared
    count, loop = _counts(assembly)
    # A warp gets registers in units of 256, and the driver keeps a kilobyte of shared memory for each program.
    by_registers = REGISTERS // (-(-32 * registers // 256) * 256 * warps)
    resident = min(by_registers, SHARED[capability] // (shared + 1024), THREADS // (32 * warps))
    return Compiled(name.strip("_"), warps, registers, shared, resident, count, loop)


def _counts(assembly: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions of the kernel, and of its longest loop, by name."""
    lines = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(assembly)]
    addresses = {at: index for index, (at, _, _) in enumerate(lines)}
    first, last = 0, 0
    for index, (_, name, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target:
            begin = addresses.get(int(target[1], 16), index)
            if index - begin > last - first:
                first, last = begin, index + 1
    names = [name for _, name, _ in lines if name != "NOP"]
    return Counter(names), Counter(name for _, name, _ in lines[first:last])


def _tool(option: str, file: Path) -> str:
    """Output of cuobjdump."""
    command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump", option, file]
    output: str = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
    return output


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every capability."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=4096, help="columns of the sketch, k")
    parser.add_argument("--capability", type=int, choices=sorted(SHARED), action="append", help="default: all")
    parser.add_argument("--only", default="", help="only launches whose name holds this")
    parser.add_argument("--keep", type=Path, help="directory for the assembly")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1, so nothing is compiled; unset it")
    for capability in options.capability or sorted(SHARED):
        print(f"compute capability {capability / 10}, k = {options.dim}")
        print(f"{'launch':20} {'kernel':13} registers spills  shared resident    wide tensor barriers  loop")
        for name, launch in launches(options.dim).items():
            if options.only not in name:
                continue
            keep = None if options.keep is None else options.keep / name.replace(" ", "_")
            for kernel in compiled(launch, capability, keep):
                bound = ""
                if name.startswith("rows"):
                    inputs = options.dim * (2 if options.dim <= 4096 else 1)  # of one turn: of two examples, or one
                    size = 4 if "float32" in name else 2
                    bound = f"  bound {kernel.bound(inputs) * size / 1e12:.1f} TB/s"
                print(f"{name:20} {kernel.row()}{bound}")


if __name__ == "__main__":
    main()
