"""Exact unrolling against retraining with slightly other weights, plain loops written out, and SOURCE's limit."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp
from source_proj._errors import MismatchError
from source_proj.evaluate import ExactUnrolling

N, Q = 9, 4

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, eps=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, eps=1e-3),
    "group at rest": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.0}, {"params": p[1:], "lr": 0.02}], eps=1e-3
    ),
    "groups": lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.2}, {"params": p[1:], "weight_decay": 0.3}], lr=0.1),
}


def classification(seed, norm=None):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    middle = [nn.Tanh()] if norm is None else [norm, nn.Tanh()]
    model = nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 3)).double()
    for p in model.parameters():
        p.data = draw(*p.shape) / 2
    train = TensorDataset(draw(N, 3), torch.randint(3, (N,), generator=generator))
    queries = TensorDataset(draw(Q, 3), torch.randint(3, (Q,), generator=generator))
    return model, train, queries


SCHEDULES = {
    "none": lambda steps: None,
    "falling": lambda steps: [0.03 / (1 + t) for t in range(steps)],
    "warm-up": lambda steps: [0.01 * (t % 4) for t in range(steps)],  # from 0, with restarts
}


def retrained(model, data, batches, optimizer, weights, lr=None):
    """A plain loop of training with weighted examples: the weights at its end."""
    twin = copy.deepcopy(model)
    steps = optimizer(list(twin.parameters()))
    x, y = data.tensors
    for t, places in enumerate(batches):
        for group in steps.param_groups:
            group["lr"] = group["lr"] if lr is None else lr[t]
        steps.zero_grad()
        (F.cross_entropy(twin(x[places]), y[places], reduction="none") * weights[places]).mean().backward()
        steps.step()
    return twin


def margins(model, queries):
    x, y = queries.tensors
    chosen = model(x).log_softmax(-1)[torch.arange(len(y)), y]
    return chosen - torch.log1p(-chosen.exp())


def drawn_batches(seed, steps):
    draw = np.random.default_rng(seed)
    return [draw.integers(N, size=draw.integers(1, 5)).tolist() for _ in range(steps)]  # an example may come twice


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.RMSNorm(4)])
def test_normalised_models_have_the_slope_of_retraining(norm):
    """torch differentiates GroupNorm twice for one cotangent alone, and not for several at once."""
    model, train, queries = classification(5, norm)
    batches, optimizer = drawn_batches(5, 4), OPTIMIZERS["momentum"]
    scores = np.asarray(
        ExactUnrolling(model, sp.Classification(), train, batches, optimizer, progress=False).score(queries)
    )
    for z in range(N):
        ends = []
        for change in (1e-5, -1e-5):
            weights = torch.ones(N, dtype=torch.float64)
            weights[z] += change
            ends.append(margins(retrained(model, train, batches, optimizer, weights), queries).detach())
        slope = ((ends[0] - ends[1]) / 2e-5).numpy()
        assert scores[:, z] == pytest.approx(slope, rel=1e-4, abs=1e-6 * (1 + abs(scores).max()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 12), schedule=st.sampled_from(sorted(SCHEDULES)))
@example(seed=0, steps=7, schedule="warm-up")
def test_scores_are_the_slope_of_retraining(name, seed, steps, schedule):
    model, train, queries = classification(seed)
    batches, lr = drawn_batches(seed, steps), SCHEDULES[schedule](steps)
    run = ExactUnrolling(model, sp.Classification(), train, batches, OPTIMIZERS[name], lr=lr, progress=False)
    scores = np.asarray(run.score(queries, batch_size=3))
    ends = retrained(model, train, batches, OPTIMIZERS[name], torch.ones(N, dtype=torch.float64), lr)
    rounding = 1e-6 if name == "nadam" else 1e-12  # torch's own keeps its product of momenta in float32
    for ours, theirs in zip(run.final_weights().values(), ends.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=rounding, atol=rounding)
    width = 1e-5
    for z in range(0, N, 4):
        shifted = []
        for sign in (1, -1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[z] += sign * width
            twin = retrained(model, train, batches, OPTIMIZERS[name], weights, lr)
            shifted.append(margins(twin, queries).detach())
        slope = ((shifted[0] - shifted[1]) / (2 * width)).numpy()
        assert scores[:, z] == pytest.approx(slope, rel=1e-4, abs=1e-6 * (1 + abs(scores).max()))


def test_a_gradient_that_is_always_zero_leaves_numbers():
    """Adam's root of a second moment that is zero has no slope; nothing else may become NaN by it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    x[:, 1] = 0
    data = TensorDataset(x, torch.randn(6, 1, dtype=torch.float64))
    run = ExactUnrolling(
        model, sp.Regression("squared"), data, [range(6)] * 4, lambda p: torch.optim.Adam(p, lr=0.1), progress=False
    )
    kept = ExactUnrolling(
        _without(model), sp.Regression("squared"), TensorDataset(x[:, [0, 2]], data.tensors[1]), [range(6)] * 4,
        lambda p: torch.optim.Adam(p, lr=0.1), progress=False,
    )  # fmt: skip
    queries = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    queries[0][:, 1] = 0
    expected = kept.score(TensorDataset(queries[0][:, [0, 2]], queries[1]))
    assert np.asarray(run.score(TensorDataset(*queries))) == pytest.approx(np.asarray(expected), rel=1e-9)


