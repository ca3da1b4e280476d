"""Times of interleaved calls, and the rates of the machine that bound them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

__all__ = ["Machine", "Way", "interleaved", "seconds"]


@dataclass(frozen=True)
class Way:
    """One way to compute a kernel: call run; the time counts scale times."""

    backend: str
    run: Callable[[], object]
    scale: int = 1


class Machine:
    """The rates that bound every kernel, measured in the rounds of the kernels themselves."""

    def __init__(self, device: torch.device, copied: int, product: int) -> None:
        self.source = torch.randn(copied, device=device)
        target = torch.empty_like(self.source)
        a, out = torch.randn(product, product, device=device), torch.empty(product, product, device=device)
        self.work = {"copy": 2 * self.source.nbytes, "float32 product": 2 * product**3}
        self.ways = [
            Way("copy", lambda: target.copy_(self.source)),
            Way("float32 product", lambda: torch.mm(a, a, out=out)),
        ]
        if device.type == "cuda":
            short = a.bfloat16()
            self.work["bfloat16 product"] = 2 * product**3
            self.ways.append(Way("bfloat16 product", lambda: torch.mm(short, short)))

    def rates(self, times: dict[str, float]) -> dict[str, float]:
        """Bytes or operations per second, from the seconds of each way."""
        return {name: work / times[name] for name, work in self.work.items()}


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time of one call, until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(ways: list[Way], repetitions: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each way, called in turn after one call that warms up."""
    for way in ways:
        way.run()
    rounds = [[seconds(way.run, device) * way.scale for way in ways] for _ in range(repetitions)]
    return {way.backend: median(times) for way, times in zip(ways, zip(*rounds, strict=True), strict=True)}
