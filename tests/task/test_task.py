"""Tasks against torch's own losses, whole batches against ``vmap(grad)``."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, mse_loss, softplus

from source_proj.task import CausalLM, Classification, Regression

B, D, C, T, V = 6, 4, 5, 7, 11


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Classifier(nn.Module):
    """A small network in double precision; ``form`` is how it hands over its logits."""

    def __init__(self, width=C, form="tensor"):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, width)).double()
        self.form = form

    def forward(self, inputs):
        logits = self.layers(inputs)
        return {
            "tensor": logits,
            "object": SimpleNamespace(logits=logits),
            "dict": {"logits": logits},
            "tuple": (logits, None),
        }[self.form]


class Decoder(nn.Module):
    """Tokens to logits, with a look at the token before; called as transformers' models are."""

    def __init__(self, form="object"):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(V, 8)
        self.head = nn.Linear(8, V)
        self.form = form
        self.double()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        hidden = hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        logits = self.head(hidden.tanh())
        return SimpleNamespace(logits=logits) if self.form == "object" else logits


INPUTS = torch.randn(B, D, generator=generator(), dtype=torch.float64)
LABELS = torch.randint(C, (B,), generator=generator())
TARGETS = torch.randn(B, generator=generator(), dtype=torch.float64)
WEIGHTS = torch.rand(B, generator=generator(), dtype=torch.float64) + 0.5
TOKENS = torch.randint(V, (B, T), generator=generator())
TOKEN_LABELS = TOKENS.masked_fill(torch.rand(B, T, generator=generator()) < 0.4, -100)
TOKEN_LABELS[3] = -100


def token_loss(logits, labels, reduction):
    """Per-sequence cross-entropy by torch, 0 where nothing counts."""
    total = torch.stack([cross_entropy(z, y, reduction="sum") for z, y in zip(logits, labels, strict=True)])
    return total if reduction == "sum" else total / (labels != -100).sum(1).clamp(min=1)


# name: (task, model, batch, torch's own loss of each example)
CASES = {
    "classification": (
        Classification(),
        Classifier(),
        (INPUTS, LABELS),
        lambda model: cross_entropy(model(INPUTS), LABELS, reduction="none"),
    ),
    "classification, int32 labels": (
        Classification(),
        Classifier(),
        [INPUTS, LABELS.int()],
        lambda model: cross_entropy(model(INPUTS), LABELS, reduction="none"),
    ),
    "classification, dict batch, object output": (
        Classification(),
        Classifier(form="object"),
        {"inputs": INPUTS, "labels": LABELS},
        lambda model: cross_entropy(model(INPUTS).logits, LABELS, reduction="none"),
    ),
    "classification, dict output, weights by name": (
        Classification(sample_weight="trust"),
        Classifier(form="dict"),
        {"inputs": INPUTS, "labels": LABELS, "trust": WEIGHTS},
        lambda model: WEIGHTS * cross_entropy(model(INPUTS)["logits"], LABELS, reduction="none"),
    ),
    "classification, tuple output, weights by index": (
        Classification(sample_weight=2),
        Classifier(form="tuple"),
        (INPUTS, LABELS, WEIGHTS),
        lambda model: WEIGHTS * cross_entropy(model(INPUTS)[0], LABELS, reduction="none"),
    ),
    "classification, label smoothing": (
        Classification(label_smoothing=0.2),
        Classifier(),
        (INPUTS, LABELS),
        lambda model: cross_entropy(model(INPUTS), LABELS, reduction="none", label_smoothing=0.2),
    ),
    "classification, label smoothing, weights": (
        Classification(label_smoothing=0.2, sample_weight=2),
        Classifier(),
        (INPUTS, LABELS, WEIGHTS),
        lambda model: WEIGHTS * cross_entropy(model(INPUTS), LABELS, reduction="none", label_smoothing=0.2),
    ),
    "regression": (
        Regression(),
        Classifier(1),
        (INPUTS, TARGETS),
        lambda model: mse_loss(model(INPUTS)[:, 0], TARGETS, reduction="none"),
    ),
    "regression, half, squared, columns": (
        Regression(measurement="squared", loss="half_mse"),
        Classifier(1),
        (INPUTS, TARGETS[:, None]),
        lambda model: mse_loss(model(INPUTS)[:, 0], TARGETS, reduction="none") / 2,
    ),
    "regression, weights": (
        Regression(sample_weight="w"),
        Classifier(1, form="object"),
        {"inputs": INPUTS, "labels": TARGETS, "w": WEIGHTS},
        lambda model: WEIGHTS * mse_loss(model(INPUTS).logits[:, 0], TARGETS, reduction="none"),
    ),
    "language": (
        CausalLM(),
        Decoder(),
        {"input_ids": TOKENS, "attention_mask": torch.ones(B, T), "labels": TOKEN_LABELS},
        lambda model: token_loss(model(TOKENS).logits[:, :-1], TOKEN_LABELS[:, 1:], "mean"),
    ),
    "language, sum": (
        CausalLM(reduction="sum"),
        Decoder(),
        {"input_ids": TOKENS, "labels": TOKEN_LABELS},
        lambda model: token_loss(model(TOKENS).logits[:, :-1], TOKEN_LABELS[:, 1:], "sum"),
    ),
    "language, shifted by the data set": (
        CausalLM(shift=False),
        Decoder("tensor"),
        (TOKENS, TOKEN_LABELS),
        lambda model: token_loss(model(TOKENS), TOKEN_LABELS, "mean"),
    ),
}


