"""Log-likelihoods of labels in the interpreter or on a GPU: those of torch's log-softmax, and their gradients."""

import importlib

import pytest
import torch

from source_proj import CausalLM
from source_proj.kernels import likelihood

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = (torch.float32, torch.float16, torch.bfloat16)

pytest.importorskip("triton")
label_likelihood_triton = importlib.import_module("source_proj.kernels.triton_likelihood").label_likelihood_triton


def drawn(batch, steps, positions, width, dtype):
    generator = torch.Generator().manual_seed(width)
    logits = (20 * torch.randn(batch, positions, width, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(0, width, (batch, steps), generator=generator).to(DEVICE)
    return logits.requires_grad_(), labels, torch.randn(batch, steps, generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("batch", "steps", "positions", "width"), [(3, 6, 7, 5), (2, 4, 4, 1000), (1, 1, 3, 1)])
def test_values_and_gradients(batch, steps, positions, width, dtype):
    logits, labels, weights = drawn(batch, steps, positions, width, dtype)
    values = label_likelihood_triton(logits, labels)
    (found,) = torch.autograd.grad((values * weights).sum(), [logits])
    wide = logits.detach().double().requires_grad_()
    expected = wide[:, :steps].log_softmax(-1).gather(2, labels[..., None]).squeeze(2)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), [wide])
    assert (values - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6
    assert found.dtype == dtype
    rounding = max(2**-23 * float(logits.detach().abs().max()), torch.finfo(dtype).eps)  # of logits less their sum
    assert (found - gradient).abs().max() <= rounding * gradient.abs().max()
    assert not found[:, steps:].any()


def test_double_precision_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(likelihood, "available_backends", lambda device: ("triton",))
    labels = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    assert likelihood.label_likelihood(torch.zeros(1, 2, 3, dtype=torch.float64), labels) is None
    assert likelihood.label_likelihood(torch.zeros(1, 2, 3, device=DEVICE), labels) is not None


def test_classes_that_are_impossible_and_logits_of_a_view():
    logits = torch.tensor([[[0.0, float("-inf"), 1.0, 9.0], [2.0, float("-inf"), float("-inf"), 9.0]]], device=DEVICE)
    labels = torch.tensor([[2, 0]], device=DEVICE)
    view = logits[:, :, :3]
    expected = view.log_softmax(-1).gather(2, labels[..., None]).squeeze(2)
    assert torch.allclose(label_likelihood_triton(view, labels), expected)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"shift": False}], ids=str)
def test_causal_lm_is_the_same_by_them(options, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(30, 8), torch.nn.Tanh(), torch.nn.Linear(8, 30)).to(DEVICE)
    ids = torch.randint(0, 30, (4, 7), device=DEVICE)
    labels = ids.masked_fill(torch.rand(ids.shape, device=DEVICE) < 0.3, -100)
    batch = {"input": ids, "labels": labels}
    task = CausalLM(**options)

    def gradients():
        out = task.output(model, batch)
        again = task.sampled_output(model, batch, lambda n: torch.full((4, n), 0.4, device=DEVICE))
        return [out, again, *torch.autograd.grad((out + again).sum(), list(model.parameters()))]

    monkeypatch.setattr(likelihood, "available_backends", lambda device: ("torch",))
    expected = gradients()
    monkeypatch.setattr(likelihood, "available_backends", lambda device: ("triton",))
    for found, right in zip(gradients(), expected, strict=True):
        assert torch.allclose(found, right, rtol=1e-5, atol=1e-6)
