"""What the examples share: a plain training loop that records itself, and the margin of logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import source_proj as sp

__all__ = ["few_threads", "margin", "record_training"]


@contextmanager
def few_threads(n_inputs: int) -> Iterator[None]:
    """Keep torch to one thread for networks on small images.

    A second thread gains a tenth at most there, and on a busy machine the two wait for each other: three times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if n_inputs <= 256 else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def record_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: TensorDataset,
    recorder: sp.Recorder,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    captures: bool = False,
) -> None:
    """Train with shuffled batches that follow from the seed; a killed run goes on from its last checkpoint.

    A recorder that captures is told which examples a batch has.
    """
    inputs, targets = data.tensors
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(data), generator=generator) for _ in range(epochs)]
    batches = [batch for order in orders for batch in torch.split(order, batch_size)]
    model.train()
    for batch in tqdm(batches[recorder.restore() :], "train", unit="step", delay=2):
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(inputs[batch]), targets[batch]))
        optimizer.step()
        recorder.step(ids=batch if captures else None)
    model.eval()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin log p/(1 − p) of the labels, ``(M, Q)`` from logits ``(M, Q, classes)``."""
    logits = logits.double()
    own = nn.functional.one_hot(labels, logits.shape[-1]).bool().expand_as(logits)
    return logits[own].reshape(logits.shape[:-1]) - logits.masked_fill(own, -torch.inf).logsumexp(-1)
