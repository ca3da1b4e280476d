"""Mixtures of experts of transformers, whose weights (E, o, i) a router picks for each token."""

import copy
import itertools

import pytest
import torch
from example_rows import captured_rows, hooked_rows, plain_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import source_proj as sp
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.gradients.opened import experts as opened
from source_proj.gradients.opened import forward_for

moe = pytest.importorskip("transformers.integrations.moe", reason="needs transformers: install source-proj[hf]")

SIZE, LENGTH, WIDTH, INNER, EXPERTS, SEVERAL = 4, 5, 8, 4, 3, 2  # grouped products want strides of 16 bytes
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
FLAGS = [dict(zip(("has_gate", "has_bias", "is_transposed"), flags, strict=True))
         for flags in itertools.product([True, False], repeat=3)]  # fmt: skip


class Told:
    """A configuration."""

    def __init__(self, implementation):
        self._experts_implementation = implementation


def weights_of(experts, has_gate, has_bias, is_transposed):
    """A weight and perhaps a bias of both products."""
    outputs = {"gate_up_proj" if has_gate else "up_proj": (2 * INNER if has_gate else INNER, WIDTH)}
    for name, (o, i) in {**outputs, "down_proj": (WIDTH, INNER)}.items():
        shape = (EXPERTS, i, o) if is_transposed else (EXPERTS, o, i)
        setattr(experts, name, nn.Parameter(torch.randn(shape)))
        if has_bias:
            setattr(experts, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, o)))


def experts_of(implementation, **flags):
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
            weights_of(self, **flags)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            """Each expert by itself, and nothing by numbers past the last one."""
            total = torch.zeros_like(hidden_states)
            for e in range(EXPERTS):
                token, which = torch.where(top_k_index == e)
                up = self._linear(hidden_states[token], "gate_up_proj" if self.has_gate else "up_proj", e)
                down = self._linear(self._apply_gate(up) if self.has_gate else self.act_fn(up), "down_proj", e)
                total = total.index_add(0, token, (down * top_k_weights[token, which, None]).to(total.dtype))
            return total

        def _linear(self, x, name, e):
            weight = getattr(self, name)[e]
            bias = getattr(self, f"{name}_bias")[e] if self.has_bias else None
            return nn.functional.linear(x, weight.T if self.is_transposed else weight, bias)

    return moe.use_experts_implementation(**flags)(Experts)(Told(implementation))


class Mixture(nn.Module):
    """Tokens through a router and its experts, then a number for each example."""

    def __init__(self, implementation="eager", **flags):
        super().__init__()
        self.before, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts, self.head = experts_of(implementation, **flags), nn.Linear(WIDTH, 3)

    def forward(self, x):
        tokens = self.before(x).reshape(-1, WIDTH)
        weights, chosen = self.router(tokens).softmax(-1).topk(SEVERAL, dim=-1)
        return self.head(self.experts(tokens, chosen, weights).reshape(x.shape).tanh().sum(1))


def values_of(model, batch):
    return model(batch).tanh() @ torch.tensor([1.0, -2.0, 0.5], device="cpu", dtype=torch.float32)


def near(rows, expected):
    return float((rows - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rows_are_each_examples_gradient(tmp_path, flags, implementation):
    model, batch = Mixture(implementation, **flags), torch.randn(SIZE, LENGTH, WIDTH)
    expected = plain_rows(model, values_of, batch.split(1))
    rows, _ = hooked_rows(copy.deepcopy(model), values_of, batch)
    assert near(rows, expected)
    assert near(captured_rows(tmp_path, model, values_of, batch, SIZE), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_capture_trains_as_the_model_does_without(tmp_path, implementation, autocast):
    model = Mixture(implementation, has_gate=True, has_bias=False, is_transposed=False)
    batches, ends = torch.randn(3, SIZE, LENGTH, WIDTH), []
    for captured in (False, True):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        options = {"capture": sp.Sketch(64), "task": sp.Classification(), "examples": SIZE} if captured else {}
        recorder = sp.Recorder(trained, optimizer, tmp_path / str(captured), **options)
        for batch in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = values_of(trained, batch).mean()
            loss.backward()
            optimizer.step()
            recorder.step(ids=range(SIZE)) if captured else recorder.step()
        ends.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    begin = torch.cat([p.detach().flatten() for p in model.parameters()])
    # Sums of halves in another order differ by their rounding; those of what is not halved hardly do.
    assert float((ends[1] - ends[0]).norm()) <= (2e-2 if autocast else 1e-5) * float((ends[0] - begin).norm())


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_sums_by_expert_are_those_of_each_row_by_itself(size, each, experts, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randint(experts, (size * each,), generator=generator)
    left, right = (torch.randn(size * each, width, generator=generator) for width in (3, 2))
    expected = torch.zeros(size, experts, 3, 2, device="cpu", dtype=torch.float32)
    for row, expert in enumerate(chosen.tolist()):
        expected[row // each, expert] += left[row, :, None] * right[row]
    torch.testing.assert_close(opened._weights(left, right, chosen, size, experts), expected.flatten(1))


def test_tokens_of_no_expert_give_nothing():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts_of("eager", has_gate=True, has_bias=True, is_transposed=False)

        def forward(self, x):
            tokens = x.reshape(-1, WIDTH)
            chosen = (100 * tokens[:, :SEVERAL].abs()).long() % (EXPERTS + 1)
            return self.experts(tokens, chosen, tokens[:, :SEVERAL]).reshape(x.shape).sum(1)[:, :3]

    model, batch = Routed(), torch.randn(SIZE, LENGTH, WIDTH)
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, sp.Sketch(space.size, "identity"), "hooks")
    values, rows = engine.sketch(values_of, batch)
    torch.testing.assert_close(values, values_of(model, batch).detach())
    assert near(rows, plain_rows(model, values_of, batch.split(1)))


def test_what_the_forward_pass_does_not_know_is_not_opened():
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False}
    assert forward_for(experts_of("eager", **flags)) is opened.forward
    for change in ("has_post_expert_norm", "_is_expert_parallel"):
        experts = experts_of("eager", **flags)
        setattr(experts, change, True)
        assert forward_for(experts) is None
    experts = experts_of("eager", **flags)
    experts.scale = nn.Parameter(torch.ones(EXPERTS, device="cpu", dtype=torch.float32))
    assert forward_for(experts) is None
