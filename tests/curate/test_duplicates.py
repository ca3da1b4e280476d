"""What counts as a copy: the losses' gradients, and not the outputs' alone, point the same way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj import curate

N = 14


def network():
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))


def bank_of(folder, states, inputs, targets, task=None, **columns):
    """The gradients themselves, at checkpoints with the given weights."""
    run = sp.Trajectory([sp.Checkpoint(state, step=10 * place, lr=0.1) for place, state in enumerate(states, start=1)])
    size = sum(p.numel() for p in network().parameters())
    return sp.build(
        network(), task or sp.Regression(), run, TensorDataset(inputs, targets, *columns.values()), folder / "bank",
        sketch=sp.Sketch(size, "identity"), storage="float32", progress=False,
    )  # fmt: skip


def loss_gradients(states, inputs, targets):
    """Gradient of each example's squared error at each checkpoint, ``(C, N, p)`` float64."""
    found = []
    for state in states:
        model = network().double()
        model.load_state_dict(state)
        losses = (model(inputs.double()) - targets.double()).square()
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses[:, 0]]
        found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    return torch.stack(found).numpy()


def drawn(seed, checkpoints):
    torch.manual_seed(seed)
    states = [network().state_dict() for _ in range(checkpoints)]
    inputs, targets = torch.randn(N, 4), torch.randn(N, 1)
    for copy, original in ((9, 0), (10, 1), (11, 2)):
        inputs[copy] = inputs[original]
    targets[9], targets[10], targets[11] = targets[0], -5 * targets[1].sign(), 5 * targets[2].sign()
    targets[1], targets[2] = 5 * targets[1].sign(), 5 * targets[2].sign()  # beyond what the network says
    return states, inputs, targets


@settings(max_examples=8)
@given(seed=st.integers(0, 2**20), checkpoints=st.integers(1, 3), threshold=st.sampled_from([0.7, 0.95, 0.9999]))
def test_copies_are_those_whose_losses_gradients_point_the_same_way(tmp_path_factory, seed, checkpoints, threshold):
    states, inputs, targets = drawn(seed, checkpoints)
    bank = bank_of(tmp_path_factory.mktemp("duplicates"), states, inputs, targets)
    named = curate.near_duplicates(bank, threshold=threshold, progress=False)
    gradients = loss_gradients(states, inputs, targets)
    units = gradients / np.linalg.norm(gradients, axis=2, keepdims=True)
    cosine = np.mean([part @ part.T for part in units], axis=0)
    np.fill_diagonal(cosine, -2)
    count, cluster = connected_components(cosine >= threshold)
    firsts = {int(np.flatnonzero(cluster == number)[0]) for number in range(count)}
    assert set(named.dropped) == set(range(N)) - firsts
    assert named.values["cosine"] == pytest.approx(cosine[named.ids].max(1), abs=1e-4)
    assert 9 in named.ids


def test_one_input_with_contradictory_targets_is_no_copy(tmp_path):
    states, inputs, targets = drawn(0, 2)
    named = curate.near_duplicates(bank_of(tmp_path, states, inputs, targets), threshold=0.9999, progress=False)
    assert 9 in named.ids
    assert 11 in named.ids
    assert 10 not in named.ids


@pytest.mark.parametrize("without", [[0], [3], [0, 9], [3, 4, 5]])
def test_without_a_slope_an_example_is_like_no_other_that_has_one(tmp_path, without):
    """A weight of 0 takes the slope; of two copies that have none one may go."""
    states, inputs, targets = drawn(1, 2)
    weight = torch.ones(N)
    weight[without] = 0
    bank = bank_of(
        tmp_path, states, inputs, targets, sp.Regression(sample_weight=2), weight=weight
    )  # of each example, beside its target
    named = curate.near_duplicates(bank, threshold=0.9999, progress=False)
    assert (9 in named.ids) == (without != [0])
    assert not set(named.ids) & {0, 3, 4, 5}


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_equal_examples_are_copies_at_a_threshold_of_1(tmp_path, checkpoints):
    """In float32 the product of a row of length 1 with itself is as often below 1 as above."""
    states, *_ = drawn(0, checkpoints)
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = torch.randn(50, 4, generator=generator, device="cpu", dtype=torch.float32).repeat(2, 1)
    bank = bank_of(tmp_path, states, inputs, torch.full((100, 1), 9.0, device="cpu", dtype=torch.float32))
    named = curate.near_duplicates(bank, threshold=1, progress=False)
    assert sorted(named.ids) == list(range(50, 100))
