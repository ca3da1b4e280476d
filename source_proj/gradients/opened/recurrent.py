"""torch's recurrent layers and cells, step by step.

The fused kernels keep the gates' gradients for themselves; per-example gradients of the weights need them. One node of
autograd stands for a direction of a layer: its forward pass keeps what each step's gates were, its backward pass goes
back through the steps, and hands out

    dz_t, the gradient of z_t = W x_t + b,    and    dy_t, that of y_t = U h_{t-1} + c,

whose products with x_t and h_{t-1} are the weights' gradients, and whose sums are the biases'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from source_proj.gradients.opened.opening import Forward, Opening, Part
from source_proj.gradients.suited import Unsuited

__all__ = ["forward_for"]

State = tuple[Tensor, ...]  # hidden state (B, H), and the LSTM's cell state
Rest = tuple[Tensor | None, ...]  # gradients of these; None for zero
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # W, U, b, c


class _Gates(NamedTuple):
    """One kind of step.

    Attributes:
        forward: (z, y, state) gives the next state, and what `backward` needs of it.
        backward: (gradients of the next state, kept) gives those of z, of y, and what reaches the state but by y.
    """

    forward: Callable[[Tensor, Tensor, State], tuple[State, State]]
    backward: Callable[[State, State], tuple[Tensor, Tensor, Rest]]


def _lstm(z: Tensor, y: Tensor, state: State) -> tuple[State, State]:
    i, f, g, o = (z + y).chunk(4, 1)
    i, f, g, o, before = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), state[1]
    after = f * before + i * g
    squashed = after.tanh()
    return (o * squashed, after), (i, f, g, o, before, squashed)


def _lstm_back(gradients: State, kept: State) -> tuple[Tensor, Tensor, Rest]:
    (dh, dc), (i, f, g, o, before, squashed) = gradients, kept
    dc = dc + dh * o * (1 - squashed * squashed)
    dz = torch.cat(
        [dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * squashed * o * (1 - o)], dim=1
    )
    return dz, dz, (None, dc * f)


def _gru(z: Tensor, y: Tensor, state: State) -> tuple[State, State]:
    (before,) = state
    (zr, zu, zn), (yr, yu, yn) = z.chunk(3, 1), y.chunk(3, 1)
    r, u = (zr + yr).sigmoid(), (zu + yu).sigmoid()
    n = (zn + r * yn).tanh()
    return (n + u * (before - n),), (r, u, n, yn, before)


def _gru_back(gradients: State, kept: State) -> tuple[Tensor, Tensor, Rest]:
    (dh,), (r, u, n, yn, before) = gradients, kept
    dn = dh * (1 - u) * (1 - n * n)
    dr, du = dn * yn * r * (1 - r), dh * (before - n) * u * (1 - u)
    return torch.cat([dr, du, dn], dim=1), torch.cat([dr, du, dn * r], dim=1), (dh * u,)


def _tanh(z: Tensor, y: Tensor, _state: State) -> tuple[State, State]:
    h = (z + y).tanh()
    return (h,), (h,)


def _tanh_back(gradients: State, kept: State) -> tuple[Tensor, Tensor, Rest]:
    dz = gradients[0] * (1 - kept[0] * kept[0])
    return dz, dz, (None,)


def _relu(z: Tensor, y: Tensor, _state: State) -> tuple[State, State]:
    h = (z + y).relu()
    return (h,), (h,)


def _relu_back(gradients: State, kept: State) -> tuple[Tensor, Tensor, Rest]:
    dz = gradients[0] * (kept[0] > 0)
    return dz, dz, (None,)


_GATES = {
    nn.LSTM: _Gates(_lstm, _lstm_back),
    nn.GRU: _Gates(_gru, _gru_back),
    nn.LSTMCell: _Gates(_lstm, _lstm_back),
    nn.GRUCell: _Gates(_gru, _gru_back),
}
_NONLINEAR = {"tanh": _Gates(_tanh, _tanh_back), "relu": _Gates(_relu, _relu_back)}


@dataclass(frozen=True)
class _Direction:
    """One direction of a layer.

    Attributes:
        gates: its kind of step.
        reverse: whether it begins with the last step.
        lengths: steps of each sequence (B,), None where all have the same.
        receive: gets x (B, T, i), the states h_{t-1} (B, T, H), dz and dy (B, T, G) when the gradient comes.
    """

    gates: _Gates
    reverse: bool
    lengths: Tensor | None
    receive: Callable[[Tensor, Tensor, Tensor, Tensor], None]

    def steps(self, count: int) -> Iterable[int]:
        """In the order of the recurrence."""
        return reversed(range(count)) if self.reverse else range(count)

    def goes_on(self, step: int) -> Tensor | None:
        """Which sequences have this step, (B, 1); None for all."""
        return None if self.lengths is None else (self.lengths > step)[:, None]


def _chosen(there: Tensor, these: State, others: State) -> State:
    return tuple(torch.where(there, this, other) for this, other in zip(these, others, strict=True))


class _Steps:
    """Tensors (B, …) of every step in one block each: thousands of small ones would leave holes in the heap.

    Args:
        count: number of steps.
        dim: of the block, which is that of the steps.
    """

    def __init__(self, count: int, dim: int) -> None:
        self._count, self._dim = count, dim
        self.blocks: tuple[Tensor, ...] = ()  # one for tensors that are the same at every step

    def put(self, step: int, *parts: Tensor) -> None:
        """Keep a step's tensors."""
        if not self.blocks:
            shapes = {id(part): (*part.shape[: self._dim], self._count, *part.shape[self._dim :]) for part in parts}
            made = {id(part): part.new_empty(shapes[id(part)]) for part in parts}
            self.blocks = tuple(made[id(part)] for part in parts)
        filled = {id(block): part for block, part in zip(self.blocks, parts, strict=True)}
        for block in {id(block): block for block in self.blocks}.values():
            block.select(self._dim, step).copy_(filled[id(block)])

    def at(self, step: int) -> State:
        """A step's tensors."""
        return tuple(block.select(self._dim, step) for block in self.blocks)


