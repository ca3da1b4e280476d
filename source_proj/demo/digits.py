"""The demo's data, network and training loop: what a user of the library would write."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from source_proj.trajectory import Recorder

__all__ = ["Digits", "checkpoint_steps", "load_digits", "make_network", "make_optimizer", "train"]

EPOCHS = 15
BATCH_SIZE = 64
LR = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3
CHECKPOINTS = 6


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's handwritten digits, 8 x 8 pixels in [0, 1], in a fixed random split.

    Attributes:
        train_set: 1,438 training examples ``(pixels (64,), label)``.
        test_set: 359 test examples.
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
        linear = partial(nn.Linear, dtype=torch.float32, device="cpu")
        return nn.Sequential(linear(64, 128), nn.ReLU(), linear(128, 128), nn.ReLU(), linear(128, 10))


def make_optimizer(model: nn.Module) -> torch.optim.SGD:
    """Make the optimizer that every run uses."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def checkpoint_steps(examples: int) -> list[int]:
    """Say after which optimizer steps a run is recorded: evenly spaced, the last at its end."""
    steps = EPOCHS * -(-examples // BATCH_SIZE)
    return [round(steps * (index + 1) / CHECKPOINTS) for index in range(CHECKPOINTS)]


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
    weights = torch.ones(len(data), dtype=torch.float32, device="cpu")
    weights[list(left_out)] = 0
    start = recorder.restore() if recorder is not None else 0
    model.train()
    with _one_thread():
        for batch in _batches(len(data), seed)[start:]:
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(inputs[batch]), targets[batch], reduction="none")
            ((losses * weights[batch]).sum() / len(batch)).backward()
            optimizer.step()
            if recorder is not None:
                recorder.step()
    model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: for a network this small, several only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(examples: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(examples, generator=generator, device="cpu") for _ in range(EPOCHS)]
    return [order[first : first + BATCH_SIZE] for order in orders for first in range(0, examples, BATCH_SIZE)]
