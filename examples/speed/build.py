"""What does a build cost? One checkpoint's sketching pass against plain training's forward + backward.

    python examples/speed/build.py                             # three models on the CPU, minutes
    python examples/speed/build.py --models resnet9 --batch 32 --repetitions 9
    python examples/speed/build.py --models minilm decoder-hf vit mixture  # models of transformers: the extra hf
    python examples/speed/build.py --models lstm gru encoder   # torch's own recurrent layers and attention
    python examples/speed/build.py --sketch sparse tensor      # kinds of sketches beside each other
    python examples/speed/build.py --metric exact factored     # Adam's metric beside none
    python examples/speed/build.py --device cuda --autocast bfloat16 --models resnet9 gpt2

Ways through the same batch, in one process, each timed in turn, medians over the repetitions:

* plain: forward and backward of the mean loss, as in training (BatchNorm in evaluation mode);
* sketch: values and sketched per-example gradients by the hook path, for each kind of sketch, and with ``--metric`` in
  a metric of random numbers too: one for each weight (exact), or two vectors for each matrix (factored);
* vmap: per-example gradients by `vmap(grad)`, then a dense Rademacher projection, which is what TRAK does. On a CPU
  this takes minutes per batch, so gradients are timed on a few examples and the projection on a slice of the
  coordinates, and both are scaled up.

Beside the times stands the physical bound: the floating point operations of plain training over the best rate that a
matrix product or a convolution reaches in this process, plus one read of the per-example gradients at the bandwidth of
a copy. Peak memory is that of three passes: on a CPU what the system counts of a process of its own, less what
imports and code take, once with blocks of 1 MB and more taken from the system one by one, and once in glibc's heap
as it is, whose fragments, up to half as much again, depend on the order of sizes; on a GPU what torch allocated, the
model and the batch included. With ``--autocast`` both passes, and the best rate, are in that type.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import source_proj as sp
from source_proj.bank.build.data import to_device
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.sketch.projections import kinds
from source_proj.trajectory import Scale

from _bounds import Way, interleaved, seconds  # isort: skip
from _models import Decoder, Encoder, Recurrent, ResNet9, Stack, gpt2, gpt2_of_transformers, minilm, mixture, mlp, vit  # isort: skip

DIM = 4096
PLAIN = "plain"
HEAPS = {"blocks apart": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}, "glibc's heap": {}}
METRICS = ("exact", "factored")
CPU = torch.device("cpu")
VMAP_EXAMPLES = 2
PROJECTED = 1 << 17  # coordinates on which the dense projection is timed


@dataclass(frozen=True)
class Subject:
    """A model with its batches, its task and the loss that plain training takes the mean of."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], object]
    size: int
    task: sp.Task
    loss: Callable[[nn.Module, Any], Tensor]


def classified(*shape: int) -> Callable[[int], object]:
    return lambda size: (torch.randn(size, *shape), torch.randint(0, 10, (size,)))


def sentences(vocab: int, length: int) -> Callable[[int], object]:
    def make(size: int) -> object:
        ids = torch.randint(0, vocab, (size, length))
        return {"input_ids": ids, "labels": ids}

    return make


def padded(size: int) -> object:
    """Sentences of 8 to 64 words, padded."""
    ids, length = torch.randint(1000, 30522, (size, 64)), torch.randint(8, 65, (size, 1))
    there = torch.arange(64) < length
    return {"input_ids": ids * there, "attention_mask": there.long(), "labels": torch.randint(0, 2, (size,))}


def spoken(vocab: int, length: int) -> Callable[[int], object]:
    return lambda size: (torch.randint(0, vocab, (size, length)), torch.randint(0, 10, (size,)))


def pictures(size: int) -> object:
    return {"pixel_values": torch.randn(size, 3, 32, 32), "labels": torch.randint(0, 10, (size,))}


def hf_picture_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])


def hf_class_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])


def hf_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"], use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


SUBJECTS = {
    "mlp": Subject(mlp, classified(784), 64, sp.Classification(), class_loss),
    "resnet9": Subject(ResNet9, classified(3, 32, 32), 64, sp.Classification(), class_loss),
    "decoder": Subject(Decoder, sentences(4096, 128), 32, sp.CausalLM(), token_loss),
    "minilm": Subject(minilm, padded, 32, sp.Classification(), hf_class_loss),
    "vit": Subject(vit, pictures, 32, sp.Classification(), hf_picture_loss),
    "encoder": Subject(Encoder, spoken(4096, 64), 32, sp.Classification(), class_loss),
    "lstm": Subject(partial(Recurrent, nn.LSTM), sentences(256, 64), 32, sp.CausalLM(), token_loss),
    "gru": Subject(partial(Recurrent, nn.GRU), sentences(256, 64), 32, sp.CausalLM(), token_loss),
    "decoder-hf": Subject(gpt2_of_transformers, sentences(4096, 128), 32, sp.CausalLM(), hf_token_loss),
    "mixture": Subject(mixture, sentences(4096, 128), 16, sp.CausalLM(), hf_token_loss),
    "stack": Subject(Stack, classified(128, 4096), 16, sp.Classification(), class_loss),
    "gpt2": Subject(gpt2, sentences(50257, 512), 16, sp.CausalLM(), token_loss),
}


