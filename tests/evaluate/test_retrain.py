from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from lossy_executor import LossyExecutor
from torch import nn

from source_proj._errors import MismatchError
from source_proj.evaluate import half_subsets, retrain, stacked_outputs, train_stacked

torch.manual_seed(0)
X, Y = torch.randn(50, 6), torch.randint(3, (50,))
QUERIES = torch.randn(7, 6)
SUBSETS = [np.flatnonzero(mask) for mask in half_subsets(50, 3, seed=1)]
SEEDS = [3, 1, 1]
SETTING = {"epochs": 3, "batch_size": 8, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}  # 25 = 8 + 8 + 8 + 1


def tanh_net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def norm_net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def convolution():
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def block_in_places():
    """One module under two names."""
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    return nn.Sequential(nn.Sequential(block), nn.Sequential(block), nn.Linear(6, 3))


def naive(make_model, subset, seed, *, epochs, batch_size, lr, dtype, initial=None, optimizer=torch.optim.SGD, **rest):
    """One model, trained as anyone would."""
    torch.manual_seed(seed)
    model = make_model().to(dtype)
    if initial is not None:
        model.load_state_dict(initial)
    rate = lr if callable(lr) else lambda step: lr
    optimizer = optimizer(model.parameters(), lr=rate(0), **rest)
    generator, step = torch.Generator().manual_seed(seed), 0
    for _ in range(epochs):
        order = subset[torch.randperm(len(subset), generator=generator).numpy()]
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[batch].to(dtype)), Y[batch]).backward()
            optimizer.step()
            step += 1
    return model.eval()


def close(actual, expected, tolerance):
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("make_model", [tanh_net, convolution, block_in_places])
@pytest.mark.parametrize("lr", [0.1, lambda step: 0.2 / (1 + step)], ids=["constant", "schedule"])
def test_equals_plain_sgd(make_model, lr, dtype, tolerance):
    setting = {**SETTING, "lr": lr}
    double = lambda: make_model().to(dtype)  # noqa: E731
    queries = QUERIES.to(dtype)
    got = retrain(double, X.to(dtype), Y, SUBSETS, SEEDS, **setting, group=2, evaluate=stacked_outputs(double, queries))
    models = [naive(make_model, s, i, **setting, dtype=dtype) for s, i in zip(SUBSETS, SEEDS, strict=True)]
    expected = [model(queries).detach() for model in models]
    close(got, torch.stack(expected), tolerance)


@pytest.mark.parametrize("make", [torch.optim.AdamW, partial(torch.optim.AdamW, fused=True), torch.optim.RMSprop])
def test_equals_another_optimizer(make):
    setting = {"epochs": 3, "batch_size": 8, "lr": lambda step: 0.02 / (1 + step)}
    double = lambda: tanh_net().double()  # noqa: E731
    queries = QUERIES.double()
    got = retrain(
        double, X.double(), Y, SUBSETS, SEEDS, **setting, optimizer=partial(make, weight_decay=0.1), group=2,
        evaluate=stacked_outputs(double, queries),
    )  # fmt: skip
    expected = [
        naive(double, s, i, **setting, dtype=torch.float64, optimizer=make, weight_decay=0.1)(queries).detach()
        for s, i in zip(SUBSETS, SEEDS, strict=True)
    ]
    close(got, torch.stack(expected), 1e-12)


def test_batch_norm_statistics_are_each_models_own():
    subsets = [subset[:24] for subset in SUBSETS]  # batch normalisation needs more than one example a batch
    state = train_stacked(norm_net, X, Y, subsets, SEEDS, **SETTING)
    outputs = stacked_outputs(norm_net, QUERIES)(state)
    for i in range(3):
        model = naive(norm_net, subsets[i], SEEDS[i], **SETTING, dtype=torch.float32)
        close(state["1.running_mean"][i], model[1].running_mean, 1e-5)
        close(outputs[i], model(QUERIES).detach(), 1e-5)


def test_two_stages_go_on_where_the_first_ended():
    first = train_stacked(tanh_net, X, Y, SUBSETS, SEEDS, **SETTING)
    second = [np.arange(30, 50)] * 3
    got = retrain(
        tanh_net, X, Y, second, SEEDS, **SETTING, initial=first, group=2, evaluate=stacked_outputs(tanh_net, QUERIES)
    )
    for i in range(3):
        middle = naive(tanh_net, SUBSETS[i], SEEDS[i], **SETTING, dtype=torch.float32).state_dict()
        end = naive(tanh_net, second[i], SEEDS[i], **SETTING, dtype=torch.float32, initial=middle)
        close(got[i], end(QUERIES).detach(), 1e-5)


@pytest.mark.parametrize("kind", ["lossy", "threads"])
def test_an_executor_changes_no_bit(kind):
    first = train_stacked(tanh_net, X, Y, SUBSETS, SEEDS, **SETTING)
    arguments = (tanh_net, X, Y, SUBSETS, SEEDS)
    options = {**SETTING, "group": 1, "initial": first, "evaluate": stacked_outputs(tanh_net, QUERIES)}
    with ThreadPoolExecutor(3) as threads:
        executor = threads if kind == "threads" else LossyExecutor(2)
        assert torch.equal(retrain(*arguments, **options, executor=executor), retrain(*arguments, **options))


