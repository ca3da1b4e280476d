"""What torch cannot stack is refused with its reason and the remedy; what it can is trained as one by one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from source_proj.evaluate import retrain, stacked_outputs, train_stacked

N, TIME, WIDTH = 12, 5, 4
X, Y = torch.randn(N, TIME, WIDTH, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3
SUBSETS, SEEDS = [np.arange(0, 8), np.arange(3, 11), np.arange(4, 12)], [4, 5, 6]
SETTING = {"epochs": 2, "batch_size": 3, "lr": 0.1}


class Around(nn.Module):
    """A layer within a small model, and dropout behind it where that is asked for."""

    def __init__(self, layer, use=lambda layer, x: layer(x), drops=False):
        super().__init__()
        self.layer, self.head, self.use, self.drops = layer, nn.Linear(WIDTH, 3), use, drops

    def forward(self, x):
        inner = self.use(self.layer, x)
        inner = inner[0] if isinstance(inner, tuple) else inner
        return self.head(F.dropout(inner.mean(1), 0.3, self.training and self.drops))


def by_value(layer, x):
    return layer(x) if float(x.sum()) > -1e9 else x


def by_channels(layer, x):
    return layer(x.mT).mT


def cells(layer, x):
    hidden = layer(x[:, 0])
    return torch.stack(layer(x[:, 1], hidden), 1)


def again(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


UNSTACKED = {
    "lstm": (lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), None, "aten::lstm"),
    "gru": (lambda: nn.GRU(WIDTH, WIDTH, batch_first=True), None, "aten::gru"),
    "rnn": (lambda: nn.RNN(WIDTH, WIDTH, batch_first=True), None, "aten::rnn"),
    "cell": (lambda: nn.LSTMCell(WIDTH, WIDTH), cells, "aten::lstm_cell"),
    "spectral": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), None, "."),
    "averaging": (lambda: nn.BatchNorm1d(WIDTH, momentum=None), by_channels, "item"),
    "checkpointed": (lambda: nn.Linear(WIDTH, WIDTH), again, "."),
    "by value": (lambda: nn.Linear(WIDTH, WIDTH), by_value, "item"),
}


def made(name, drops=False):
    layer, use, _ = UNSTACKED[name]
    return Around(layer(), drops=drops, **({} if use is None else {"use": use}))


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Converting a tensor")
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", UNSTACKED)
def test_what_torch_cannot_stack_is_refused_with_what_to_do(name, drops):
    """Also where dropout leaves only the evaluation mode to compare gradients in."""
    reason = UNSTACKED[name][2]
    with pytest.raises(ValueError, match=rf"torch cannot train stacked models \(.*{reason}.*GroundTruth\.fill"):
        train_stacked(lambda: made(name, drops), X, Y, SUBSETS, SEEDS, **SETTING)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_draws_and_cannot_be_stacked_is_refused_likewise():
    def make():
        return Around(nn.LSTM(WIDTH, WIDTH, batch_first=True), lambda layer, x: layer(x + torch.rand(()))[0])

    with pytest.raises(ValueError, match=r"cannot train stacked models \(.*aten::lstm.*GroundTruth\.fill"):
        train_stacked(make, X, Y, SUBSETS, SEEDS, **SETTING)


def test_outputs_that_torch_cannot_stack_are_refused_likewise():
    states = [made("lstm").state_dict() for _ in SEEDS]
    stack = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    with pytest.raises(ValueError, match=r"cannot evaluate stacked models \(.*aten::lstm.*GroundTruth\.fill"):
        stacked_outputs(lambda: made("lstm"), X)(stack)


def test_sparse_gradients_are_refused_with_what_to_do():
    def make():
        return Around(nn.Embedding(9, WIDTH, sparse=True))

    with pytest.raises(ValueError, match=r"of \['layer\.weight'\] are sparse.*sparse=False, or train one by one"):
        train_stacked(make, torch.arange(N * TIME).view(N, TIME) % 9, Y, SUBSETS, SEEDS, **SETTING)


def test_models_of_classes_of_their_own_are_refused():
    def make():
        class Own(nn.Linear):
            pass

        return Own(WIDTH, 3)

    with pytest.raises(ValueError, match=r"cannot make stacked models \(.*same class.*GroundTruth\.fill"):
        train_stacked(make, X[:, 0], Y, SUBSETS, SEEDS, **SETTING)


def test_a_model_that_fails_by_itself_says_so_itself():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train_stacked(lambda: Around(nn.Linear(WIDTH + 1, WIDTH)), X, Y, SUBSETS[:1], SEEDS[:1], **SETTING)


LOSSES = {
    "ignored": {"ignore_index": 1},
    "weighted": {"weight": torch.tensor([1.0, 2.0, 0.3])},
    "smoothed": {"label_smoothing": 0.1},
    "weighted, ignored": {"weight": torch.tensor([1.0, 2.0, 0.3]), "ignore_index": 1},
    "smoothed, ignored": {"label_smoothing": 0.1, "ignore_index": 1},
}


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("name", LOSSES)
def test_options_of_cross_entropy_train_as_one_by_one(name):
    loss = nn.CrossEntropyLoss(**LOSSES[name])

    def make():
        return Around(nn.Linear(WIDTH, WIDTH))

    outputs = retrain(
        make, X, Y, SUBSETS, SEEDS, **SETTING, loss=loss, evaluate=stacked_outputs(make, X), progress=False
    )
    for own, subset, seed in zip(outputs, SUBSETS, SEEDS, strict=True):
        torch.manual_seed(seed)
        model, order = make(), torch.Generator().manual_seed(seed)
        descent = torch.optim.SGD(model.parameters(), lr=SETTING["lr"])
        for _ in range(SETTING["epochs"]):
            for batch in torch.randperm(len(subset), generator=order).split(SETTING["batch_size"]):
                descent.zero_grad()
                loss(model(X[subset[batch]]), Y[subset[batch]]).backward()
                descent.step()
        torch.testing.assert_close(own, model(X).detach(), rtol=1e-5, atol=1e-6)
