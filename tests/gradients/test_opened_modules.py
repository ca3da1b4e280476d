"""Attention and recurrent layers of torch's, opened: rows are plain autograd's, in whatever way they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from opened_layers import CALLS, STEPS, WIDTH, Attending, Recurring
from torch import Tensor, nn

from source_proj._errors import GradientError
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.gradients.batches import batch_size, take
from source_proj.gradients.evaluation import evaluating
from source_proj.sketch import Sketch

SIZE = 4


def values_of(model: nn.Module, batch: Any) -> Tensor:
    """One number an example, of which every part of the output has a share."""
    output: Tensor = model(*batch)
    weights = torch.linspace(-1, 2, output[0].numel(), dtype=output.dtype)
    return output.flatten(1).tanh() @ weights


def assert_plain(model: nn.Module, batch: Any, method: str = "hooks") -> None:
    """Rows by the engine are those of a backward pass for each example, and the model is left as it was."""
    before = dict(vars(model.get_submodule("layer")))
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    _, rows = engine.sketch(values_of, batch)
    assert engine.method == method, engine.reason
    assert before.keys() == vars(model.get_submodule("layer")).keys()
    model.eval()
    for b in range(batch_size(batch)):
        model.zero_grad(set_to_none=True)
        values_of(model, take(batch, [b]))[0].backward()
        plain = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        torch.testing.assert_close(rows[b], plain, rtol=1e-4, atol=1e-5 * float(plain.norm()))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_attention(call: str, batch_first: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = Attending(CALLS[call], batch_first=batch_first, **options)
    if model.layer.in_proj_bias is not None:
        nn.init.normal_(model.layer.in_proj_bias)
    x, other = torch.randn(SIZE, STEPS, WIDTH), torch.randn(SIZE, STEPS + 2, WIDTH)
    assert_plain(model, (x, other, torch.tensor([7, 3, 1, 5])))


def test_attention_with_keys_and_values_of_other_widths() -> None:
    torch.manual_seed(2)

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(WIDTH, 3, kdim=4, vdim=5, batch_first=True)

        def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output: Tensor = self.layer(x, key, value, need_weights=False)[0]
            return output

    model = Across()
    nn.init.normal_(model.layer.in_proj_bias)
    assert_plain(model, (torch.randn(SIZE, 2, WIDTH), torch.randn(SIZE, STEPS, 4), torch.randn(SIZE, STEPS, 5)))


@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    layers=st.integers(1, 3),
    switches=st.tuples(*[st.booleans()] * 6),
    seed=st.integers(0, 1000),
)
def test_recurrent_layers(kind: type[nn.RNNBase], layers: int, switches: tuple[bool, ...], seed: int) -> None:
    torch.manual_seed(seed)
    packed, started, bias, batch_first, bidirectional, relu = switches
    options: dict[str, Any] = {"nonlinearity": "relu"} if kind is nn.RNN and relu else {}
    options |= {"dropout": 0.4} if layers > 1 else {}
    model = Recurring(
        kind, packed, started, num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional,
        **options,
    )  # fmt: skip
    lengths = torch.randint(1, STEPS + 1, (SIZE,))
    assert_plain(model, (torch.randn(SIZE, STEPS, WIDTH), lengths))


class Stepping(nn.Module):
    """A cell in a loop of one's own."""

    def __init__(self, cell: nn.Module, started: bool) -> None:
        super().__init__()
        self.layer, self.started = cell, started

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        if self.started:
            zero = x.new_zeros(len(x), 4)
            state = (zero, zero) if isinstance(self.layer, nn.LSTMCell) else zero
        hidden = []
        for t in range(x.shape[1]):
            state = self.layer(x[:, t], state)
            hidden.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(hidden, dim=1)


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind: Any, bias: bool, started: bool) -> None:
    torch.manual_seed(0)
    assert_plain(Stepping(kind(WIDTH, 4, bias=bias), started), (torch.randn(SIZE, STEPS, WIDTH),))


class Several(nn.Module):
    """Three sequences an example, in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(WIDTH, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        ends: Tensor = self.head(self.layer(x.flatten(0, 1))[1][0])
        return ends.unflatten(0, x.shape[:2])


def test_several_sequences_an_example() -> None:
    torch.manual_seed(0)
    assert_plain(Several(), (torch.randn(SIZE, 3, STEPS, WIDTH),))


class Translating(nn.Module):
    """A decoder that begins where an encoder ended: no other way leads from the encoder to the values."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.layer = nn.LSTM(WIDTH, 4, batch_first=True), nn.LSTM(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x.flip(1), self.encoder(x)[1])[0]
        return output


def test_states_lead_to_the_layers_that_made_them() -> None:
    torch.manual_seed(0)
    assert_plain(Translating(), (torch.randn(SIZE, STEPS, WIDTH),))


class Shared(nn.Module):
    """A module whose weight is used outside of it, too; a modality that is missing hides the module's own use."""

    def __init__(self, layer: nn.Module, weight: str) -> None:
        super().__init__()
        self.layer, self.weight, self.head = layer, weight, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        given = (y, y, y) if isinstance(self.layer, nn.MultiheadAttention) else (y,)
        head: Tensor = self.head(F.linear(x, getattr(self.layer, self.weight)[:WIDTH]) + self.layer(*given)[0])
        return head


