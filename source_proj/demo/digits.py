"""The demo's data, network and training loop: what a user of the library would write."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from source_proj.trajectory import Recorder

__all__ = ["Digits", "load_digits", "make_network", "make_optimizer", "steps_of", "train"]

EPOCHS = 15
BATCH_SIZE = 64
LR = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's handwritten digits, 8 x 8 pixels in [0, 1], in a fixed random split.

    Attributes:
        train_set: 1,437 training examples ``(pixels (64,), label)``.
        test_set: 360 test examples.
    """

    train_set: TensorDataset
    test_set: TensorDataset


def load_digits() -> Digits:
    """Load the digits, which scikit-learn ships.

    Raises:
        ImportError: without scikit-learn (extra ``demo``).
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError('the demo needs scikit-learn: pip install "source-proj[demo]"') from error
    pixels, labels = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    inputs = torch.from_numpy(pixels[order] / 16).float()
    targets = torch.from_numpy(labels[order]).long()
    size = round(0.8 * len(order))
    return Digits(TensorDataset(inputs[:size], targets[:size]), TensorDataset(inputs[size:], targets[size:]))


def make_network(seed: int = 0) -> nn.Sequential:
    """Make a freshly initialised network, 64-128-128-10, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )  # fmt: skip


def make_optimizer(model: nn.Module) -> torch.optim.SGD:
    """Make the optimizer that every run uses."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def steps_of(examples: int) -> int:
    """Optimizer steps of a whole run."""
    return EPOCHS * -(-examples // BATCH_SIZE)


def train(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    data: TensorDataset,
    *,
    seed: int = 0,
    left_out: Sequence[int] = (),
    recorder: Recorder | None = None,
) -> None:
    """Train a network; the order of the batches depends on the seed alone.

    Args:
        model: the network, trained in place.
        optimizer: its optimizer.
        data: the full training set.
        seed: seed of the batch order.
        left_out: positions of examples that are left out: their loss counts zero in batches that stay as they are, so
            every other example keeps its weight and its moment ("fixed 1/N").
        recorder: records the run; one that holds a run goes on with it.
    """
    inputs, targets = data.tensors
    weights = torch.ones(len(data))
    weights[list(left_out)] = 0
    start = recorder.restore() if recorder is not None else 0
    model.train()
    for batch in _batches(len(data), seed)[start:]:
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(inputs[batch]), targets[batch], reduction="none")
        ((losses * weights[batch]).sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if recorder is not None:
            recorder.step()
    model.eval()


def _batches(examples: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        batch for _ in range(EPOCHS) for batch in torch.randperm(examples, generator=generator).split(BATCH_SIZE)
    ]  # fmt: skip
