"""Study (o)'s members: that noise has the covariance it names, and a mask is one for all checkpoints and queries."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import relu
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution.operands import loss_gradients

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture
def members(monkeypatch):
    for extra in ("sklearn", "pandas"):
        pytest.importorskip(extra)
    for folder in (PAPER.parent, PAPER):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("_members")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp():
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def recorded(model, count=4):
    """A run of unlike weights."""
    states = [
        {name: normal(*value.shape, seed=10 * i + j) for j, (name, value) in enumerate(model.state_dict().items())}
        for i in range(count)
    ]
    moments = {"state": {0: {"exp_avg_sq": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    return sp.Trajectory([sp.Checkpoint(state, 5 * (i + 1), 0.1, moments) for i, state in enumerate(states)])


@pytest.mark.parametrize("low_rank", [True, False])
def test_noise_has_the_covariance_that_it_names(members, low_rank):
    count, draws = 3, 1_500
    weights = [{"a": normal(2, 2, seed=i), "b": 3 * normal(3, seed=50 + i)} for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    drawn = [members.noise(weights, generator, low_rank=low_rank) for _ in range(draws)]
    x = torch.stack([torch.cat([draw["a"].flatten(), draw["b"]]) for draw in drawn]).double()
    points = torch.stack([torch.cat([point["a"].flatten(), point["b"]]) for point in weights]).double()
    diagonal = torch.diag(points.var(0, correction=0))
    expected = (diagonal + torch.cov(points.T)) / 2 if low_rank else diagonal
    # Standard errors of a normal sample's mean and covariance; five of them.
    variances = expected.diagonal()
    assert (x.mean(0).abs() <= 5 * (variances / draws).sqrt()).all()
    errors = ((variances[:, None] * variances + expected**2) / draws).sqrt()
    assert ((x.T @ x / draws - expected).abs() <= 5 * errors).all()


def changes(run, moved):
    pairs = zip(run.stages[0].checkpoints, moved.stages[0].checkpoints, strict=True)
    return [{name: after.load()[name] - value for name, value in before.load().items()} for before, after in pairs]


def test_a_members_checkpoints_lie_beside_the_runs_by_one_draw(members):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    run = recorded(model)
    first, *others = changes(run, members.displaced(run, model, 7, scale=1.0))
    # A draw is of the last half of the checkpoints, however many there are.
    last = [point.parameters_of(model) for point in run.stages[0].checkpoints[2:]]
    drawn = members.noise(last, torch.Generator().manual_seed(7))
    for name, change in first.items():
        torch.testing.assert_close(change, drawn.get(name, torch.zeros_like(change)))  # buffers stay
        assert all(torch.allclose(other[name], change, atol=1e-5) for other in others)
    twice = changes(run, members.displaced(run, model, 7, scale=2.0))[0]
    torch.testing.assert_close(twice["0.weight"], 2 * first["0.weight"])
    assert not torch.allclose(changes(run, members.displaced(run, model, 8, scale=1.0))[0]["0.bias"], first["0.bias"])


def test_noise_of_one_checkpoint_is_refused(members):
    with pytest.raises(ValueError, match="record more"):
        members.displaced(recorded(mlp(), 1), mlp(), 0, scale=1.0)


def test_noise_anew_differs_between_checkpoints_and_the_run_keeps_its_times(members):
    run = recorded(mlp())
    moved = members.displaced(run, mlp(), 7, scale=1.0, anew=True)
    biases = [change["0.bias"] for change in changes(run, moved)]
    assert not any(torch.allclose(biases[0], bias) for bias in biases[1:])
    assert moved.stages[0].lr_integrals == run.stages[0].lr_integrals
    for before, after in zip(run.stages[0].checkpoints, moved.stages[0].checkpoints, strict=True):
        assert (after.step, after.lr) == (before.step, before.lr)
        assert after.optimizer_state["state"].keys() == before.optimizer_state["state"].keys()


def test_a_mask_is_one_for_all_checkpoints_and_for_queries(members, tmp_path):
    """Rows and query gradients are autograd's of a network written out by hand, with the member's own factors."""
    model, run = mlp(), recorded(mlp())
    inputs, targets = normal(6, 3, seed=1), torch.tensor([0, 1, 1, 0, 1, 0])
    train, task = TensorDataset(inputs, targets), sp.Classification()
    member = members.masked(model, 0.4, 3, lambda own: own(inputs[:1]))
    factors = [module.factors for module in member.modules() if isinstance(module, members.Mask)]
    size = sum(parameter.numel() for parameter in model.parameters())
    bank = sp.build(member, task, run, train, tmp_path / "bank", sketch=sp.Sketch(size, "identity"), storage="float32")
    source = sp.Source(bank, model=member, query_gradient="mean")
    (features,) = source.sketch(train)
    for index, point in enumerate(run.stages[0].checkpoints):
        (operand,) = loss_gradients(bank, 0, index, None)
        asked = features.at(bank.checkpoint(0, index), bank.metrics.hash(bank.stages[0].metric(index)))
        for row, query, x, y in zip(operand.rows, asked, inputs, targets, strict=True):
            weights = [value.clone().requires_grad_() for value in point.load().values()]
            logits = by_hand(weights, factors, x)
            for values, number in [
                (row, nn.functional.cross_entropy(logits, y)),
                (query, task.measurement(lambda _x, logits=logits: logits[None], (x[None], y[None]))[0]),
            ]:
                gradients = torch.autograd.grad(number, weights, retain_graph=True)
                expected = torch.cat([gradient.flatten() for gradient in gradients])
                torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)


def by_hand(weights, factors, x):
    for place, factor in enumerate(factors):
        x = relu(weights[2 * place] @ x + weights[2 * place + 1]) * factor
    return weights[-2] @ x + weights[-1]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_mask_leaves_out_its_share_and_takes_the_same_checkpoints(members, share):
    model = nn.Sequential(nn.Linear(2, 4000), nn.GELU(), nn.Linear(4000, 1))
    member, again, other = (members.masked(model, share, seed, lambda own: own(torch.ones(1, 2))) for seed in (1, 1, 2))
    factors, repeated, differing = (own.get_submodule("1.1").factors for own in (member, again, other))
    assert set(factors.tolist()) == {0.0, float(torch.tensor(1 / (1 - share)))}
    assert abs((factors == 0).double().mean() - share) <= 5 * (share * (1 - share) / 4000) ** 0.5
    assert torch.equal(factors, repeated)
    assert not torch.equal(factors, differing)
    assert list(member.state_dict()) == list(model.state_dict())
    assert isinstance(model[1], nn.GELU)


def test_every_part_of_the_decoder_gets_a_mask_of_its_own(members):
    from wikitext2 import Decoder

    model = Decoder(5, 4, 16, 2, 2)
    member = members.masked(model, 0.5, 0, lambda own: own(torch.tensor([[1, 2, 3]])))
    first, second = (module.factors for module in member.modules() if isinstance(module, members.Mask))
    assert first.shape == second.shape == (64,)
    assert not torch.equal(first, second)


def test_models_without_places_for_masks_are_refused(members):
    shared = nn.ReLU()
    for model in (nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)):
        with pytest.raises(ValueError, match="used once"):
            members.masked(model, 0.1, 0, lambda own: own(torch.ones(1, 3)))


@pytest.mark.parametrize(("count", "kept"), [(6, [10, 20, 30]), (3, [15]), (1, [5]), (4, [10, 20])])
def test_half_of_the_checkpoints_end_where_the_run_does(members, count, kept):
    run = recorded(mlp(), count)
    thinned = members.every_other(run)
    assert [point.step for point in thinned.stages[0].checkpoints] == kept
    assert thinned.stages[0].lr_integrals[-1] == run.stages[0].lr_integrals[-1]
