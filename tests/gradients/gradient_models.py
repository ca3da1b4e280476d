"""The table of small models that every law of the gradients runs over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gradient_convolutions import Signals, Upwards, spread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def margin(model: nn.Module, batch: Any) -> Tensor:
    """log p_y of a classifier, one number per example."""
    x, y = batch
    return F.log_softmax(model(x), dim=-1).gather(1, y.unsqueeze(1)).squeeze(1)


def token_likelihood(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean log-likelihood of the tokens that are not padding (label -100)."""
    ids, labels = batch["input_ids"], batch["labels"]
    logits = model(ids)
    target = labels.clamp(min=0)
    counted = (labels >= 0).to(logits.dtype)
    each = F.log_softmax(logits, dim=-1).gather(2, target.unsqueeze(2)).squeeze(2)
    return (each * counted).sum(1) / counted.sum(1).clamp(min=1)


class InplaceMlp(nn.Sequential):
    """In-place activations right behind attributed layers, the first one too."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)
        )


class Cnn(nn.Module):
    """Stride, dilation, groups, padding modes, `same` padding of an even kernel, BatchNorm."""

    def __init__(self, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode=padding_mode)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, padding_mode=padding_mode, bias=False)
        self.depthwise = nn.Conv2d(6, 6, (2, 3), padding="same", groups=6, padding_mode=padding_mode)
        self.c = nn.Conv2d(6, 5, (3, 1), padding="valid")
        self.pointwise = nn.Conv2d(5, 4, 1, stride=2)
        self.head = nn.Linear(4, 4)
        spread(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.a(x)))
        x = F.relu(self.c(self.depthwise(self.b(x))), inplace=True)
        return self.head(self.pointwise(x).mean((2, 3)))


class ResidualBlocks(nn.Module):
    """In-place ReLU and `+=`, GroupNorm, and one block's weights used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, 8)
        self.batch_norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        spread(self.batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for _ in range(2):
            y = self.batch_norm(self.conv(self.relu(self.norm(x))))
            y += x
            x = self.relu(y)
        return self.head(self.dropout(x).mean((2, 3)))


class Conv1D(nn.Module):
    """The layer of this name in transformers: weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class LlamaRMSNorm(nn.Module):
    """The layer of this name in transformers."""

    def __init__(self, width: int, eps: float = 1e-2) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class GemmaRMSNorm(nn.Module):
    """Likewise: the weight is what is added to one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(width))
        self.eps = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class CentredRMSNorm(LlamaRMSNorm):
    """Its name promises what it does not keep."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class NormalisedTokens(nn.Module):
    """Embedding, a normalisation, a tied head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 6), norm
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.tokens(ids)))


class Decoder(nn.Module):
    """A tiny GPT: tied embedding and head, positions of arange(T), causal attention, padding masked by the labels."""

    def __init__(self, vocab: int = 11, width: int = 8, length: int = 6, batched_positions: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width, padding_idx=0)
        self.wpe = nn.Embedding(length, width)
        self.first = nn.LayerNorm(width)
        self.qkv = Conv1D(3 * width, width)
        self.out = nn.Linear(width, width)
        self.second = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.wte.weight
        self.batched_positions = batched_positions

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])
        x = self.wte(ids) + self.wpe(positions.unsqueeze(0) if self.batched_positions else positions)
        q, k, v = self.qkv(self.first(x)).chunk(3, dim=-1)
        heads = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(self.last(x))


class ProjectedPositions(nn.Module):
    """Two layers in a row that see no batch; then layers that see (B·T, …)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(6, 5)
        self.project = nn.Linear(5, 6)
        self.flat = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 11))
        self.norm = nn.BatchNorm1d(11)
        spread(self.norm)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.project(self.positions(torch.arange(ids.shape[1])))
        return self.norm(self.flat(x.flatten(0, 1))).view(*ids.shape, -1)


class RawParameter(nn.Module):
    """A parameter used in no covered layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(12) + 0.1 * torch.randn(12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) * self.scale)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(2))[0][:, -1])


class Distances(nn.Module):
    """What nobody follows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.matrix.T)


class BlockInPlaces(nn.Sequential):
    """One block in the place of two layers, under two names, which nothing but vmap can serve."""

    def __init__(self) -> None:
        block = nn.Sequential(Distances(12), nn.Tanh())
        super().__init__(nn.Flatten(), nn.Sequential(block, nn.Sequential(block)), nn.Linear(12, 4))


class FunctionalHead(nn.Module):
    """An embedding whose weight is also used outside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 5)
        self.mix = nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.wte(ids)).tanh() @ self.wte.weight.T


