"""What passes leave in a model, and what ``eval()`` makes of its weights, is of no other checkpoint."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.trajectory.placement.leftovers import Leftovers

N = 12


class Plain(nn.Module):
    """A layer whose weights are made of a parameter."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(0.3 * torch.randn(5, 4)), nn.Linear(5, 3)

    def made(self):
        return self.table.exp()

    def forward(self, x):
        return self.head(linear(x, self.made()).tanh())


class Keeping(Plain):
    """The same, kept while it is evaluated: as an attribute, a buffer, or in a container, as equivariant layers do."""

    place = "attribute"

    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", None, persistent=False)
        self.clear()

    def clear(self):
        self.attribute, self.dict, self.list, self.nested, self.is_kept = None, {}, [], {"tables": []}, False
        self.buffer = None

    def keep(self, made):
        self.is_kept = True
        if self.place in ("attribute", "buffer"):
            setattr(self, self.place, made)
        elif self.place == "dict":
            self.dict["made"] = made
        else:
            (self.list if self.place == "list" else self.nested["tables"]).append(made)

    def kept(self):
        places = {"dict": self.dict.get("made"), "list": self.list, "nested": self.nested["tables"]}
        found = places[self.place] if self.place in places else getattr(self, self.place)
        return found[0] if isinstance(found, list) else found

    def made(self):
        if self.training:
            return super().made()
        if not self.is_kept:
            self.keep(super().made())
        return self.kept()


class Clearing(Keeping):
    """Lets go of it where training goes on."""

    def train(self, mode=True):
        if mode:
            self.clear()
        return super().train(mode)


class Merging(nn.Linear):
    """An adapter as loralib has it: ``eval()`` adds it to the weight, ``train()`` takes it out."""

    def __init__(self):
        super().__init__(4, 5)
        self.down, self.up, self.is_merged = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (-1 if mode else 1) * (self.up.data @ self.down.data)
            self.is_merged = not mode
        return self

    def forward(self, x):
        own = super().forward(x)
        return own if self.is_merged else own + x @ self.down.T @ self.up.T


class Adding(Merging):
    """The same without merging."""

    train = nn.Module.train


def run_of(states):
    return sp.Trajectory([sp.Checkpoint(state, step, lr=0.1) for step, state in enumerate(states, start=1)])


def rows_and_scores(model, states, gradients, path):
    x, y = torch.linspace(-1, 1, N * 4).reshape(N, 4).sin(), torch.arange(N) % 3
    size = sum(p.numel() for p in model.parameters())
    bank = sp.build(
        model, sp.Classification(), run_of(states), TensorDataset(x, y), path, sketch=sp.Sketch(size, "identity"),
        batch_size=5, storage="float32", gradients=gradients, parameters=["*"], parameter_weights="agreement",
        progress=False,
    )  # fmt: skip
    rows = [torch.cat([block.rows for block in bank.stages[0].iter_rows(c)]) for c in range(len(states))]
    queries = TensorDataset(x[:3], y[:3])
    scores = [sp.TracIn(bank, model=model, progress=False).score(queries).values for _ in range(2)]
    return torch.stack(rows), torch.as_tensor(scores[0]), torch.as_tensor(scores[1])


def assert_same(model, plain, states, gradients, folder):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got, expected = (rows_and_scores(m, states, gradients, folder / str(i)) for i, m in enumerate((model, plain)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def states_of(make):
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(make().state_dict())
    return states


@pytest.mark.parametrize("gradients", ["auto", "general"])
@pytest.mark.parametrize("place", ["attribute", "buffer", "dict", "list", "nested"])
@pytest.mark.parametrize("kind", [Keeping, Clearing])
@pytest.mark.parametrize("used", [False, True])
def test_tables_of_weights_are_those_of_each_checkpoint(kind, place, gradients, used, tmp_path):
    if used and kind is Keeping:
        pytest.skip("its own user's answers are of former weights, too")
    model = kind().eval()
    model.place = place
    if used:
        with torch.no_grad():
            model(torch.ones(2, 4))
    assert_same(model, Plain(), states_of(Plain), gradients, tmp_path)


@pytest.mark.parametrize("gradients", ["auto", "general"])
@pytest.mark.parametrize("training", [False, True])
def test_adapters_that_eval_merges_are_attributed_to(gradients, training, tmp_path):
    def of(layer):
        return nn.Sequential(layer(), nn.Tanh(), nn.Linear(5, 3))

    assert_same(of(Merging).train(training), of(Adding), states_of(lambda: of(Adding)), gradients, tmp_path)


class Recurring(nn.Module):
    """Goes on from the state that it was left in."""

    def __init__(self):
        super().__init__()
        self.cell, self.head, self.state = nn.RNNCell(4, 5), nn.Linear(5, 3), None

    def forward(self, x):
        self.state = self.cell(x, self.state)
        return self.head(self.state)


class Beginning(Recurring):
    """The same, from the beginning each time."""

    def forward(self, x):
        self.state = None
        return super().forward(x)


@pytest.mark.parametrize("gradients", ["auto", "general"])
def test_every_pass_begins_with_the_state_that_the_model_had(gradients, tmp_path):
    assert_same(Recurring(), Beginning(), states_of(Beginning), gradients, tmp_path)


class Wanting(OrderedDict):
    """A container whose copy() fails, as it is made of more than what it holds."""

    def __init__(self, name, *entries):
        super().__init__(*entries)
        self.name = name


class InItsOwn(Keeping):
    place = "dict"

    def clear(self):
        super().clear()
        self.dict = Wanting("tables")


def test_containers_of_a_models_own_are_put_back():
    torch.manual_seed(0)
    model = InItsOwn().eval()
    left = Leftovers(model)
    model(torch.randn(2, 4))
    assert model.dict
    left.put_back()
    assert isinstance(model.dict, Wanting)
    assert not model.dict