def _without(model):
    smaller = nn.Linear(2, 1).double()
    smaller.weight.data, smaller.bias.data = model.weight.data[:, [0, 2]].clone(), model.bias.data.clone()
    return smaller


def test_source_comes_near_it_with_small_steps_and_many_checkpoints(tmp_path):
    """The reference and the approximation speak of the same derivative, in sign and in size."""
    torch.manual_seed(1)
    n, steps = 12, 40
    x, y = torch.randn(n, 3), torch.randn(n, 1)
    model, gaps = nn.Linear(3, 1, bias=False), []
    start = {k: v.clone() for k, v in model.state_dict().items()}
    queries = TensorDataset(torch.randn(Q, 3), torch.randn(Q, 1))
    data = TensorDataset(x, y)
    for lr in (0.04, 0.01):
        model.load_state_dict(start)
        run = ExactUnrolling(
            model, sp.Regression("squared"), data, [range(n)] * steps,
            lambda p, lr=lr: torch.optim.SGD(p, lr=lr), progress=False,
        )  # fmt: skip
        exact = np.asarray(run.score(queries))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        checkpoints = []
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            if step % 4 == 0:
                checkpoints.append(sp.Checkpoint({"weight": model.weight.detach().clone()}, step, lr))
        course = sp.Trajectory(checkpoints, sp.SGD(), segments=5)
        bank = sp.build(
            model, sp.Regression("squared"), course, data, tmp_path / f"bank-{lr}",
            sketch=sp.Sketch(3, "identity"), storage="float32", progress=False,
        )  # fmt: skip
        source = sp.Source(bank, model=model, curvature="gauss_newton", damping=None, progress=False)
        gaps.append(np.linalg.norm(np.asarray(source.score(queries)) - exact) / np.linalg.norm(exact))
    assert max(gaps) < 0.1  # checkpoints at ends of four steps, time in place of steps


def test_a_double_model_takes_single_data():
    model, train, queries = classification(0)
    single, asked = (TensorDataset(x.float(), y) for x, y in (train.tensors, queries.tensors))
    rounded, asked_too = (TensorDataset(x.double(), y) for x, y in (single.tensors, asked.tensors))
    steps = [[0, 1, 2], [3, 4, 5, 6, 7, 8]]
    scores, twins = (
        np.asarray(ExactUnrolling(model, sp.Classification(), d, steps, OPTIMIZERS["adamw"], progress=False).score(q))
        for d, q in ((single, asked), (rounded, asked_too))
    )
    np.testing.assert_array_equal(scores, twins)


