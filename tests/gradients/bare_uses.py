"""Parameters of no layer, in the ways that models use them: those that are followed, and those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS, WIDTH, HEADS = 5, 6, 2


class Bare(nn.Module):
    """A layer, a use of bare parameters, a layer."""

    def __init__(self, use: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.p = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("index", torch.tensor([3, 0, 0, 2]))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(self.use(self.first(x), *self.p, **({"index": self.index} if len(self.p) > 2 else {})))
        return last


def attended(x: Tensor, bias: Tensor) -> Tensor:
    heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias).transpose(1, 2).flatten(2)


def changed(x: Tensor, p: Tensor) -> Tensor:
    x = x.clone()
    x += p
    x *= 2
    return x


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


FOLLOWED: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "expanded, time first": (
        lambda x, p: (x.transpose(0, 1) * p.expand(-1, len(x), -1)).transpose(0, 1),
        ((STEPS, 1, WIDTH),),
    ),
    "positions": (lambda x, p: x + p, ((1, STEPS, WIDTH),)),
    "positions without a first dim": (lambda x, p: p + x, ((STEPS, WIDTH),)),
    "a slice of positions": (lambda x, p: x + p[:, : x.shape[1]], ((1, STEPS + 3, WIDTH),)),
    "resized positions": (
        lambda x, p: x + F.interpolate(p.transpose(1, 2), STEPS, mode="linear").transpose(1, 2),
        ((1, 3, WIDTH),),
    ),
    "a class token": (lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1), ((1, 1, WIDTH),)),
    "a class token, repeated": (lambda x, p: torch.cat([p.repeat(len(x), 1, 1), x], 1), ((1, 1, WIDTH),)),
    "a class token and positions": (
        lambda x, c, p: torch.cat([c.expand(len(x), -1, -1), x], 1) + p,
        ((1, 1, WIDTH), (1, STEPS + 1, WIDTH)),
    ),
    "a scale": (lambda x, p: x * p, ((),)),
    "a scale of each feature": (lambda x, p: x * p.exp(), ((WIDTH,),)),
    "less, and over": (lambda x, p, q: (x - p) / (q.square() + 1), ((WIDTH,), (STEPS, 1))),
    "from the left": (lambda x, p: p / (x.square() + 1) - p, ((WIDTH,),)),
    "twice": (lambda x, p: (x + p) * p, ((WIDTH,),)),
    "made of two": (lambda x, p, q: x + torch.outer(p, q.softmax(0)), ((STEPS,), (WIDTH,))),
    "in place": (changed, ((WIDTH,),)),
    "where": (lambda x, p: torch.where(x > 0, x, p), ((WIDTH,),)),
    "a bias of attention": (attended, ((HEADS, STEPS, STEPS),)),
    "an entry of a constant index": (
        lambda x, p, _q, _r, index: x + p[index].sum(0), ((4, WIDTH), (1,), (1,)),
    ),
    "several rows an example": (
        lambda x, p: (x.flatten(0, 1) + p).unflatten(0, x.shape[:2]), ((WIDTH,),),
    ),
    "a product": (lambda x, p: x @ p, ((WIDTH, WIDTH),)),
    "a product with what is transposed": (lambda x, p: torch.matmul(x, p.T) + x @ p.t().exp(), ((WIDTH, WIDTH),)),
    "a linear function": (lambda x, p, q: F.linear(x, p, q), ((WIDTH, WIDTH), (WIDTH,))),
    "a bias alone": (lambda x, p: F.linear(x, torch.eye(WIDTH), p), ((WIDTH,),)),
    "a product in low rank": (lambda x, p, q: x + x @ p @ q, ((WIDTH, 2), (2, WIDTH))),
    "a product of two": (lambda x, p, q: x @ (p @ q), ((WIDTH, 2), (2, WIDTH))),
    "flat rows": (
        lambda x, p, q: torch.addmm(q, x.flatten(0, 1), p).unflatten(0, x.shape[:2]), ((WIDTH, WIDTH), (WIDTH,)),
    ),
    "a normalisation": (lambda x, p, q: F.layer_norm(x, (WIDTH,), p, q), ((WIDTH,), (WIDTH,))),
    "a normalisation by its size": (lambda x, p: F.rms_norm(x, (WIDTH,), weight=p), ((WIDTH,),)),
    "a table": (lambda x, p: x + F.embedding((x[..., 0] > 0).long(), p), ((3, WIDTH),)),
    "a table with padding": (lambda x, p: x + F.embedding((x[..., 0] > 0).long(), p, -2), ((3, WIDTH),)),
    "a sum of products": (lambda x, p: torch.einsum("btw,wv->btv", x, p), ((WIDTH, WIDTH),)),
    "a sum of products, turned": (lambda x, p: torch.einsum("vw,btw->bvt", p, x).mT, ((WIDTH, WIDTH),)),
    "a sum of products with dots": (lambda x, p: torch.einsum("...w,wv->...v", x, p), ((WIDTH, WIDTH),)),
    "a sum of products with dots for all": (lambda x, p: torch.einsum("...w,...w->...w", x, p), ((STEPS, WIDTH),)),
    "a sum of products with dots of one": (
        lambda x, p: torch.einsum("b...w,...vw->b...v", x, p).repeat(1, 1, 2)[..., :WIDTH], ((1, 4, WIDTH),),
    ),
    "a sum of products without an arrow": (lambda x, p: torch.einsum("btw,wz", x, p), ((WIDTH, WIDTH),)),
    "dots without an arrow": (lambda x, p: torch.einsum("...w, wz", x, p), ((WIDTH, WIDTH),)),
    "dims by number": (lambda x, p: torch.einsum(x, [0, 1, 2], p, [2], [0, 1, 2]), ((WIDTH,),)),
    "heads of a product": (
        lambda x, p: torch.einsum("b t w, w h d -> b h t d", x, p).transpose(1, 2).flatten(2), ((WIDTH, HEADS, 3),),
    ),
    "heads that are summed over": (
        lambda x, p: torch.einsum("bthd,hdw->btw", x.unflatten(-1, (HEADS, -1)), p), ((HEADS, 3, WIDTH),),
    ),
    "a product of each head": (
        lambda x, p: torch.einsum("bthd,hde->bthe", x.unflatten(-1, (HEADS, -1)), p).flatten(2), ((HEADS, 3, 3),),
    ),
    "a product of three": (lambda x, p, q: torch.einsum("btw,w,tw->btw", x, p, q), ((WIDTH,), (STEPS, WIDTH))),
    "a product with a number": (lambda x, p, q: torch.einsum(",btw,w->btw", p, x, q), ((), (WIDTH,))),
    "operands in a list": (lambda x, p: x + torch.einsum("btw,w->bt", [x, p])[..., None], ((WIDTH,),)),
    "the examples later": (lambda x, p: torch.einsum("btw,wv->tbv", x, p).transpose(0, 1), ((WIDTH, WIDTH),)),
    "before the examples": (lambda x, p: p @ x, ((STEPS, STEPS),)),
    "a product with a vector": (lambda x, p, q: x + (x @ p)[..., None] + (q @ x)[:, None], ((WIDTH,), (STEPS,))),
    "matrices of heads": (
        lambda x, p: (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) @ p).transpose(1, 2).flatten(2), ((HEADS, 3, 3),),
    ),
    "matrices of heads, before": (
        lambda x, p: (p @ x.unflatten(-1, (HEADS, -1)).transpose(1, 2)).transpose(1, 2).flatten(2),
        ((HEADS, STEPS, STEPS),),
    ),
    "entries by value": (lambda x, p: x + p[(x[..., 0] > 0).long()], ((2, WIDTH),)),
    "entries by two values": (
        lambda x, p: x + p[(x[..., 0] > 0).long(), -(x[..., 1] > 0).long()], ((2, 3, WIDTH),),
    ),
    "numbers by value": (lambda x, p: x * p[(x > 0).int().long()], ((2,),)),
    "rows by value": (
        lambda x, p: x + p.exp().index_select(0, (x[:, 0, 0] > 0).long())[:, None], ((2, WIDTH),),
    ),
    "a table that is made": (lambda x, p: x + F.embedding((x[..., 0] > 0).long(), p.exp(), 0), ((3, WIDTH),)),
    "repeated for each example": (
        lambda x, p: torch.bmm(x, p.sin().repeat(len(x), 1, 1)[::HEADS]), ((HEADS, WIDTH, WIDTH),),
    ),
    "a convolution": (lambda x, p, q: F.conv1d(x.mT, p, q, padding=1).mT, ((WIDTH, WIDTH, 3), (WIDTH,))),
    "a convolution in groups": (
        lambda x, p: F.conv1d(x.mT, p / p.norm(), padding=2, dilation=2, groups=2).mT, ((WIDTH, 3, 3),),
    ),
    "a convolution of pictures": (lambda x, p: F.conv2d(x[:, None], p, padding=(0, 1))[:, 0], ((1, 1, 1, 3),)),
    "a convolution's bias": (lambda x, p: F.conv1d(x.mT, torch.ones(WIDTH, 1, 3), p, 1, 1, 1, WIDTH).mT, ((WIDTH,),)),
    "a named tuple of tensors": (
        lambda x, p: torch.cat(Pair(p.expand(len(x), -1, -1), x), 1) + torch.cat(Pair(p[0], p[0])).mean(0),
        ((1, 1, WIDTH),),
    ),
    "used by no value": (lambda x, p: x + 0 * p.detach(), ((WIDTH,),)),
}  # fmt: skip
APART: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "distances": (lambda x, p: x + torch.cdist(x, p), ((WIDTH, WIDTH),)),
    "in the examples' place": (lambda x, p: x + F.linear(p[None], x[:, 0]).t()[..., None], ((WIDTH,),)),
    "time first": (lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1), ((STEPS, 1, WIDTH),)),
}


class BesideTheBatch(nn.Module):
    """A layer of constants, whose output is put to some use; it may see the examples, too."""

    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body, self.table, self.use = nn.Linear(WIDTH, 3), nn.Linear(1, 3), use

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.use(self.body(x), self.table(torch.linspace(0, 1, 3)[:, None]), self.table)
        return made


BESIDE: dict[str, Callable[..., Tensor]] = {
    "sum": lambda h, table, _: h * table.sum(),
    "transpose": lambda h, table, _: h @ table.mT,
    "view": lambda h, table, _: h @ table.view(-1).view(3, 3),
    "norm": lambda h, table, _: h / table.norm(),
    "by distance": lambda h, table, _: (h[..., None] * table.T[None]).sum(-1).tanh(),
    "for the examples, too": lambda h, table, layer: layer(h[..., None]).flatten(1).tanh()[..., :3] @ table.mT,
}
BESIDE_REFUSED: dict[str, Callable[..., Tensor]] = {"distances": lambda h, table, _: -torch.cdist(h, table)}
