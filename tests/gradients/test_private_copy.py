"""A model is copied as it is, whatever hangs on it, and what reaches past the copy is refused."""

import threading

import pytest
import torch
from torch import nn

from source_proj._errors import GradientError
from source_proj.gradients import private_copy, require_own_weights


def outputs(model, x):
    with torch.no_grad():
        return model(x)


class WithLock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.lock = threading.Lock()
        self.held = {"of": [threading.Lock()]}

    def forward(self, x):
        with self.lock:
            return self.inner(x)


class Doubling:
    """A hook whose object cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()

    def hook(self, module, args, output):
        return 2 * output


def hooked():
    model = nn.Linear(3, 2)
    model.register_forward_hook(Doubling().hook)
    return model


def normed():
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(nn.Linear(3, 2))
    model(torch.ones(1, 3))  # now the weight has a graph
    return model


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def frozen():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    return model.eval()


@pytest.mark.parametrize("make", [WithLock, hooked, normed, tied, frozen], ids=lambda make: make.__name__)
def test_a_copy_computes_the_same_and_shares_no_weight(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 3)
    own = private_copy(model)
    assert torch.equal(outputs(own, x), outputs(model, x))
    assert {p.data_ptr() for p in own.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    assert len(list(own.parameters())) == len(list(model.parameters()))  # tied ones stay tied
    assert [p.requires_grad for p in own.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [m.training for m in own.modules()] == [m.training for m in model.modules()]


def test_what_cannot_be_copied_is_refused_by_name():
    class Refusing(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("not this one")

    with pytest.raises(GradientError, match=r"Refusing cannot be copied \(RuntimeError: not this one\)"):
        private_copy(Refusing(2, 2))


class Closure(nn.Module):
    """Its forward goes through a closure, which a copy does not follow."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.call = lambda x: self.inner(x)

    def forward(self, x):
        return self.call(x)[:, 0]


def of_batch(model, x):
    return model(x)


@pytest.mark.parametrize("learns", [True, False])
def test_a_closure_over_the_original_is_refused(learns):
    model = Closure().requires_grad_(learns)
    with pytest.raises(GradientError, match=r"'inner\.weight'.*a closure"):
        require_own_weights(of_batch, private_copy(model), model, torch.ones(2, 3))


def test_a_task_that_holds_on_to_the_original_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    with pytest.raises(GradientError, match=r"1\.running_mean"):
        require_own_weights(lambda _, x: model(x)[:, 0], private_copy(model), model, torch.ones(2, 3))


def test_a_model_that_uses_itself_is_accepted():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    require_own_weights(lambda model, x: model(x)[:, 0], private_copy(model), model, torch.ones(2, 3))


class Keeping(nn.Module):
    """As LeViT: what is made of a parameter is kept until training goes on."""

    def __init__(self):
        super().__init__()
        self.table, self.kept = nn.Parameter(torch.ones(3)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x):
        if self.training:
            return x * self.table.exp()
        if "table" not in self.kept:
            self.kept["table"] = self.table.exp()
        return x * self.kept["table"]


@pytest.mark.parametrize("with_graph", [False, True])
def test_what_a_module_keeps_while_it_is_evaluated_is_of_no_former_weights(with_graph):
    model, x = nn.Sequential(nn.Linear(3, 3), Keeping()).eval(), torch.randn(2, 3)
    with torch.set_grad_enabled(with_graph):
        model(x)
    own = private_copy(model)
    with torch.no_grad():
        own[1].table.add_(1)
        own(x)
    assert torch.equal(own(x), model[0](x) * torch.full((3,), 2.0).exp())
    for _ in range(2):  # each pass has a graph of its own
        own.zero_grad()
        own(x).sum().backward()
        assert own[1].table.grad.any()
    assert not any(module.training for module in own.modules())
    assert model[1].kept
