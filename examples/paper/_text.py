"""What the two text tasks share: rows of tensors, a loop of AdamW, and its runs told as runs of SGD.

The library knows how SGD acted. AdamW moves along gradients that are divided, entry by entry, by the root of their
second moments v̂. A run of it is told here as SGD with a scalar in place of that diagonal: update t has the learning
rate ηₜ pₜ, where p is the Rayleigh quotient of AdamW's metric 1/(√v̂ + ε) under gradients of second moments v̂,

    p = Σᵢ v̂ᵢ/(√v̂ᵢ + ε) / Σᵢ v̂ᵢ ≈ Σᵢ √v̂ᵢ / Σᵢ v̂ᵢ,

the mean of the metric's entries, each weighed by how much gradient it sees. It is read from the optimizer's state at
every checkpoint and holds for the updates that led to it. The decoupled weight decay λ, which acts by ηₜ λ an update,
is a coupled one of λ Σηₜ / Σηₜpₜ.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import _above  # noqa: F401
import numpy as np
import torch
from _data import write_whole
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import source_proj as sp

__all__ = ["METRIC", "Recipe", "Rows", "Training", "chosen_device", "metric_mean"]

METRIC = (
    "AdamW is treated as SGD in a scalar metric: every learning rate is multiplied by Σ√v̂/Σv̂, the mean of AdamW's "
    "diagonal metric weighed by squared gradients, read at each checkpoint; decoupled weight decay is divided by it."
)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of ``(logits, labels)``."""

