"""A model that ends in a softmax is another one than its logits: said where it is asked about, and only there."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import source_proj as sp

WORDS = r"answers look like probabilities.*leave the last Softmax out, or return log\(p\)"


def examined(model, batch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sp.Classification().examine(model, batch)
    return [str(each.message) for each in caught]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 12), st.sampled_from([0.0, 1.0, 30.0]))
def test_softmax_is_told_from_logits_and_log_probabilities(seed, classes, size, spread):
    torch.manual_seed(seed)
    layer = nn.Linear(3, classes)
    nn.init.normal_(layer.weight, std=spread)
    inputs, labels = torch.randn(size, 3), torch.randint(classes, (size,))
    for batch in ((inputs, labels), (inputs,), {"input": inputs, "labels": labels}):
        model = nn.Sequential(layer, nn.Softmax(-1))
        (message,) = examined(model, batch)
        assert "probabilities" in message
        assert not examined(nn.Sequential(layer, nn.LogSoftmax(-1)), batch)
        assert not examined(layer, batch)
        assert examined(model.half(), (inputs.half(), labels))
        model.float()


def test_a_build_and_queries_say_so(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    train = torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(3, (8,)))
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    with pytest.warns(UserWarning, match=WORDS):
        bank = sp.build(model, sp.Classification(), trajectory, train, tmp_path / "bank", sketch=sp.Sketch(16))
    with pytest.warns(UserWarning, match=WORDS):
        sp.Source(bank, model=model).score(torch.utils.data.Subset(train, [1, 4]))
