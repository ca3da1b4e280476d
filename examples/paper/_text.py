"""What the two text tasks share: rows of tensors, and a loop of AdamW that records itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import _above  # noqa: F401
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import source_proj as sp

__all__ = ["Recipe", "Rows", "Training", "chosen_device"]

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

    def repeat(self, kept: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """Measurements ``(len(kept), Q)`` after the run of a seed, each time with some rows of every batch left out.

        What is left of a batch counts for as much as before: the loss is still divided by the whole batch's size.
        """
        rows, queries = self.rows.to(self.device), self.queries.to(self.device)
        answers = []
        for subset in kept:
            model, optimizer = self._start(seed)
            of_all = torch.zeros(len(rows), dtype=torch.bool)
            of_all[torch.as_tensor(subset).long()] = True
            for _ in self._updates(model, optimizer, rows, torch.arange(len(rows)), seed, kept=of_all):
                pass
            answers.append(_answers(model, queries, self.task.measurement))
        return np.stack(answers)

    def unrolled(self, seed: int) -> sp.evaluate.ExactUnrolling:
        """The run of a seed, to be differentiated step by step."""
        model, _ = self._start(seed)
        recipe, n = self.recipe, len(self.rows)
        batches = [batch.tolist() for batch in self._batches(torch.arange(n), seed)]
        adamw = partial(
            torch.optim.AdamW, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay
        )  # fmt: skip
        rates = recipe.rates(n)
        return sp.evaluate.ExactUnrolling(model, self.task, self.rows, batches, adamw, lr=rates, progress=False)

    def predict(self, kept: Sequence[np.ndarray], seeds: Sequence[int]) -> np.ndarray:
        """Train as ``retrain`` does; predicted classes ``(len(kept), Q)``."""
        return self._after_each(kept, seeds, _classes)

    def record(self, seed: int, folder: Path) -> sp.Trajectory:
        """Train on everything, recording checkpoints and second moments; a killed run goes on where it was."""
        model, optimizer = self._start(seed)
        recorder = sp.Recorder(model, optimizer, folder, at=self._checkpoint_steps())
        done = recorder.restore()
        updates = self._updates(model, optimizer, self.rows.to(self.device), torch.arange(len(self.rows)), seed, done)
        total = self.recipe.steps(len(self.rows)) - done
        for _ in tqdm(updates, "train", total, unit="step", delay=2):
            recorder.step()
        return recorder.trajectory()

    def record_more(self, seed: int, folder: Path, checkpoints: int) -> sp.Trajectory:
        """Record the same run with another number of checkpoints."""
        return replace(self, checkpoints=checkpoints).record(seed, folder)

    def captured(
        self, seed: int, folder: Path, sketch: sp.Sketch, weights: Mapping[str, float] | None = None
    ) -> sp.Bank:
        """Train on everything as :meth:`record` does, and give the bank that was captured meanwhile."""
        model, optimizer = self._start(seed)
        at, rows = self._checkpoint_steps(), self.rows.to(self.device)
        recorder = sp.Recorder(
            model, optimizer, folder, at=at, capture=sketch, task=self.task, examples=len(rows),
            parameter_weights=weights,
        )  # fmt: skip
        done = recorder.restore()
        for batch in self._updates(model, optimizer, rows, torch.arange(len(rows)), seed, done, captured=True):
            recorder.step(ids=batch, batch=rows[batch.to(self.device)])
        bank = recorder.bank()
        recorder.close()
        return bank

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
            model, optimizer = self._start(seed)
            for _ in self._updates(model, optimizer, rows, torch.as_tensor(subset).long(), seed):
                pass
            answers.append(_answers(model, queries, ask))
        return np.stack(answers)

    def _start(self, seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make_model().to(self.device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        recipe = self.recipe
        return model, torch.optim.AdamW(
            trained, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
        )

    def _updates(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        rows: Rows,
        subset: Tensor,
        seed: int,
        done: int = 0,
        kept: Tensor | None = None,
        *,
        captured: bool = False,
    ) -> Iterator[Tensor]:
        """Train, but for the updates that are done already; yields the places of its rows after every update.

        A recorder that captures is told the labels with the model's arguments, and keeps them back from it.
        """
        batches = self._batches(subset, seed)
        for rate, batch in islice(zip(self.recipe.rates(len(subset)), batches, strict=True), done, None):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            there = batch if kept is None else batch[kept[batch]]
            if len(there):
                inputs = rows[there.to(self.device)]
                labels = inputs.pop("labels")
                told = {"labels": labels} if captured else {}
                torch.autograd.backward(self.loss(model(**inputs, **told), labels) * (len(there) / len(batch)))
            optimizer.step()
            yield batch

    def _batches(self, subset: Tensor, seed: int) -> list[Tensor]:
        """Of a run, the places of each update's rows."""
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(subset), generator=generator) for _ in range(self.recipe.epochs)]
        return [subset[batch] for order in orders for batch in torch.split(order, self.recipe.batch_size)]

    def _checkpoint_steps(self) -> list[int]:
        total = self.recipe.steps(len(self.rows))
        return sorted({max(1, round(total * (i + 1) / self.checkpoints)) for i in range(self.checkpoints)})


def chosen_device(name: str | None) -> torch.device:
    """The named device, or a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _answers(model: nn.Module, rows: Rows, ask: Ask) -> np.ndarray:
    """What is asked of a model about each row, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([ask(model, rows[slice(i, i + 64)]) for i in range(0, len(rows), 64)]).cpu().numpy()


def _classes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    classes: Tensor = model(**inputs).argmax(-1)
    return classes