class Recurrence(torch.autograd.Function):
    """Hidden states (B, T, H) and the last state from x (B, T, i), the first state and the weights.

    `gradients/layout.py` knows it as a tap.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _anchor: Tensor, direction: _Direction, *given: Tensor | None
    ) -> tuple[Tensor, ...]:
        w, u, b, c = cast(Weights, given[:4])
        state = cast(State, given[4:])
        state = tuple(part.clone() for part in state)  # kept, whatever becomes of what was given
        z, count = F.linear(x, w, b), x.shape[1]
        kept, hidden, before = _Steps(count, 0), _Steps(count, 1), _Steps(count, 1)
        for t in direction.steps(count):
            before.put(t, state[0])
            after, needed = direction.gates.forward(z[:, t], F.linear(state[0], u, c), state)
            kept.put(t, *needed)
            there = direction.goes_on(t)
            state = after if there is None else _chosen(there, after, state)
            hidden.put(t, state[0])
        ctx.save_for_backward(x, w, u)
        ctx.direction, ctx.kept, (ctx.before,) = direction, kept, before.blocks
        ctx.set_materialize_grads(False)
        return *hidden.blocks, *(part.clone() for part in state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        direction: _Direction = ctx.direction
        (x, w, u), zero = ctx.saved_tensors, torch.zeros_like(ctx.before[:, 0])
        of_hidden, *ends = gradients
        state, whole = tuple(zero if end is None else end for end in ends), _Steps(x.shape[1], 1)
        for t in reversed(list(direction.steps(x.shape[1]))):
            if of_hidden is not None:
                state = (state[0] + of_hidden[:, t], *state[1:])
            there = direction.goes_on(t)
            reached = state if there is None else tuple(part * there for part in state)
            dz, dy, rest = direction.gates.backward(reached, ctx.kept.at(t))
            whole.put(t, dz, dy)
            earlier = (dy @ u.to(dy.dtype), *(zero for _ in rest[1:]))
            earlier = tuple(a if b is None else a + b for a, b in zip(earlier, rest, strict=True))
            state = earlier if there is None else _chosen(there, earlier, state)
        of_z, of_y = whole.blocks
        direction.receive(x, ctx.before, of_z, of_y)
        of_x = of_z @ w.to(of_z.dtype) if ctx.needs_input_grad[0] else None
        of_weights = (
            _product(of_z, x).to(w.dtype) if ctx.needs_input_grad[3] else None,
            _product(of_y, ctx.before).to(u.dtype) if ctx.needs_input_grad[4] else None,
            of_z.sum((0, 1)) if ctx.needs_input_grad[5] else None,
            of_y.sum((0, 1)) if ctx.needs_input_grad[6] else None,
        )
        return of_x, None, None, *of_weights, *state


def _product(g: Tensor, x: Tensor) -> Tensor:
    return g.flatten(0, 1).T @ x.flatten(0, 1).to(g.dtype)


def forward_for(module: nn.Module) -> Forward | None:
    """The tapped forward pass of a recurrent module of torch's; None for others, and for projected hidden states."""
    if hasattr(module, "parametrizations"):
        return None
    for base, forward in ((nn.RNNBase, _layers), (nn.RNNCellBase, _cell)):
        kinds = [kind for kind in (*_GATES, nn.RNN, nn.RNNCell) if issubclass(kind, base) and isinstance(module, kind)]
        if kinds and type(module).forward is kinds[0].forward and not getattr(module, "proj_size", 0):
            return partial(forward, _gates_of(module, kinds[0]))
    return None


