"""Hydra, RepSim and empirical influence against their definitions; Hydra's formula is also a row of test_methods."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import classification, two_stages
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

import source_proj as sp
from source_proj.evaluate import half_subsets

# Hydra ---------------------------------------------------------------------------------------------------------------


def loss_gradients(stage, checkpoint):
    return torch.cat([b.rows * b.d1[:, None] for b in stage.iter_rows(checkpoint)]).double()


def test_hydra_is_the_decayed_recursion_over_stages(tmp_path):
    """Naive twin: dθ/dε of every example is carried along the checkpoints, shrunk by weight decay (H = 0)."""
    problem = two_stages()
    bank = problem.build(tmp_path / "bank")
    hydra = sp.Hydra(bank, model=problem.model, progress=False)
    features = hydra.sketch(problem.queries)
    moved = torch.zeros(bank.n_rows, problem.size, dtype=torch.float64)  # what each example did to the weights
    start, lam = 0, 1e-2
    for stage, lr, steps in zip(bank.stages, (0.1, 0.02), (20, 10), strict=True):
        time = lr * steps / 0.5
        for checkpoint in range(stage.n_checkpoints):
            moved *= np.exp(-lam * time)
            g = loss_gradients(stage, checkpoint)
            moved[start : start + stage.n] -= g * (1 - np.exp(-lam * time)) / lam / stage.n
        start += stage.n
    expected = features[0].at(bank.final_checkpoint()).double() @ moved.T
    scores = hydra.score(features)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    np.testing.assert_array_equal(hydra.top_k(features, 7).indices, scores.top_k(7).indices)


def test_hydra_is_source_without_curvature(tmp_path):
    """At vanishing learning rate times Hessian both are the integral of the gradients; a closed form of Source."""
    problem = classification(segments=4)
    stage = problem.trajectory.stages[0]
    tiny = [sp.Checkpoint(c.load(), c.step, lr=1e-7) for c in stage.checkpoints]
    problem.trajectory = sp.Trajectory(tiny, optimizer=stage.optimizer, segments=4)
    bank = problem.build(tmp_path / "bank")
    source = sp.Source(bank, model=problem.model, damping=None, progress=False).score(problem.queries)
    hydra = sp.Hydra(bank, model=problem.model, progress=False).score(problem.queries)
    np.testing.assert_allclose(hydra, source, rtol=1e-4, atol=1e-4 * np.abs(source).max())


def test_hydra_asks_the_final_weights_only(tmp_path):
    problem = classification()
    bank = problem.build(tmp_path / "bank")
    features = sp.Hydra(bank, model=problem.model, progress=False).sketch(problem.queries)
    assert list(features[0].rows) == [bank.final_checkpoint().hash()]


# RepSim --------------------------------------------------------------------------------------------------------------


def rep_sim(problem, bank, **options):
    return sp.RepSim(bank, **{"model": problem.model, "train_set": problem.train, "progress": False, **options})


def hidden(bank, model, inputs, depth=2):
    with bank.final_checkpoint().applied_to(model), torch.no_grad():
        return normalize(model[:depth](inputs))


def test_rep_sim_is_the_cosine_of_the_last_hidden_layer(tmp_path):
    problem = classification()
    bank = problem.build(tmp_path / "bank")
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    method = rep_sim(problem, bank)
    scores = method.score(problem.queries)
    train, queries = (hidden(bank, problem.model, data.tensors[0]) for data in (problem.train, problem.queries))
    np.testing.assert_allclose(scores, queries @ train.T, atol=1e-6)
    assert method.layer == "2"
    assert (scores.unit, scores.additive, scores.train_ids) == ("cosine", False, bank.ids)
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())


def test_rep_sim_has_the_verbs_and_takes_features(tmp_path):
    problem = classification()
    bank = problem.build(tmp_path / "bank")
    method = rep_sim(problem, bank)
    features = method.sketch(problem.queries)
    scores = method.score(features)
    np.testing.assert_array_equal(method.top_k(features[0], 5).scores, scores.top_k(5).scores)
    np.testing.assert_array_equal(method.bottom_k(problem.queries, 5).scores, scores.bottom_k(5).scores)
    with pytest.raises(sp.MismatchError, match="own sketch"):
        rep_sim(problem, bank, layer="0").score(features)
    with pytest.raises(sp.MismatchError, match="own sketch"):
        method.score(sp.GradDot(bank, model=problem.model, progress=False).sketch(problem.queries))
    with pytest.raises(sp.MismatchError, match="do not fit"):
        sp.GradDot(bank, progress=False).score(features)


@pytest.mark.parametrize(("layer", "depth"), [("0", 0), ("1", 1), ("2", 2), (None, 2)])
def test_rep_sim_takes_the_input_of_the_named_layer(tmp_path, layer, depth):
    problem = classification()
    bank = problem.build(tmp_path / "bank")
    scores = rep_sim(problem, bank, layer=layer).score(problem.queries)
    train, queries = (hidden(bank, problem.model, d.tensors[0], depth) for d in (problem.train, problem.queries))
    np.testing.assert_allclose(scores, queries @ train.T, atol=1e-6)


def test_rep_sim_covers_all_stages_at_the_final_weights(tmp_path):
    problem = two_stages()
    bank = problem.build(tmp_path / "bank")
    train = torch.cat([problem.train[name].tensors[0] for name in ("pretrain", "finetune")])
    expected = hidden(bank, problem.model, problem.queries.tensors[0]) @ hidden(bank, problem.model, train).T
    np.testing.assert_allclose(rep_sim(problem, bank).score(problem.queries), expected, atol=1e-6)


def test_rep_sim_averages_an_ensemble(tmp_path):
    problems = [classification(seed=0), classification(seed=1)]
    problems[1].train = problems[0].train
    banks = [p.build(tmp_path / str(i), sp.Sketch(dim=16, seed=i)) for i, p in enumerate(problems)]
    together = rep_sim(problems[0], banks).score(problems[0].queries)
    alone = [rep_sim(problems[0], bank).score(problems[0].queries).to_numpy() for bank in banks]
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    np.testing.assert_allclose(together, (alone[0] + alone[1]) / 2, atol=1e-6)


def test_rep_sim_reads_a_loader_of_other_batches_and_appended_rows(tmp_path):
    problem = classification()
    bank = problem.build(tmp_path / "bank", shard_rows=16)
    expected = rep_sim(problem, bank).score(problem.queries)
    loader = DataLoader(problem.train, batch_size=7)
    np.testing.assert_array_equal(rep_sim(problem, bank, train_set=loader).score(problem.queries), expected)
    more = TensorDataset(*(tensor.flip(0)[:11] for tensor in problem.train.tensors))
    bank.append(problem.model, problem.task, more, batch_size=4, progress=False)
    both = rep_sim(problem, bank, train_set=ConcatDataset([problem.train, more])).score(problem.queries)
    np.testing.assert_allclose(both[:, 40:], np.asarray(expected)[:, ::-1][:, :11], atol=1e-6)


def test_rep_sim_refuses_other_training_data(tmp_path):
    problem = classification()
    bank = problem.build(tmp_path / "bank")
    x, y = problem.train.tensors
    with pytest.raises(sp.MismatchError, match=r"39 examples for stage 'train'.*has 40"):
        rep_sim(problem, bank, train_set=TensorDataset(x[:39], y[:39]))
    swapped = rep_sim(problem, bank, train_set=TensorDataset(x.flip(0), y.flip(0)))
    with pytest.raises(sp.MismatchError, match="the data of stage 'train' differ"):
        swapped.score(problem.queries)
    with pytest.raises(ValueError, match="give train_set as"):
        rep_sim(problem, bank, train_set={"other": problem.train})


class Tokens(Dataset):
    """Sequences of token ids as dicts, the later tokens padding."""

    def __init__(self, n, *, masked):
        generator = torch.Generator().manual_seed(n)
        self.ids = torch.randint(1, 9, (n, 6), generator=generator)
        self.mask = (torch.arange(6) < torch.randint(2, 7, (n, 1), generator=generator)).long()
        self.masked = masked

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        item = {"input_ids": self.ids[i], "labels": self.ids[i]}
        return {**item, "attention_mask": self.mask[i]} if self.masked else item


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize("masked", [False, True])
def test_rep_sim_averages_tokens_that_count(tmp_path, masked):
    torch.manual_seed(0)
    model, train, queries = Language(), Tokens(10, masked=masked), Tokens(3, masked=masked)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    bank = sp.build(model, sp.CausalLM(), run, train, tmp_path / "bank", sketch=sp.Sketch(16), progress=False)
    scores = sp.RepSim(bank, model=model, train_set=train, progress=False).score(queries)

    def mean(data, i):
        tokens = data.ids[i][data.mask[i].bool()] if masked else data.ids[i]
        return normalize(model.embed.weight.detach()[tokens].mean(0), dim=0)

    expected = [[mean(queries, q) @ mean(train, z) for z in range(10)] for q in range(3)]
    np.testing.assert_allclose(scores, np.array(expected), atol=1e-6)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_rep_sim_refuses_layers_that_cannot_serve(tmp_path):
    model = TwoHeads()
    train = TensorDataset(torch.randn(4, 1, 5, 5), torch.tensor([0, 1, 0, 1]))
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), 10, lr=0.1)])
    bank = sp.build(model, sp.Classification(), run, train, tmp_path / "b", sketch=sp.Sketch(8), progress=False)
    options = {"model": model, "train_set": train, "progress": False}
    with pytest.raises(ValueError, match="no module 'head'"):
        sp.RepSim(bank, layer="head", **options)
    with pytest.raises(ValueError, match="no forward pass calls"):
        sp.RepSim(bank, **options).score(train)
    with pytest.raises(ValueError, match=r"has shape \(4, 1, 5, 5\)"):
        sp.RepSim(bank, layer="conv", **options).score(train)
    broken = TensorDataset(torch.full((1, 1, 5, 5), float("nan")), torch.tensor([0]))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))
    run = sp.Trajectory([sp.Checkpoint(flat.state_dict(), 10, lr=0.1)])
    bank = sp.build(flat, sp.Classification(), run, train, tmp_path / "c", sketch=sp.Sketch(8), progress=False)
    with pytest.raises(sp.SourceProjError, match=r"queries, examples \[0\], is not finite"):
        sp.RepSim(bank, model=flat, train_set=train, progress=False).score(broken)
    with pytest.warns(UserWarning, match="not made like"), pytest.raises(ValueError, match=r"no nn\.Linear"):
        sp.RepSim(bank, model=nn.Conv2d(1, 1, 1), train_set=train)


# Empirical influence -------------------------------------------------------------------------------------------------


@given(m=st.integers(2, 12), n=st.integers(1, 8), q=st.integers(1, 4), r=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_empirical_influence_is_its_definition(m, n, q, r, seed):
    rng = np.random.default_rng(seed)
    masks, outcomes = rng.random((m, n)) < 0.5, rng.normal(size=(m, r, q))
    masks[0], masks[1] = True, False
    scores = sp.empirical_influence(masks, outcomes, unit="logit margin")
    for z in range(n):
        for query in range(q):
            held = [outcomes[j, :, query].mean() for j in range(m) if masks[j, z]]
            rest = [outcomes[j, :, query].mean() for j in range(m) if not masks[j, z]]
            assert scores[query, z] == pytest.approx(np.mean(held) - np.mean(rest), rel=1e-5, abs=1e-6)
    assert scores.unit == "logit margin"
    assert scores.additive
    averaged = sp.empirical_influence(masks, outcomes.mean(axis=1))
    np.testing.assert_allclose(averaged, scores, rtol=1e-5, atol=1e-6)


def test_empirical_influence_recovers_additive_effects():
    """Its expectation is the effect itself; with all subsets of a size, up to the fixed size's own n/(n - 1)."""
    effect = np.array([[1.0, -2.0, 0.5, 0.0], [0.0, 3.0, 1.0, -1.0]])
    masks = np.array([[bool(code >> z & 1) for z in range(4)] for code in range(16)])
    scores = sp.empirical_influence(masks, masks @ effect.T, train_ids=list("abcd"), query_ids=["p", "q"])
    np.testing.assert_allclose(scores, effect, atol=1e-6)
    assert scores.top_k(1).ids == [["a"], ["b"]]
    halves = masks[masks.sum(axis=1) == 2]
    centred = effect - effect.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(sp.empirical_influence(halves, halves @ effect.T), centred * 4 / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, o: (m.astype(int), o), TypeError, "must be boolean"),
        (lambda m, o: (m[0], o), ValueError, r"shape \(subsets, examples\)"),
        (lambda m, o: (m, o[:, 0]), ValueError, r"got shape \(20,\)"),
        (lambda m, o: (m[1:], o), sp.MismatchError, "19 subsets but outcomes 20"),
        (lambda m, o: (m, np.where(o == o[3, 1], np.nan, o)), ValueError, r"not finite, the first at \(3, 1\)"),
        (lambda m, o: (m & (np.arange(6) != 4), o), ValueError, r"no subset holds 1 .*\[4\]"),
        (lambda m, o: (m | (np.arange(6) == 2), o), ValueError, r"every subset holds 1 .*\[2\]"),
    ],
)
def test_empirical_influence_refuses(change, error, message):
    outcomes = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(error, match=message):
        sp.empirical_influence(*change(half_subsets(6, 20), outcomes))


def test_empirical_influence_refuses_ids_that_do_not_fit():
    with pytest.raises(sp.MismatchError, match="2 query ids and 5 training ids"):
        sp.empirical_influence(half_subsets(6, 20), np.ones((20, 2)), train_ids=range(5))
