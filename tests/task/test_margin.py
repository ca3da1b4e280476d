"""The margin is log p/(1 − p) of the label, differentiable as often as wanted, under vmap too."""

import pytest
import torch
from torch.func import grad, vmap

from source_proj.task.margin import label_margin


# Of torch's own forward mode; the category is up to its version.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")
@pytest.mark.parametrize("classes", [2, 7])
def test_margins_and_their_gradients(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(11, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (11,), generator=generator)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(label_margin(logits, labels), (p / (1 - p)).log())
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: label_margin(z, labels), logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda z: label_margin(z, labels), logits)
    (expected,) = torch.autograd.grad(label_margin(logits, labels).sum(), logits)
    each = vmap(grad(lambda z, y: label_margin(z[None], y[None])[0]))(logits.detach(), labels)
    torch.testing.assert_close(each, expected)
    by_label = vmap(lambda y: label_margin(logits[:1], y[None])[0])(torch.arange(classes))
    torch.testing.assert_close(by_label, torch.cat([label_margin(logits[:1], y[None]) for y in torch.arange(classes)]))


def test_a_label_that_is_certain_in_float32_keeps_its_digits():
    logits = torch.tensor([[0.0, 90.0, 1.0]], requires_grad=True)
    margin = label_margin(logits, torch.tensor([1]))
    exact = 90 - torch.tensor([0.0, 1.0], dtype=torch.float64).logsumexp(0)
    assert abs(margin.double() - exact) < 1e-5
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    torch.testing.assert_close(gradient[0, [0, 2]], -torch.tensor([0.0, 1.0]).softmax(0))