@pytest.mark.parametrize(
    ("kind", "weight"), [(nn.MultiheadAttention, "in_proj_weight"), (nn.LSTM, "weight_ih_l0"), (nn.GRU, "weight_hh_l0")]
)
def test_a_weight_that_is_used_outside_of_its_module(kind: Any, weight: str) -> None:
    torch.manual_seed(0)
    model = Shared(kind(WIDTH, 2 if kind is nn.MultiheadAttention else WIDTH, batch_first=True), weight)
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    for y in (torch.zeros(SIZE, STEPS, WIDTH), torch.randn(SIZE, STEPS, WIDTH)):
        batch = torch.randn(SIZE, STEPS, WIDTH), y
        rows = engine.sketch(values_of, batch)[1]
        general = gradient_engine(model, space, Sketch(space.size, "identity"), "general").sketch(values_of, batch)[1]
        torch.testing.assert_close(rows, general, rtol=1e-4, atol=1e-4)


def test_a_start_that_is_changed_later() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRUCell(WIDTH, 4)

        def forward(self, x: Tensor, change: Tensor) -> Tensor:
            start = x[:, 0, :4].clone()
            after: Tensor = self.layer(x[:, 1], start)
            start += change[:, None]
            return after

    torch.manual_seed(0)
    model = Changing()
    space = ParameterSpace.from_model(model, ["layer.weight_ih", "layer.bias_*"])
    engine = gradient_engine(model, space, Sketch(space.size, "identity"))
    for change in (0.0, 5.0):
        batch = torch.randn(SIZE, 2, WIDTH), torch.full((SIZE,), change)
        rows = engine.sketch(values_of, batch)[1]
        model.layer.weight_hh.requires_grad_(False)  # torch refuses the change where this has a gradient
        expected = gradient_engine(model, space, Sketch(space.size, "identity"), "general").sketch(values_of, batch)[1]
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.LSTM])
def test_under_autocast(kind: Any) -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer = nn.Linear(WIDTH, WIDTH), kind(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            made = self.layer(x[:, 0]) if kind is not nn.LSTM else self.layer(x.transpose(0, 1))[0].transpose(0, 1)
            return made[0] if kind is nn.LSTMCell else made

    torch.manual_seed(0)
    model, x = Behind(), torch.randn(SIZE, STEPS, WIDTH)
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, Sketch(space.size, "identity"), autocast="bfloat16")
    _, rows = engine.sketch(lambda model, x: values_of(model, (x,)), x)
    assert engine.method == "hooks", engine.reason
    plain = gradient_engine(model, space, Sketch(space.size, "identity"), "general")
    expected = plain.sketch(lambda model, x: values_of(model, (x,)), x)[1]
    assert (rows - expected).norm() < 0.05 * expected.norm()


def test_an_encoder_with_padding() -> None:
    """torch's own fast path for padded batches, which is for inference, is not met."""

    class Encoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True), 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            padded = torch.arange(x.shape[1]) >= lengths[:, None]
            made: Tensor = self.layer(x, src_key_padding_mask=padded)
            return made.masked_fill(padded[..., None], 0.0)

    torch.manual_seed(0)
    assert_plain(Encoding(), (torch.randn(SIZE, STEPS, WIDTH), torch.tensor([5, 2, 1, 4])))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(WIDTH, 4, batch_first=True, proj_size=2),
        nn.utils.parametrizations.weight_norm(nn.GRU(WIDTH, 4, batch_first=True), "weight_hh_l0"),
        nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True),
        nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_zero_attn=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_has_no_forward_pass_of_ours_goes_the_general_way(layer: nn.Module) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = (self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x))[
                0
            ]
            return output

    assert_plain(Wrapped(), (torch.randn(SIZE, STEPS, WIDTH),), method="general")


def test_time_in_the_place_of_examples_is_refused() -> None:
    """A common slip: (B, T, i) given to a layer that expects (T, B, i)."""
    torch.manual_seed(0)

    class Slip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x)[0]
            return output

    space = ParameterSpace.from_model(Slip())
    for steps in (SIZE, 2 * SIZE, 3):
        engine = gradient_engine(Slip(), space, Sketch(64))
        with pytest.raises(GradientError, match="must not depend on the other examples"):
            engine.sketch(values_of, (torch.randn(SIZE, steps, WIDTH),))


def test_a_recurrent_layer_in_training_mode_is_as_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN goes backward in training mode alone, so that such layers stay there, without dropout."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(WIDTH, 4, num_layers=2, dropout=0.9), nn.Dropout(0.9)]).train()
    x = torch.randn(STEPS, SIZE, WIDTH)
    monkeypatch.setattr("source_proj.gradients.evaluation._fused", lambda module: isinstance(module, nn.RNNBase))
    for training in (True, False):
        model.train(training)
        with evaluating(model):
            assert model[0].training
            assert not model[1].training
            torch.testing.assert_close(model[0](x)[0], model[0](x)[0], rtol=0, atol=0)
        assert (model[0].training, model[1].training, model[0].dropout) == (training, training, 0.9)
