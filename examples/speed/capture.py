"""What does capture cost? A training step that is captured against the same step alone.

    python examples/speed/capture.py                       # a decoder of GPT-2's shape, small, and an MLP: minutes
    python examples/speed/capture.py --models mlp --dim 1024 --steps 30

Both steps in one process and in turn, each with forward and backward pass, AdamW's update, and zero_grad; medians of
the processor's time over the last two thirds of the steps, which other processes disturb less than the clock, and
which are past the audits of the first steps. "curvature" is the part that the k x k sum takes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from build import Decoder, mlp
from torch import Tensor, nn

import source_proj as sp
from source_proj.bank.capture.sums import SegmentSums


def _language(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _classes(labels: Tensor, model: nn.Module, inputs: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


def cases(
    batch: int | None,
) -> dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[nn.Module, Tensor], Tensor]]]:
    """By name: what makes the model, the batch, and its loss."""
    few, many = batch or 8, batch or 64
    return {
        "decoder": (Decoder, torch.randint(4096, (few, 128)), _language),
        "mlp": (mlp, torch.randn(many, 784), partial(_classes, torch.randint(10, (many,)))),
    }


def measure(name: str, dim: int, steps: int, batch: int | None) -> None:
    """Print medians of one model."""
    torch.manual_seed(0)
    make, data, loss_of = cases(batch)[name]
    models = [make(), make()]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in models]
    task = sp.CausalLM(reduction="sum") if name == "decoder" else sp.Classification()
    with tempfile.TemporaryDirectory() as folder:
        recorder = sp.Recorder(models[1], optimizers[1], folder, capture=sp.Sketch(dim), task=task, examples=len(data))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(steps):
            for which in (0, 1):
                began = time.process_time()
                optimizers[which].zero_grad()
                torch.autograd.backward(loss_of(models[which], data))
                optimizers[which].step()
                if which:
                    recorder.step(ids=range(len(data)))
                times[which].append(time.process_time() - began)
        sums = SegmentSums(dim, len(data), "ram", recorder.dir, torch.device("cpu"))
        rows, began = torch.randn(len(data), dim), time.process_time()
        for _ in range(steps):
            sums.add(torch.arange(len(data)), rows, 0.1, None)
        curvature = (time.process_time() - began) / steps
        recorder.close()
    plain, captured = (statistics.median(own[steps // 3 :]) for own in times)
    size = sum(p.numel() for p in models[0].parameters())
    print(
        f"{name}: {size / 1e6:.2f} million parameters, batch {len(data)}, k = {dim}: "
        f"{plain * 1e3:.1f} ms a step alone, {captured * 1e3:.1f} ms captured, {captured / plain - 1:+.0%}; "
        f"curvature {curvature / plain:.0%}"
    )


def main() -> None:
    """Measure the models of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["decoder", "mlp"], choices=list(cases(None)))
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        measure(name, options.dim, options.steps, options.batch)


if __name__ == "__main__":
    main()