def _gates_of(module: nn.Module, kind: type[nn.Module]) -> _Gates:
    return _GATES[kind] if kind in _GATES else _NONLINEAR[cast(str, module.nonlinearity)]


def _layers(gates: _Gates, module: nn.RNNBase, opening: Opening, input: Any, hx: Any = None) -> tuple[Any, Any]:
    """As the module's forward, for batches and for packed sequences."""
    packed, lengths = input if isinstance(input, PackedSequence) else None, None
    if packed is not None:
        x, there = pad_packed_sequence(packed, batch_first=True)
        lengths = there.to(x.device)
    else:
        x = input if module.batch_first else input.transpose(0, 1)
    if x.dim() != 3:
        raise Unsuited(f"a recurrent layer with an input of {x.dim()} dims, which has no batch")
    ways = 1 + module.bidirectional
    starts = _starts(module, x, hx)
    ends: list[State] = []
    for layer in range(module.num_layers):
        outputs = []
        for way in range(ways):
            suffix = f"l{layer}{'_reverse' * way}"
            output, end = _run(gates, module, opening, x, starts[ways * layer + way], f"_{suffix}", bool(way), lengths)
            outputs.append(output)
            ends.append(end)
        x = torch.cat(outputs, -1) if ways > 1 else outputs[0]
        if module.training and module.dropout and layer < module.num_layers - 1:
            x = F.dropout(opening.laid_out(x), module.dropout)
    lasts = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    last = lasts if len(lasts) > 1 else lasts[0]
    if packed is not None:
        return _packed(x, packed, cast(Tensor, lengths)), last
    x = opening.laid_out(x)
    return x if module.batch_first else x.transpose(0, 1), last


def _starts(module: nn.RNNBase, x: Tensor, hx: Any) -> list[State]:
    """The states that the directions of all layers begin with."""
    count, parts = module.num_layers * (1 + module.bidirectional), 2 if isinstance(module, nn.LSTM) else 1
    if hx is None:
        zero = x.new_zeros(len(x), module.hidden_size)
        return [(zero,) * parts] * count
    given = hx if isinstance(hx, tuple | list) else (hx,)
    return [tuple(part[place] for part in given) for place in range(count)]


def _packed(x: Tensor, like: PackedSequence, lengths: Tensor) -> PackedSequence:
    order = like.sorted_indices
    if order is not None:
        x, lengths = x.index_select(0, order), lengths[order]
    made = pack_padded_sequence(x, lengths.cpu(), batch_first=True)
    return PackedSequence(made.data, made.batch_sizes, order, like.unsorted_indices)


def _cell(gates: _Gates, module: nn.RNNCellBase, opening: Opening, input: Tensor, hx: Any = None) -> Any:
    """As the cell's forward: one step."""
    x = input
    if x.dim() != 2:
        raise Unsuited(f"a recurrent cell with an input of {x.dim()} dims, which has no batch")
    parts = 2 if isinstance(module, nn.LSTMCell) else 1
    given = hx if isinstance(hx, tuple | list) or hx is None else (hx,)
    start = (x.new_zeros(len(x), module.hidden_size),) * parts if given is None else tuple(given)
    _, end = _run(gates, module, opening, x.unsqueeze(1), start, "", False, None)
    return end if parts > 1 else end[0]


def _run(
    gates: _Gates,
    module: nn.Module,
    opening: Opening,
    x: Tensor,
    start: State,
    suffix: str,
    reverse: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    """Hidden states and last state of one direction."""
    names = [f"{kind}{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    found = [getattr(module, name, None) for name in names]
    weights = [None if weight is None else opening.value(weight) for weight in found]
    parts = [Part(name, 0, len(cast(Tensor, weights[0]))) for name in names]

    def receive(x: Tensor, before: Tensor, dz: Tensor, dy: Tensor) -> None:
        opening.product(dz, x, parts[0])
        opening.product(dy, before, parts[1])
        if weights[2] is not None:
            opening.sum(dz, parts[2])
            opening.sum(dy, parts[3])

    direction, start = _Direction(gates, reverse, lengths, receive), tuple(map(opening.met, start))
    apply = cast(Callable[..., tuple[Tensor, ...]], Recurrence.apply)
    output, *end = apply(x, opening.anchor, direction, *weights, *start)
    return opening.note(output, [x, *start]), tuple(end)