def medians(repetitions: int, device: torch.device, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, called in turn after one call to warm up."""
    ways = [Way(str(index), function) for index, function in enumerate(functions)]
    return list(interleaved(ways, repetitions, device).values())


def resident(field: str) -> int:
    """VmRSS, or VmHWM for the largest so far, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def print_peak(name: str, way: str, size: int, autocast: str | None) -> None:
    """In a process of its own: the largest memory during three passes, less what imports and code take."""

    def run(examples: int) -> None:
        passes = Passes(SUBJECTS[name], examples, CPU, autocast, [] if way == PLAIN else [way])
        for _ in range(3):
            passes.ways()[way]()

    run(1)  # reads the pages of torch's code that the way needs
    before = resident("VmRSS")
    run(size)
    print(resident("VmHWM") - before)


def peak_bytes(name: str, way: str, size: int, a: argparse.Namespace, heap: dict[str, str]) -> int:
    """What `print_peak` prints."""
    options = {"threads": a.threads, "batch": size, "models": name, "peak": way}
    options |= {"autocast": a.autocast} if a.autocast else {}
    command = [sys.executable, __file__, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    environment = os.environ | heap
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def peak_on_gpu(function: Callable[[], None], device: torch.device) -> int:
    """Most that torch had allocated during three passes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        function()
    return torch.cuda.max_memory_allocated(device)


class Passes:
    """A model, one batch and an engine for each sketching way, made the same way every time.

    A way is a kind of sketch, or a kind and a metric: "tensor", "tensor-factored".
    """

    def __init__(
        self, subject: Subject, size: int, device: torch.device, autocast: str | None, sketches: list[str]
    ) -> None:
        torch.manual_seed(0)
        self.subject, self.device = subject, device
        self.model = subject.model().eval().to(device)
        self.space = ParameterSpace.from_model(self.model)
        self.engines = {
            way: gradient_engine(self.model, self.space, sp.Sketch(DIM, way.split("-")[0]), autocast=autocast)
            for way in sketches
        }
        metrics = {way.partition("-")[2] for way in sketches}
        self.scales = {metric: random_scale(self.space, metric, device) for metric in metrics}
        self.batch = to_device(subject.batch(size), device)
        self.autocast = partial(torch.autocast, device.type, getattr(torch, autocast)) if autocast else nullcontext

    def plain(self) -> None:  # noqa: D102
        self.model.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.subject.loss(self.model, self.batch)
        loss.backward()

    def sketch(self, way: str) -> None:  # noqa: D102
        self.model.zero_grad(set_to_none=True)
        scales = [self.scales[way.partition("-")[2]]]
        self.engines[way].sketch_scaled(self.subject.task.output, self.batch, scales)

    def ways(self) -> dict[str, Callable[[], None]]:
        """The passes that are compared: plain, and the sketching ones."""
        return {PLAIN: self.plain, **{way: partial(self.sketch, way) for way in self.engines}}


def random_scale(space: ParameterSpace, metric: str, device: torch.device) -> Scale | None:
    """A metric of random numbers; None without one."""
    if not metric:
        return None
    factored = metric == "factored"
    sizes = [s[0] + prod(s[1:]) if factored and len(s) > 1 else prod(s) for s in space.shapes]
    return Scale(torch.rand(sum(sizes), device=device) + 0.5, space, factored=factored)


def machine(device: torch.device, autocast: str | None) -> tuple[float, float]:
    """Best floating point rate of a product and a convolution (operations/s), and bandwidth of a copy (bytes/s)."""
    n, images = (8192, 512) if device.type == "cuda" else (2048, 16)
    dtype = getattr(torch, autocast or "float32")
    a, out = torch.randn(n, n, device=device, dtype=dtype), torch.empty(n, n, device=device, dtype=dtype)
    x, w = (torch.randn(*s, device=device, dtype=dtype) for s in ((images, 256, 16, 16), (256, 256, 3, 3)))
    source, target = torch.randn(1 << 25, device=device), torch.empty(1 << 25, device=device)

    def fastest(function: Callable[[], object]) -> float:
        return min(seconds(function, device) for _ in range(20))

    with torch.no_grad():
        product = fastest(lambda: torch.mm(a, a, out=out))
        convolution = fastest(lambda: F.conv2d(x, w, padding=1))
        copy = fastest(lambda: target.copy_(source))
    rate = max(2 * n**3 / product, 2 * images * 256 * 256 * 9 * 256 / convolution)
    return rate, 2 * source.nbytes / copy


def vmap_seconds(passes: Passes, size: int) -> float:
    """`vmap(grad)` and a dense projection of a batch, scaled up from a few examples and a slice of coordinates."""
    space = passes.space
    dense = gradient_engine(passes.model, space, sp.Sketch(space.size, "identity"), method="general")
    device = passes.device
    batch = to_device(passes.subject.batch(VMAP_EXAMPLES), device)
    (gradients,) = medians(3, device, lambda: dense.sketch(passes.subject.task.output, batch))
    rademacher, rows = sp.Sketch(DIM, "rademacher"), torch.randn(size, min(PROJECTED, space.size), device=device)
    out = torch.zeros(size, DIM, device=device)
    (projection,) = medians(3, device, lambda: rademacher.add_(out, rows))
    return gradients * size / VMAP_EXAMPLES + projection * space.size / rows.shape[1]


def measure(name: str, size: int, a: argparse.Namespace, rate: float, bandwidth: float) -> None:
    """Print one model's ratios."""
    sketches = [f"{kind}{metric}" for kind in a.sketch for metric in ("", *(f"-{metric}" for metric in a.metric))]
    passes = Passes(SUBJECTS[name], size, a.device, a.autocast, sketches)
    d, ways = passes.space.size, passes.ways()
    with FlopCounterMode(display=False) as counter:
        passes.plain()
    times = dict(zip(ways, medians(a.repetitions, a.device, *ways.values()), strict=True))
    plain = times.pop(PLAIN)
    bound = counter.get_total_flops() / rate + 4 * size * d / bandwidth
    if a.device.type == "cuda":
        memory = {"torch": {way: peak_on_gpu(function, a.device) for way, function in ways.items()}}
    else:
        memory = {heap: {way: peak_bytes(name, way, size, a, set_) for way in ways} for heap, set_ in HEAPS.items()}
    paths = {engine.method: engine.reason for engine in passes.engines.values()}
    print(f"{name}: d = {d:,}, batch {size}, k = {DIM:,}, {paths}")
    print(
        f"  plain forward + backward      {plain * 1e3:9.1f} ms  {counter.get_total_flops() / plain / 1e9:.0f} GFLOP/s"
    )
    print(f"    physical bound of a pass    {bound * 1e3:9.1f} ms")
    for way, sketch in times.items():
        print(f"  sketching pass, {way:15} {sketch * 1e3:9.1f} ms  {sketch / plain:.2f} of plain, ", end="")
        print(f"{sketch / size / d * 1e9:.2f} ns per coordinate and example, {sketch / bound:.2f} of the bound")
        for heap, peaks in memory.items():
            peak = peaks[way] / 2**20
            print(f"    peak memory, {heap:14} {peak:9.0f} MiB {peaks[way] / peaks[PLAIN]:.2f} of plain")
    if a.vmap:
        slow = vmap_seconds(passes, size)
        print(f"  vmap(grad) + dense projection {slow * 1e3:9.0f} ms  {slow / plain:.0f} of plain")
        print(f"    scaled up from gradients of {VMAP_EXAMPLES} examples and {min(PROJECTED, d):,} coordinates")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=["mlp", "resnet9", "decoder"])
    parser.add_argument("--batch", type=int, help="examples per batch; default: 64, for the decoder 32, for gpt2 16")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--autocast", choices=("bfloat16", "float16"))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sketch", nargs="+", choices=kinds(), default=["tensor"], help="kinds of sketches")
    parser.add_argument("--metric", nargs="+", choices=METRICS, default=[], help="metrics beside the plain gradients")
    parser.add_argument("--vmap", action=argparse.BooleanOptionalAction, default=True, help="time vmap(grad), too")
    parser.add_argument("--peak", metavar="WAY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = {name: arguments.batch or SUBJECTS[name].size for name in arguments.models}
    if arguments.peak:
        print_peak(arguments.models[0], arguments.peak, sizes[arguments.models[0]], arguments.autocast)
        return
    rate, bandwidth = machine(arguments.device, arguments.autocast)
    on_gpu = arguments.device.type == "cuda"
    where = torch.cuda.get_device_name(arguments.device) if on_gpu else f"{arguments.threads} threads"
    print(f"{where}: {rate / 1e9:.0f} GFLOP/s in {arguments.autocast or 'float32'}, copy {bandwidth / 1e9:.0f} GB/s, ")
    served = {kind: sp.Sketch(DIM, kind).serving(arguments.device.type) for kind in arguments.sketch}
    print(f"backends: {served}\n")
    for name, size in sizes.items():
        measure(name, size, arguments, rate, bandwidth)


if __name__ == "__main__":
    main()
