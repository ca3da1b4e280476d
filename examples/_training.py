"""What the examples share: a plain training loop that records itself, and the margin of logits."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import source_proj as sp

__all__ = ["margin", "record_training"]


def record_training(
    model: nn.Module,
    optimizer: torch.optim.SGD,
    data: TensorDataset,
    recorder: sp.Recorder,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train with shuffled batches that follow from the seed; a killed run goes on from its last checkpoint."""
    inputs, targets = data.tensors
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(data), generator=generator) for _ in range(epochs)]
    batches = [batch for order in orders for batch in torch.split(order, batch_size)]
    model.train()
    for batch in tqdm(batches[recorder.restore() :], "train", unit="step", delay=2):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(inputs[batch]), targets[batch]))
        optimizer.step()
        recorder.step()
    model.eval()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin log p/(1 − p) of the labels, ``(M, Q)`` from logits ``(M, Q, classes)``."""
    logits = logits.double()
    own = nn.functional.one_hot(labels, logits.shape[-1]).bool().expand_as(logits)
    return logits[own].reshape(logits.shape[:-1]) - logits.masked_fill(own, -torch.inf).logsumexp(-1)