Ask = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""Something of each row of a batch, by a model: ``(B,)``."""


class Rows(Dataset[dict[str, Tensor]]):
    """A data set of dict batches: named tensors whose first dimension counts examples."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def to(self, device: torch.device) -> "Rows":
        """The same rows on a device."""
        return Rows({name: tensor.to(device) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Recipe:
    """How AdamW trains.

    Attributes:
        epochs: passes over the training set.
        batch_size: examples a batch; the last, short one of an epoch is used.
        lr: the highest learning rate, reached by a linear warm-up and left by a linear decay to 0.
        weight_decay: decoupled, on all parameters.
        warmup: share of the updates that warm up.
        beta2: decay of the second moments.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.01
    warmup: float = 0.1
    beta2: float = 0.999

    def steps(self, n: int) -> int:
        """Updates of a run on n examples."""
        return self.epochs * -(-n // self.batch_size)

    def rates(self, n: int) -> list[float]:
        """Learning rate of every update of a run on n examples."""
        total = self.steps(n)
        warm = max(1, round(self.warmup * total))
        return [self.lr * min((t + 1) / warm, (total - t) / max(1, total - warm)) for t in range(total)]


def metric_mean(optimizer: torch.optim.AdamW) -> float:
    """Rayleigh quotient p of AdamW's metric under its own second moments, bias-corrected; see the module's text."""
    moved = square = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            v = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            moved += float((v / (v.sqrt() + group["eps"])).sum())
            square += float(v.sum())
    return moved / square


@dataclass(frozen=True)
class Training:
    """A model, its data and its recipe: trains once and records, or many times on subsets.

    Attributes:
        make_model: builds the initial model; called under ``torch.manual_seed(seed)`` of the run.
        rows: the training set.
        queries: what is measured after training.
        task: how it is measured.
        loss: mean loss of ``(logits, labels)``.
        recipe: how AdamW trains.
        device: where.
        checkpoints: how many of them a recorded run has, evenly spaced; the last one is the final model.
    """

    make_model: Callable[[], nn.Module]
    rows: Rows
    queries: Rows
    task: sp.Task
    loss: Loss
    recipe: Recipe
    device: torch.device
    checkpoints: int = 5

    def retrain(self, kept: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
        """Train one model a pair of subset and seed; measurements ``(len(kept), Q)``."""
        return self._after_each(kept, seeds, self.task.measurement)

    def predict(self, kept: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
        """Train as ``retrain`` does; predicted classes ``(len(kept), Q)``."""
        return self._after_each(kept, seeds, _classes)

    def record(self, seed: int, folder: Path) -> sp.Trajectory:
        """Train on everything and keep checkpoints; a finished run is read back, a killed one begins again.

        Raises:
            ValueError: the folder holds a run of other settings.
        """
        settings = {"seed": seed, "rows": len(self.rows), "checkpoints": self.checkpoints, **asdict(self.recipe)}
        notes = folder / "run.json"  # written last, so its presence says that the run is whole
        if not notes.exists():
            write_whole(
                notes, json.dumps({"settings": settings, "metric": self._train_and_save(seed, folder)}).encode()
            )
        found = json.loads(notes.read_text())
        if found["settings"] != settings:
            raise ValueError(f"{folder} holds a run of settings {found['settings']}, not {settings}: delete it")
        return self._trajectory(folder, found["metric"])

    def accuracy(self, seed: int, folder: Path) -> str:
        """Say how often a recorded run's final model is right about training set and queries."""
        model = self._final(seed, folder)
        rights = (
            _answers(model, rows, _classes) == rows.tensors["labels"].numpy() for rows in (self.rows, self.queries)
        )
        return "accuracy {:.3f} on training examples, {:.3f} on queries".format(*(right.mean() for right in rights))

    def perplexity(self, seed: int, folder: Path) -> str:
        """Say what a recorded run's final model makes of training set and queries."""
        model = self._final(seed, folder)
        means = (_answers(model, rows, self.task.measurement).mean() for rows in (self.rows, self.queries))
        return "perplexity {:.1f} on training examples, {:.1f} on queries".format(*(np.exp(-mean) for mean in means))

    def _final(self, seed: int, folder: Path) -> nn.Module:
        model = self.make_model()
        model.load_state_dict(self.record(seed, folder).stages[-1].checkpoints[-1].load())
        return model

    def _after_each(self, kept: Sequence[np.ndarray], seeds: Sequence[int], ask: Ask) -> np.ndarray:
        rows, queries = self.rows.to(self.device), self.queries.to(self.device)
        answers = []
        for subset, seed in zip(kept, seeds, strict=True):
            *_, (model, _) = self._updates(rows, torch.as_tensor(subset).long(), seed)
            answers.append(_answers(model, queries, ask))
        return np.stack(answers)

    def _updates(self, rows: Rows, subset: Tensor, seed: int) -> Iterator[tuple[nn.Module, torch.optim.AdamW]]:
        """Train; yields the model and its optimizer after every update."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make_model().to(self.device).train()
        recipe, generator = self.recipe, torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True,
        )  # fmt: skip
        orders = [torch.randperm(len(subset), generator=generator) for _ in range(recipe.epochs)]
        batches = [subset[batch] for order in orders for batch in torch.split(order, recipe.batch_size)]
        for rate, batch in zip(recipe.rates(len(subset)), batches, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            inputs = rows[batch.to(self.device)]
            labels = inputs.pop("labels")
            torch.autograd.backward(self.loss(model(**inputs), labels))
            optimizer.step()
            yield model, optimizer

    def _checkpoint_steps(self) -> list[int]:
        total = self.recipe.steps(len(self.rows))
        return sorted({max(1, round(total * (i + 1) / self.checkpoints)) for i in range(self.checkpoints)})

    def _train_and_save(self, seed: int, folder: Path) -> list[float]:
        """Train on everything; p of every checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        metric, due = [], self._checkpoint_steps()
        updates = self._updates(self.rows.to(self.device), torch.arange(len(self.rows)), seed)
        for step, (model, optimizer) in enumerate(tqdm(updates, "train", due[-1], unit="step", delay=2), 1):
            if step in due:
                torch.save(model.state_dict(), folder / _file(step))
                metric.append(metric_mean(optimizer))
        return metric

    def _trajectory(self, folder: Path, metric: Sequence[float]) -> sp.Trajectory:
        due, rates = self._checkpoint_steps(), self.recipe.rates(len(self.rows))
        scaled = [
            rate * p
            for p, (begin, end) in zip(metric, pairwise([0, *due]), strict=True)
            for rate in rates[begin:end]
        ]  # fmt: skip
        decay = self.recipe.weight_decay * sum(rates) / sum(scaled)
        checkpoints = [sp.Checkpoint(folder / _file(step), step) for step in due]
        return sp.Trajectory(checkpoints, optimizer=sp.SGD(weight_decay=decay), lr_schedule=scaled)


def chosen_device(name: str | None) -> torch.device:
    """The named device, or a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _file(step: int) -> str:
    return f"step-{step:06d}.pt"


def _answers(model: nn.Module, rows: Rows, ask: Ask) -> np.ndarray:
    """What is asked of a model about each row, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([ask(model, rows[slice(i, i + 64)]) for i in range(0, len(rows), 64)]).cpu().numpy()


def _classes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    classes: Tensor = model(**inputs).argmax(-1)
    return classes
