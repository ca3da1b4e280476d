"""What does capture cost? A training step that is captured against the same step alone.

    python examples/speed/capture.py                       # a decoder of GPT-2's shape, small, and an MLP: minutes
    python examples/speed/capture.py --models mlp --dim 1024 --steps 30
    python examples/speed/capture.py --models encoder vit lstm gru    # attention, class tokens, recurrent layers
    python examples/speed/capture.py --device cuda --autocast bfloat16 --models gpt2 stack

Both steps in one process and in turn, each with forward and backward pass, AdamW's update, and zero_grad; medians (with
--draw-every, means) over the last two thirds of the steps, which are past the audits of the first ones: of the
processor's time on a CPU, which other processes disturb less than the clock, and of the clock on a GPU. "curvature" is
what the k x k sum takes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from _models import Decoder, Encoder, Recurrent, Stack, gpt2, mlp, vit
from torch import Tensor, nn

import source_proj as sp
from source_proj.bank.capture.sums import SegmentSums
from source_proj.sketch.columns import kept_blocks
from source_proj.sketch.projections import kinds


def _language(model: nn.Module, tokens: Tensor, told: bool) -> Tensor:
    logits = model(tokens, labels=tokens) if told else model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _classes(labels: Tensor, model: nn.Module, inputs: Tensor, _told: bool) -> Tensor:
    output = model(inputs)
    return F.cross_entropy(getattr(output, "logits", output), labels.to(inputs.device))


MODELS = ("decoder", "mlp", "encoder", "vit", "lstm", "gru", "gpt2", "stack")
Loss = Callable[[nn.Module, Tensor, bool], Tensor]  # the last: whether a recorder keeps the labels back


def case(name: str, batch: int | None) -> tuple[Callable[[], nn.Module], Tensor, Loss]:
    """What makes a model of `MODELS`, a batch for it, and its loss."""
    recurrent = {"lstm": partial(Recurrent, nn.LSTM), "gru": partial(Recurrent, nn.GRU)}
    language: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
        "decoder": (Decoder, 4096, 128),
        "gpt2": (gpt2, 50257, 512),
        **{kind: (make, 256, 64) for kind, make in recurrent.items()},
    }
    if name in language:
        make, words, length = language[name]
        return make, torch.randint(words, (batch or 8, length)), _language
    shapes: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "mlp": (mlp, (784,)), "vit": (vit, (3, 32, 32)), "stack": (Stack, (128, 4096)), "encoder": (Encoder, (64,)),
    }  # fmt: skip
    make, shape = shapes[name]
    size = batch or 64
    data = torch.randint(4096, (size, *shape)) if name == "encoder" else torch.randn(size, *shape)
    return make, data, partial(_classes, torch.randint(10, (size,)))


def now(device: torch.device) -> float:
    """Seconds of the processor; on a GPU of the clock, when it has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(name: str, a: argparse.Namespace) -> None:
    """Print medians of one model."""
    torch.manual_seed(0)
    make, data, loss_of = case(name, a.batch)
    data, device = data.to(a.device), a.device
    models = [make().to(device), make().to(device)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in models]
    autocast = partial(torch.autocast, device.type, getattr(torch, a.autocast)) if a.autocast else nullcontext
    task = sp.CausalLM(reduction="sum") if loss_of is _language else sp.Classification()
    sketch = sp.Sketch(a.dim, a.sketch)
    with tempfile.TemporaryDirectory() as folder:
        draws = a.draw_every if loss_of is _language else 0
        recorder = sp.Recorder(
            models[1], optimizers[1], folder, capture=sketch, task=task, examples=len(data), draw_every=draws
        )  # fmt: skip
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(a.steps):
            for which in (0, 1):
                began = now(device)
                optimizers[which].zero_grad()
                with autocast():
                    loss = loss_of(models[which], data, bool(which and draws))
                torch.autograd.backward(loss)
                optimizers[which].step()
                if which:
                    recorder.step(ids=range(len(data)))
                times[which].append(now(device) - began)
        sums = SegmentSums(kept_blocks(sketch), len(data), "ram", recorder.dir, device)
        rows, began = torch.randn(len(data), a.dim, device=device), now(device)
        for _ in range(a.steps):
            sums.add(torch.arange(len(data)), rows, 0.1, rows)
        curvature = (now(device) - began) / a.steps
        recorder.close()
    # Where labels are drawn at some steps, no step is the middle one.
    plain, captured = ((statistics.mean if draws else statistics.median)(own[a.steps // 3 :]) for own in times)
    size = sum(p.numel() for p in models[0].parameters())
    print(
        f"{name}: {size / 1e6:.2f} million parameters, batch {len(data)}, {a.sketch}, k = {a.dim}: "
        f"{plain * 1e3:.1f} ms a step alone, {captured * 1e3:.1f} ms captured, {captured / plain - 1:+.0%}; "
        f"curvature {curvature / plain:.0%}"
    )


def main() -> None:
    """Measure the models of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["decoder", "mlp"], choices=MODELS)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, help="examples of a batch: 8 sequences, or 64 others")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--autocast", choices=("bfloat16", "float16"))
    parser.add_argument(
        "--draw-every", type=int, default=0, help="of language models: draw labels at one step in so many"
    )
    parser.add_argument("--sketch", choices=kinds(), default="tensor", help="kind of sketch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        measure(name, options)


if __name__ == "__main__":
    main()