@pytest.fixture(params=CASES, name="case")
def fixture_case(request):
    return CASES[request.param]


def example(batch, index):
    """Example ``index`` of a batch, as a batch of one."""
    if isinstance(batch, dict):
        return {key: value[index : index + 1] for key, value in batch.items()}
    return tuple(value[index : index + 1] for value in batch)


def gradients(values, model):
    """Per-example gradients by one backward pass each, (B, d)."""
    rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True, materialize_grads=True) for v in values]
    return torch.stack([torch.cat([piece.flatten() for piece in row]) for row in rows])


def test_chain_rule_gives_the_loss_gradient(case):
    task, model, batch, loss = case
    output = task.output(model, batch)
    first, _ = task.loss_derivatives(output.detach(), batch)
    assert output.shape == first.shape == (B,)
    assert not first.requires_grad
    torch.testing.assert_close(first[:, None] * gradients(output, model), gradients(loss(model), model))


def test_second_derivative(case):
    """The loss as a function of the output alone: its value, and its second derivative by autograd."""
    task, model, batch, loss = case
    output = task.output(model, batch).detach()
    _, second = task.loss_derivatives(output, batch)
    weights = WEIGHTS if getattr(task, "sample_weight", None) is not None else torch.ones(B, dtype=torch.float64)
    if isinstance(task, CausalLM) or getattr(task, "label_smoothing", 0):
        assert second is None
        torch.testing.assert_close(-weights * output, loss(model).detach())
        return
    if isinstance(task, Classification):

        def scalar_loss(o, _):
            return softplus(-o)
    else:

        def scalar_loss(o, y):
            return (o - y) ** 2 / (1 if task.loss == "mse" else 2)

    torch.testing.assert_close(weights * scalar_loss(output, TARGETS), loss(model).detach())
    expected = vmap(grad(grad(scalar_loss)))(output, TARGETS)
    torch.testing.assert_close(second, weights * expected)


