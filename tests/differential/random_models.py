"""Random models, put together of steps in a row: those of `random_steps.py`, and the ragged and broadcast ones here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_bare_steps import BARE
from random_steps import STEPS, VOCABULARY, Batch, D, Step, T, layer, linear, step
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

__all__ = ["BARE", "STEPS", "RandomModel", "make_batch", "value"]

# Ragged rows ---------------------------------------------------------------------------------------------------------


@step
def on_valid_tokens(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        return torch.zeros_like(h).masked_scatter(batch["mask"][..., None], made(h[batch["mask"]]).tanh())

    return run


@step
def summed_by_index(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        example = batch["mask"].nonzero()[:, 0]
        total = torch.zeros(len(h), D).index_add(0, example, made(h[batch["mask"]]))
        return h + total[:, None]

    return run


@step
def split_by_length(owner: nn.Module) -> Step:
    made = linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        parts = made(h[batch["mask"]]).split(batch["mask"].sum(1).tolist())
        return h + torch.stack([part.mean(0) for part in parts])[:, None]

    return run


@step
def experts(owner: nn.Module) -> Step:
    both = [linear(owner), linear(owner)]

    def run(h: Tensor, batch: Batch) -> Tensor:
        out, route = torch.zeros_like(h), batch["ids"] % 2
        for number, expert in enumerate(both):
            out[route == number] = expert(h[route == number])
        return out

    return run


@step
def capacity(owner: nn.Module) -> Step:
    """The two tokens of each example with the largest score go to an expert."""
    made = linear(owner)

    def run(h: Tensor, _: Batch) -> Tensor:
        places = h.sum(-1).topk(2, dim=1).indices[..., None].expand(-1, -1, D)
        return h.scatter_add(1, places, made(h.gather(1, places)).tanh())

    return run


@step
def dispatched(owner: nn.Module) -> Step:
    """All tokens of a batch in the slots of two experts, by a product with ones and zeros."""
    both = [linear(owner), linear(owner)]

    def run(h: Tensor, batch: Batch) -> Tensor:
        route = F.one_hot(batch["ids"].flatten() % 2, 2).bool()
        slots = (
            F.one_hot((route.cumsum(0) - 1).clamp(min=0), route.shape[0]) * route[..., None]
        )  # (tokens, experts, slots)
        sent = torch.einsum("td,tes->esd", h.flatten(0, 1), slots.float())
        made = torch.stack([expert(part) for expert, part in zip(both, sent, strict=True)])
        return torch.einsum("esd,tes->td", made, slots.float()).view(h.shape)

    return run


# Broadcasts and whole blocks -----------------------------------------------------------------------------------------


@step
def broadcast(owner: nn.Module) -> Step:
    made, alone = linear(owner), linear(owner)
    owner.register_buffer("grid", torch.randn(1, T, D))
    return lambda h, _: h + made(h.mean(1, keepdim=True)) + alone(owner.grid).tanh()


@step
def attention(owner: nn.Module) -> Step:
    made = layer(owner, nn.Linear(D, 3 * D))

    def run(h: Tensor, batch: Batch) -> Tensor:
        q, k, v = made(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=batch["mask"][:, None, None])
        return h + mixed.transpose(1, 2).flatten(2)

    return run


@step
def multihead(owner: nn.Module) -> Step:
    made = layer(owner, nn.MultiheadAttention(D, 2, batch_first=True))
    return lambda h, _: made(h, h, h, need_weights=False)[0]


@step
def recurrent(owner: nn.Module) -> Step:
    lstm, gru = layer(owner, nn.LSTM(D, D, batch_first=True)), layer(owner, nn.GRU(D, D, batch_first=True))
    return lambda h, _: lstm(h)[0] + gru(h)[0]


@step
def packed(owner: nn.Module) -> Step:
    lstm, made = layer(owner, nn.LSTM(D, D, batch_first=True)), linear(owner)

    def run(h: Tensor, batch: Batch) -> Tensor:
        lengths = batch["mask"].sum(1).cpu()
        rows = pack_padded_sequence(made(h), lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(lstm(rows)[0], batch_first=True, total_length=T)[0]

    return run


class RandomModel(nn.Module):
    """Steps in a row, behind an embedding and before a head."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, D)
        self.steps = nn.ModuleList(nn.Module() for _ in names)
        self._run = [STEPS[name](owner) for name, owner in zip(names, self.steps, strict=True)]
        self.head = nn.Linear(D, 3)

    def forward(self, batch: Batch) -> Tensor:
        h = self.tokens(batch["ids"]) + batch["features"]
        for run in self._run:
            h = run(h, batch).tanh()
        return self.head(h.mean(1))


def value(model: nn.Module, batch: dict[str, Batch | Tensor]) -> Tensor:
    """Log-likelihood of the label; an example of weight 0 has no gradient."""
    logits = model(batch["inputs"])
    chosen = logits.log_softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
    return chosen * batch["weight"]


def make_batch(size: int, gradients: str) -> dict[str, Batch | Tensor]:
    """A nested batch; `gradients` says which examples have one: "all", "some" or "none"."""
    lengths = torch.randint(1, T + 1, (size,))
    weight = {"all": torch.ones(size), "some": torch.randint(0, 2, (size,)).float(), "none": torch.zeros(size)}
    inputs = {
        "ids": torch.randint(0, VOCABULARY, (size, T)),
        "features": torch.randn(size, T, D),
        "mask": torch.arange(T) < lengths[:, None],
        "flag": torch.rand(size) < 0.3,
    }
    return {"inputs": inputs, "labels": torch.randint(0, 3, (size,)), "weight": weight[gradients]}
