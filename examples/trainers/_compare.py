"""A training framework's own numbers, seen from torch, beside those that a bank and a trajectory make of its files."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset

import source_proj as sp

__all__ = ["Comparison", "Watch", "Watched", "first_update", "times"]

LARGEST = 1e-5  # relative difference that passes


class Watched(Dataset[Any]):
    """A data set that keeps the order in which its examples were asked for."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples, self.order = examples, list[int]()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        self.order.append(index)
        return self.examples[index]


class Watch:
    """What a framework did, whatever it is: every loss that went backward, every step of the optimizer.

    Attributes:
        rates: learning rate of each update, of the first parameter group.
        momenta: momentum of each update, or β₁; 0 where there is neither.
        losses: losses that went backward, a list for each update.
        gradients: gradient of each update, parameters flattened in the model's order.
    """

    def __init__(self) -> None:
        self.rates, self.momenta = list[float](), list[float]()
        self.losses: list[list[float]] = [[]]
        self.gradients: list[Tensor] = []

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Watch all training inside the ``with`` block."""
        backward: Any = torch.Tensor.backward

        def watched_backward(loss: Tensor, *args: Any, **options: Any) -> None:
            self.losses[-1].append(float(loss.detach()))
            backward(loss, *args, **options)

        def after_step(optimizer: Any, *_: Any) -> None:  # within the step Lightning runs the backward pass
            group = optimizer.param_groups[0]
            self.rates.append(float(group["lr"]))
            self.momenta.append(float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0)))
            gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
            self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
            self.losses.append([])

        handle = register_optimizer_step_post_hook(after_step)
        torch.Tensor.backward = watched_backward  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
            handle.remove()


class Comparison:
    """Pairs of numbers that must be equal, printed line by line."""

    def __init__(self) -> None:
        self.worst = 0.0

    def add(self, what: str, ours: Tensor | Sequence[float], theirs: Tensor | Sequence[float]) -> None:
        """Compare two vectors: the norm of their difference in units of the framework's."""
        own, other = (torch.as_tensor(values, dtype=torch.float64).flatten() for values in (ours, theirs))
        if len(own) != len(other):
            raise SystemExit(f"FAILED: {what} has {len(own)} numbers, and the framework has {len(other)}")
        difference = float((own - other).norm() / other.norm())
        self.worst = max(self.worst, math.inf if math.isnan(difference) else difference)
        print(f"{what}: {_shown(own)}, the framework's {_shown(other)}, relative difference {difference:.1e}")

    def finish(self) -> None:
        """Fail if a difference was too large."""
        if self.worst > LARGEST:
            raise SystemExit(f"FAILED: the largest difference is {self.worst:.1e}, more than {LARGEST}")
        print(f"holds: all are equal up to {self.worst:.1e}")


def times(stage: sp.Stage) -> list[float]:
    """Training time from the beginning to each checkpoint, as a trajectory has it."""
    record = stage.describe()
    return [record.time_factor * integral for integral in record.lr_integrals]


def first_update(
    model: nn.Module, task: sp.Task, state: dict[str, Tensor], batches: Sequence[Sequence[Any]], data: Any
) -> tuple[Tensor, list[float]]:
    """What a bank makes of an update: its gradient (d,), and the loss of each micro-batch.

    A bank's rows are weighted for a batch of mean size. Where a loss is divided by the tokens of its batch, those
    replace the mean; else by the number of examples. The loss of an output is minus the likelihood, or log(1 + e^-o) of
    a classifier's margin.

    Args:
        model: the model, in evaluation mode.
        task: of the run.
        state: the weights before the update.
        batches: the update's micro-batches, as positions in ``data``.
        data: the training set.
    """
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        run = sp.Trajectory([sp.Checkpoint(state, step=1, lr=1.0)])
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        sketch = sp.Sketch(size, kind="identity")
        bank = sp.build(
            model, task, run, data, Path(folder) / "bank", sketch=sketch, storage="float32", parameters=names,
            progress=False,
        )  # fmt: skip
        blocks = list(bank.stages[0].iter_rows(0))
        rows = torch.cat([block.rows for block in blocks]).double()
        weights = torch.cat([block.d1 for block in blocks]).double()
        normalizer = bank.task_spec.get("normalizer")
    used = [i for batch in batches for i in batch]
    divisor = float(len(used))
    if normalizer:
        whole = torch.utils.data.default_collate([data[i] for i in used])
        divisor = float(task.share(whole).sum()) / normalizer[0]
    losses = []
    with run.final.applied_to(model), torch.no_grad():
        for batch in batches:
            outputs = task.output(model, torch.utils.data.default_collate([data[i] for i in batch])).double()
            parts = weights[list(batch)] * outputs if normalizer else nn.functional.softplus(-outputs)
            losses.append(float(parts.sum()) / divisor)
    return (weights[used, None] * rows[used]).sum(0) / divisor, losses


def _shown(values: Tensor) -> str:
    return f"{values[-1]:.8g}" if len(values) < 9 else f"|{values.norm():.8g}| of {len(values)}"