FUNCTIONS = {
    "output": lambda task, model, batch, uniform: task.output(model, batch),
    "measurement": lambda task, model, batch, uniform: task.measurement(model, batch),
    "sampled_output": lambda task, model, batch, uniform: task.sampled_output(model, batch, lambda n: uniform[:, :n]),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_everything_runs_under_vmap_of_grad(case, function):
    task, model, batch, _ = case
    function = FUNCTIONS[function]
    uniform = torch.rand(B, T, generator=generator(), dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def of_one(parameters, one, u):
        one = {k: v[None] for k, v in one.items()} if isinstance(one, dict) else tuple(v[None] for v in one)
        called = lambda *args, **kwargs: functional_call(model, parameters, args, kwargs)  # noqa: E731
        return function(task, called, one, u[None])[0]

    batch = tuple(batch) if isinstance(batch, list) else batch
    rows = vmap(grad(of_one), in_dims=(None, 0, 0))(parameters, batch, uniform)
    rows = torch.cat([row.flatten(1) for row in rows.values()], dim=1)
    torch.testing.assert_close(rows, gradients(function(task, model, batch, uniform), model))


def test_a_batch_is_its_examples(case):
    task, model, batch, _ = case
    output = task.output(model, batch)
    measurement = task.measurement(model, batch)
    derivatives = task.loss_derivatives(output, batch)
    for i in range(B):
        one = example(batch, i)
        torch.testing.assert_close(task.output(model, one), output[i : i + 1])
        torch.testing.assert_close(task.measurement(model, one), measurement[i : i + 1])
        for whole, part in zip(derivatives, task.loss_derivatives(output[i : i + 1], one), strict=True):
            assert (whole is None and part is None) or torch.equal(whole[i : i + 1], part)


def test_measurements():
    logits = Classifier()(INPUTS)
    p = logits.softmax(-1).gather(1, LABELS[:, None])[:, 0]
    margin = (p / (1 - p)).log()
    for smoothing in (0.0, 0.2):
        task = Classification(label_smoothing=smoothing)
        torch.testing.assert_close(task.measurement(Classifier(), (INPUTS, LABELS)), margin)
        assert (task.unit, task.higher_is_better) == ("logit margin", True)
    error = Classifier(1)(INPUTS)[:, 0] - TARGETS
    torch.testing.assert_close(Regression().measurement(Classifier(1), (INPUTS, TARGETS)), error.abs())
    squared = Regression(measurement="squared")
    torch.testing.assert_close(squared.measurement(Classifier(1), (INPUTS, TARGETS)), error.square())
    assert (squared.unit, squared.higher_is_better) == ("squared error", False)
    batch = {"input_ids": TOKENS, "labels": TOKEN_LABELS}
    assert torch.equal(CausalLM().measurement(Decoder(), batch), CausalLM().output(Decoder(), batch))


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e30])
@pytest.mark.parametrize("label", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_margin_is_stable_for_huge_logits(scale, label, dtype):
    logits = (torch.tensor([[-1.0, 0.5, 1.0]]) * min(scale, torch.finfo(dtype).max / 4)).to(dtype).requires_grad_()
    task = Classification()
    margin = task.output(lambda inputs: inputs, (logits, torch.tensor([label])))
    others = [z for c, z in enumerate(logits[0].tolist()) if c != label]
    torch.testing.assert_close(margin.item(), logits[0, label].item() - max(others), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[0, label] == 1
    first, second = task.loss_derivatives(margin.detach(), None)
    assert -1 <= first <= 0 <= second <= 0.25


def test_doubt_keeps_its_digits():
    """1 − p at margin 40 is e⁻⁴⁰, far below float32's resolution of p."""
    first, second = Classification().loss_derivatives(torch.tensor([40.0]), None)
    torch.testing.assert_close(-first, torch.tensor([-40.0]).exp())
    torch.testing.assert_close(second, torch.tensor([-40.0]).exp())


def test_a_sequence_without_counted_tokens():
    model = Decoder()
    for reduction in ("mean", "sum"):
        batch = {"input_ids": TOKENS[3:4], "labels": TOKEN_LABELS[3:4]}
        output = CausalLM(reduction=reduction).output(model, batch)
        assert output.item() == 0
        assert torch.equal(
            gradients(output, model), torch.zeros(1, sum(p.numel() for p in model.parameters())).double()
        )


def test_padding_does_not_matter():
    padded = torch.cat([TOKENS, torch.zeros(B, 3, dtype=torch.long)], 1)
    labels = torch.cat([TOKEN_LABELS, torch.full((B, 3), -100)], 1)
    for task in (CausalLM(), CausalLM(reduction="sum")):
        without = task.output(Decoder(), {"input_ids": TOKENS, "labels": TOKEN_LABELS})
        torch.testing.assert_close(task.output(Decoder(), {"input_ids": padded, "labels": labels}), without)
    other = CausalLM(ignore_index=-1)
    batch = {"input_ids": padded, "labels": labels.masked_fill(labels == -100, -1)}
    torch.testing.assert_close(other.output(Decoder(), batch), CausalLM().output(Decoder(), batch | {"labels": labels}))