class TimeFirst(nn.Module):
    """Layers see (T, B, …)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 2, 2)
        return self.b(self.a(x.flatten(2).transpose(0, 1)).tanh()).sum(0)


class TimeFirstEncoder(nn.Module):
    """torch's own encoder by its default: (T, B, …), behind an embedding that sees it so, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 12)
        self.head = nn.Linear(8, 11, bias=False)
        self.register_buffer("positions", torch.randn(6, 1, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids.T) + self.positions
        return self.head(self.layer(x)).transpose(0, 1)


class DataDependent(nn.Module):
    """Control flow on values, which vmap refuses, and a raw parameter, which hooks refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 1.5))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * self.scale if bool(x.sum() != 0) else self.head(x.flatten(1))


class Encoder(nn.Module):
    """torch's own encoder layer, whose fused inference path skips its submodules, and a recomputed block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.embed(x.flatten(2)))
        return checkpoint(self.block, x, use_reentrant=False).mean(1)


class Frozen(nn.Module):
    """A part under no_grad and a part that is never used: both have zero gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(12, 5), nn.Linear(5, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x.flatten(1))
        return self.b(input=x)


def images(size: int, side: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, side, side), torch.randint(0, 4, (size,))


def tokens(size: int, length: int = 6) -> dict[str, Tensor]:
    """Sequences of which example b has its last b % 4 tokens padded."""
    ids = torch.randint(1, 11, (size, length))
    labels = ids.roll(-1, 1)
    for b in range(size):
        padded = length - b % 4
        ids[b, padded:] = 0
        labels[b, max(0, padded - 1) :] = -100
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Case:
    """A model, its batches, its scalar function, and the path that `auto` must end with."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    function: Callable[[nn.Module, Any], Tensor]
    method: str = "hooks"
    patterns: tuple[str, ...] | None = None
    rest: bool = False  # some parameters have a pass of their own beside the hooks

    def __str__(self) -> str:
        return self.name


def _image_case(name: str, model: Callable[[], nn.Module], side: int = 8, **options: Any) -> Case:
    return Case(name, model, lambda size: images(size, side), margin, **options)


def _token_case(name: str, model: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(name, model, tokens, token_likelihood, **options)


CASES = [
    _image_case("mlp", InplaceMlp, side=2),
    *(
        _image_case(f"cnn-{mode}", lambda mode=mode: Cnn(mode))
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    _image_case("residual", ResidualBlocks),
    _image_case("residual-late", ResidualBlocks, patterns=("norm.*", "conv.*", "!*.bias")),
    _image_case("residual-wide", ResidualBlocks, side=16),
    _image_case("signals", Signals),
    _image_case("upwards", Upwards),
    _image_case("upwards-running", lambda: Upwards(running=True), side=3),
    _image_case("synchronised", lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Signals())),
    _token_case("decoder", Decoder),
    _token_case("decoder-batched-positions", lambda: Decoder(batched_positions=True)),
    _token_case("decoder-no-embedding", Decoder, patterns=("*.bias", "up.*", "qkv.*")),
    _token_case("decoder-positions-only", Decoder, patterns=("wpe.*",)),
    _token_case("projected-positions", ProjectedPositions),
    _image_case("raw-parameter", RawParameter, side=2, rest=True),
    _image_case("raw-parameter-excluded", RawParameter, side=2, patterns=("head.*",)),
    _image_case("multihead-attention", Attention, side=2),
    _image_case("lstm", Recurrent, side=2),
    _image_case("block-in-places", BlockInPlaces, side=2, method="general"),
    _image_case(
        "weight-norm",
        lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(12, 4))),
        side=2,
        rest=True,
    ),
    _image_case(
        "instance-norm",
        lambda: nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.Flatten(), nn.Linear(12, 4)),
        side=2,
    ),
    _image_case("encoder", Encoder, side=2),
    _image_case("encoder-in-part", Encoder, side=2, patterns=("embed.*", "layer.*linear*", "layer.norm1.*", "block.*")),
    _image_case("encoder-covered", Encoder, side=2, patterns=("embed.*", "*.linear1.*", "*.norm2.*", "block.*")),
    _image_case("encoder-one-layer", Encoder, side=2, patterns=("*.linear1.*",)),
    _image_case("frozen-and-unused", Frozen, side=2),
    _token_case("llama-norm", lambda: NormalisedTokens(LlamaRMSNorm(6))),
    _token_case("gemma-norm", lambda: NormalisedTokens(GemmaRMSNorm(6))),
    _token_case("not-that-norm", lambda: NormalisedTokens(CentredRMSNorm(6)), method="general"),
    _token_case("functional-head", FunctionalHead, rest=True),
    _image_case("time-first", TimeFirst, side=2),
    _token_case("time-first-encoder", TimeFirstEncoder),
    _image_case("data-dependent", DataDependent, side=2, rest=True),
]
