"""Small models trained many at once: MLPs on tables and images, in one stage or two."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import _above  # noqa: F401
import numpy as np
import torch
from _training import margin, record_training
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.evaluate import stacked_outputs, train_stacked

__all__ = ["HEAVY_BALL", "StackedRun", "StageSetting", "absolute_error", "margin", "mlp", "mse"]

HEAVY_BALL = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-3)


@dataclass(frozen=True)
class StageSetting:
    """How one stage is trained.

    Attributes:
        data: its training set.
        epochs: passes over it.
        batch: batch size.
        lr: learning rate.
        checkpoints: how many are recorded, at equal distances.
    """

    data: TensorDataset
    epochs: int
    batch: int
    lr: float
    checkpoints: int

    def steps(self) -> int:
        """Optimizer steps on the whole set."""
        return self.epochs * -(-len(self.data) // self.batch)

    def recorded(self) -> list[int]:
        """Steps at which a checkpoint is recorded; fewer where there are fewer steps."""
        return sorted({max(1, round(self.steps() * (i + 1) / self.checkpoints)) for i in range(self.checkpoints)})


@dataclass(frozen=True)
class StackedRun:
    """Training of one architecture through one stage or several, and what is measured of the queries.

    Attributes:
        make_model: builds a freshly initialised model.
        stages: settings by name, in order.
        queries: inputs and targets.
        measure: measurement ``(M, Q)`` of outputs ``(M, Q, ...)`` and targets ``(Q, ...)``.
        optimizer: makes torch's optimizer, but for the learning rate: of recorded runs and of retrainings alike.
        loss: mean loss of a batch.
        group: models in lock-step; their weights should fit the processor's cache.
    """

    make_model: Callable[[], nn.Module]
    stages: Mapping[str, StageSetting]
    queries: TensorDataset
    measure: Callable[[Tensor, Tensor], Tensor]
    optimizer: partial[Any] = HEAVY_BALL
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    group: int = 8

    def settings(self) -> dict[str, Any]:
        """Everything that decides the outcomes, JSON-able; the data but for their sizes."""
        return {
            "stages": {
                name: {"n": len(s.data), "epochs": s.epochs, "batch": s.batch, "lr": s.lr, "checkpoints": s.checkpoints}
                for name, s in self.stages.items()
            },
            "queries": len(self.queries),
            "optimizer": {"name": self.optimizer.func.__name__, **self.optimizer.keywords},
            "model": repr(self.make_model()),
        }

    def retrain(self, kept: list[np.ndarray], seeds: list[int]) -> np.ndarray:
        """Measurements ``(M, Q)`` of models trained on subsets of the first stage's set, and all later stages'."""
        return self._each(kept, seeds, lambda outputs: self.measure(outputs, self.queries.tensors[1]))

    def predict(self, kept: list[np.ndarray], seeds: list[int]) -> np.ndarray:
        """Classes predicted of the queries, ``(M, Q)``, by models trained like :meth:`retrain`'s."""
        return self._each(kept, seeds, lambda outputs: outputs.argmax(-1))

    def _each(
        self, kept: Sequence[np.ndarray], seeds: Sequence[int], measure: Callable[[Tensor], Tensor]
    ) -> np.ndarray:
        outputs = stacked_outputs(self.make_model, self.queries.tensors[0])
        found: dict[int, Tensor] = {}
        lengths = sorted({len(one) for one in kept})
        for length in lengths:  # models in lock-step need subsets of one length
            same = [i for i, one in enumerate(kept) if len(one) == length]
            for start in range(0, len(same), self.group):
                chosen = same[start : start + self.group]
                state = self._train([kept[i] for i in chosen], [seeds[i] for i in chosen])
                found.update(zip(chosen, measure(outputs(state)), strict=True))
        return torch.stack([found[i] for i in range(len(kept))]).double().numpy()

    def _train(self, kept: Sequence[np.ndarray], seeds: Sequence[int]) -> dict[str, Tensor]:
        state = None
        for index, stage in enumerate(self.stages.values()):
            inputs, targets = stage.data.tensors
            everything = np.arange(len(stage.data))
            state = train_stacked(
                self.make_model, inputs, targets, kept if index == 0 else [everything] * len(seeds),
                [seed + index * 10**9 for seed in seeds], epochs=stage.epochs, batch_size=stage.batch, lr=stage.lr,
                optimizer=self.optimizer, loss=self.loss, initial=state,
            )  # fmt: skip
        assert state is not None
        return state

    def record(self, seed: int, folder: Path) -> sp.Trajectory:
        """Train on everything, recording checkpoints; a killed run goes on where it was."""
        torch.manual_seed(seed)
        model = self.make_model()
        stages = []
        for index, (name, stage) in enumerate(self.stages.items()):
            optimizer = self.optimizer(model.parameters(), lr=stage.lr)
            recorder = sp.Recorder(model, optimizer, folder / name, at=stage.recorded(), stage=name)
            record_training(
                model, optimizer, stage.data, recorder, epochs=stage.epochs, batch_size=stage.batch,
                seed=seed + index * 10**9, loss=self.loss,
            )  # fmt: skip
            stages.append(recorder.stage())
        return sp.Trajectory.from_stages(stages)

    def captured(self, task: sp.Task, seed: int, folder: Path, sketch: sp.Sketch) -> sp.Bank:
        """Train on everything as :meth:`record` does, and give the bank that was captured meanwhile."""
        torch.manual_seed(seed)
        model = self.make_model()
        earlier: list[Any] = []
        for index, (name, stage) in enumerate(self.stages.items()):
            optimizer = self.optimizer(model.parameters(), lr=stage.lr)
            recorder = sp.Recorder(
                model, optimizer, folder / name, at=stage.recorded(), stage=name, capture=sketch, task=task,
                examples=len(stage.data),
            )  # fmt: skip
            record_training(
                model, optimizer, stage.data, recorder, epochs=stage.epochs, batch_size=stage.batch,
                seed=seed + index * 10**9, loss=self.loss, captures=True,
            )  # fmt: skip
            recorder.close()
            if index + 1 < len(self.stages):
                earlier.append(recorder.captured())
        return recorder.bank(folder / "bank", after=earlier)

    def record_more(self, seed: int, folder: Path, checkpoints: int) -> sp.Trajectory:
        """Record the same run with another number of checkpoints a stage."""
        stages = {name: replace(stage, checkpoints=checkpoints) for name, stage in self.stages.items()}
        return replace(self, stages=stages).record(seed, folder)

    def accuracy(self, seed: int, folder: Path) -> str:
        """How well the recorded run does, for the notes."""
        model = self.make_model()
        model.load_state_dict(self.record(seed, folder).final.load())
        model.eval()
        inputs, targets = self.queries.tensors
        with torch.no_grad():
            outputs = model(inputs)
        if targets.dtype == torch.int64:
            return f"{(outputs.argmax(1) == targets).float().mean():.1%} of the queries right"
        return f"mean absolute error {float((outputs.squeeze(-1) - targets).abs().mean()):.3f}"


def mlp(*widths: int) -> Callable[[], nn.Module]:
    """Linear layers of these widths with ReLU between them."""
    return partial(_mlp, widths)


def _mlp(widths: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of outputs ``(B, 1)`` and targets ``(B,)``."""
    return nn.functional.mse_loss(outputs.squeeze(-1), targets)


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """|o − y|, ``(M, Q)`` of outputs ``(M, Q, 1)`` and targets ``(Q,)``."""
    return (outputs.squeeze(-1).double() - targets.double()).abs()