def test_verbs_are_those_of_scores():
    model, train, queries = classification(0)
    run = ExactUnrolling(
        model, sp.Classification(), train, [[0, 1, 2], [3, 4, 5, 6, 7, 8]], OPTIMIZERS["sgd"],
        ids=[f"z{i}" for i in range(N)], progress=False,
    )  # fmt: skip
    scores = run.score(queries, ids=list("abcd"))
    assert (scores.unit, scores.query_ids) == ("logit margin", list("abcd"))
    for verb in ("top_k", "bottom_k", "helpful", "harmful"):
        assert getattr(run, verb)(queries, 2).ids == getattr(run.score(queries), verb)(2).ids
    best = np.asarray(scores).argmax(1)
    assert [row[0] for row in run.top_k(queries, 1).ids] == [f"z{i}" for i in best]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "got 0 steps"),
        ({"batches": [[0], []]}, ValueError, "non-empty"),
        ({"batches": [[0, N]]}, MismatchError, r"places 0\.\.9, but the training set has 0\.\.8"),
        ({"batches": [0, 1]}, TypeError, "one sequence of places a step.* got 0 at step 0"),
        ({"batches": [[0], [0.5]]}, TypeError, r"integers from 0 on, got \[0\.5\] at step 1"),
        ({"batches": [np.arange(N) < 2]}, TypeError, "got .True, True"),
        ({"lr": [0.1]}, MismatchError, "1 learning rates for 2 steps"),
        ({"ids": ["a"]}, MismatchError, "1 ids for 9"),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, ValueError, "LBFGS cannot be differentiated"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=1, momentum=0.5, dampening=0.1)}, ValueError, "dampening=0.1"),
        ({"optimizer": lambda p: torch.optim.SGD(p[:2], lr=0.1)}, MismatchError, "lacks 2 of 4 parameters"),
    ],
)
def test_what_cannot_be_replayed_is_refused(change, error, message):
    model, train, _ = classification(0)
    given = {"batches": [[0, 1], [2, 3]], "optimizer": OPTIMIZERS["sgd"], **change}
    with pytest.raises(error, match=message):
        ExactUnrolling(model, sp.Classification(), train, **given)


def test_a_loader_is_no_training_set():
    model, train, _ = classification(0)
    with pytest.raises(TypeError, match=r"map-style .* got a DataLoader: .* loader\.dataset"):
        ExactUnrolling(model, sp.Classification(), DataLoader(train), [[0]], OPTIMIZERS["sgd"])


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_with_what_to_do(kind):
    train = TensorDataset(torch.arange(6)[:, None], torch.arange(6) % 2)

    def run(**options):
        model = nn.Sequential(kind(6, 3, **options), nn.Flatten(), nn.Linear(3, 2))
        return ExactUnrolling(model, sp.Classification(), train, [[0, 1], [2, 3]], OPTIMIZERS["sgd"], progress=False)

    with pytest.raises(sp.GradientError, match=r"of \['0\.weight'\] are sparse.*sparse=False"):
        run(sparse=True).score(train)
    if kind is nn.Embedding:
        assert run(sparse=False).score(train).values.any()
    else:
        with pytest.raises(sp.GradientError, match=r"cannot be differentiated twice.*embedding_bag"):
            run(sparse=False).score(train)


def test_an_optimizer_of_other_parameters_is_refused_and_left_as_it_is():
    model, train, _ = classification(0)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    for optimizer, error, message in (
        (lambda _: own, ValueError, "4 parameters of the SGD are not among those that optimizer= was called with"),
        (own, TypeError, r"got a SGD that has its own: give lambda parameters: torch\.optim\.SGD"),
        (lambda _: None, TypeError, "a function of parameters to an optimizer of torch.optim, got None"),
        ("sgd", TypeError, "got 'sgd'"),
    ):
        with pytest.raises(error, match=message):
            ExactUnrolling(model, sp.Classification(), train, [[0, 1]], optimizer)
    assert own.defaults["differentiable"] is False
    assert own.param_groups[0]["differentiable"] is False


def test_a_run_that_explodes_is_named():
    model, train, queries = classification(0)
    run = ExactUnrolling(
        model, sp.Classification(), train, [range(N)] * 6, lambda p: torch.optim.SGD(p, lr=math.inf), progress=False
    )
    with pytest.raises(sp.GradientError, match="not finite"):
        run.score(queries)


def test_a_block_under_two_names_is_one_and_stays_as_it_was():
    block = nn.Linear(3, 3).double()
    model = nn.Sequential(nn.Sequential(block, nn.Tanh()), nn.Sequential(block, nn.Tanh()))
    spelled = nn.Sequential(block, nn.Tanh(), block, nn.Tanh())
    _, data, queries = classification(0)
    batches = [[0, 1, 2], [3, 4, 5]] * 2
    scores = [
        ExactUnrolling(each, sp.Classification(), data, batches, OPTIMIZERS["momentum"], progress=False).score(queries)
        for each in (spelled, model)
    ]
    np.testing.assert_allclose(scores[1].values, scores[0].values, rtol=1e-9)
    assert list(model.parameters()) == [block.weight, block.bias]
    assert isinstance(block.weight, nn.Parameter)