def test_one_state_dict_starts_every_model():
    start = tanh_net().state_dict()
    got = retrain(tanh_net, X, Y, SUBSETS, SEEDS, **SETTING, initial=start, evaluate=stacked_outputs(tanh_net, QUERIES))
    for i in range(3):
        end = naive(tanh_net, SUBSETS[i], SEEDS[i], **SETTING, dtype=torch.float32, initial=start)
        close(got[i], end(QUERIES).detach(), 1e-5)


def test_subsets_of_different_lengths_keep_their_order():
    subsets = [SUBSETS[0], SUBSETS[1][:10], SUBSETS[2]]
    evaluate = stacked_outputs(tanh_net, QUERIES)
    together = retrain(tanh_net, X, Y, subsets, SEEDS, **SETTING, evaluate=evaluate)
    for i in range(3):
        alone = retrain(tanh_net, X, Y, [subsets[i]], [SEEDS[i]], **SETTING, evaluate=evaluate)
        close(together[i], alone[0], 1e-5)


def test_dropout_differs_between_models_and_the_global_generator_is_left_alone():
    def make_model():
        return nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3))

    torch.manual_seed(11)
    before = torch.get_rng_state()
    evaluate = stacked_outputs(make_model, QUERIES)
    got = retrain(make_model, X, Y, [SUBSETS[0]] * 2, [7, 7], **SETTING, evaluate=evaluate)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(got[0], got[1], rtol=1e-3)  # all but the dropped units is the same


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"subsets": [], "seeds": []}, ValueError, "no subsets"),
        ({"seeds": [1]}, MismatchError, "3 subsets but 1 seeds"),
        ({"subsets": [np.ones(50, bool)] * 3}, ValueError, "flatnonzero"),
        ({"subsets": [np.arange(0)] * 3}, ValueError, "subset 0"),
        (
            {"subsets": [*SUBSETS[:2], np.array([3, -1])]},
            ValueError,
            r"subset 2 names the examples -1\.\.3, .*49",
        ),
        ({"subsets": [np.array([50])] * 3}, ValueError, r"subset 0 names the examples 50\.\.50"),
        ({"targets": Y[:9]}, MismatchError, "50 inputs but 9 targets"),
        ({"epochs": 0}, ValueError, "at least 1"),
        ({"optimizer": torch.optim.AdamW}, ValueError, "SGD's"),
        ({"momentum": 1.0}, ValueError, r"\[0, 1\)"),
        ({"initial": {"0.weight": torch.zeros(8, 6)}}, MismatchError, "0.bias"),
        (
            {"initial": {n: v.expand(4, *v.shape) for n, v in tanh_net().state_dict().items()}},
            MismatchError,
            "4 models",
        ),
        ({"initial": convolution().state_dict()}, MismatchError, "does not fit"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    arguments = {"inputs": X, "targets": Y, "subsets": SUBSETS, "seeds": SEEDS, **SETTING, **changes}
    with pytest.raises(error, match=message):
        train_stacked(tanh_net, **arguments)


def test_lock_step_needs_equal_lengths_and_groups_hold_a_model():
    with pytest.raises(ValueError, match=r"lengths \[5, 25\]"):
        train_stacked(tanh_net, X, Y, [SUBSETS[0], SUBSETS[1][:5]], [0, 1], **SETTING)
    with pytest.raises(ValueError, match="group"):
        retrain(tanh_net, X, Y, SUBSETS, SEEDS, **SETTING, group=0, evaluate=stacked_outputs(tanh_net, QUERIES))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_half_subsets_are_fair_draws(fraction):
    masks = half_subsets(40, 4000, fraction=fraction, seed=2)
    assert set(masks.sum(1)) == {round(40 * fraction)}
    spread = np.sqrt(fraction * (1 - fraction) / 4000)
    assert np.abs(masks.mean(0) - fraction).max() < 5 * spread
    np.testing.assert_array_equal(masks[:10], half_subsets(40, 10, fraction=fraction, seed=2))
    with pytest.raises(ValueError, match="fraction"):
        half_subsets(40, 3, fraction=fraction + 1)


class Folding(nn.Linear):
    """As an adapter of loralib's: ``eval()`` adds it to the weight, and it is used no more."""

    def __init__(self):
        super().__init__(3, 2)
        self.adapter, self.is_folded = nn.Parameter(torch.randn(2, 3)), False

    def train(self, mode=True):
        if not mode and not self.is_folded:
            self.weight.data += self.adapter.data
            self.is_folded = True
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + (0 if self.is_folded else x @ self.adapter.T)


def test_outputs_are_of_the_weights_that_are_given_and_not_of_what_eval_folds():
    models, x = [Folding() for _ in range(3)], torch.randn(5, 3)
    state = {name: torch.stack([m.state_dict()[name] for m in models]) for name in models[0].state_dict()}
    expected = torch.stack([m(x) for m in models])
    torch.testing.assert_close(stacked_outputs(Folding, x)(state), expected)
