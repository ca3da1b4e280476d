"""How well checkpoints agree on gradients: the measure against its definition, and the weights that follow."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from language_runs import Language, language_run, sentences
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import source_proj as sp
from source_proj.bank.build.agreement import agreement, weighted_by_agreement, with_sizes_kept
from source_proj.bank.build.data import BatchSource
from source_proj.gradients import ParameterSpace


def naive_agreement(trajectory: sp.Trajectory, data: Any, space: ParameterSpace) -> tuple[Tensor, Tensor]:
    """ρ by the definition, from every example's gradient."""
    by_checkpoint = []
    for checkpoint in trajectory.stages[0].checkpoints:
        model = Language()
        model.load_state_dict(checkpoint.load())
        parameters = dict(model.named_parameters())
        rows = []
        for example in data:
            logits = model(example["input_ids"][None])[0, :-1]
            loss = cross_entropy(logits, example["labels"][1:])
            rows.append(torch.autograd.grad(loss, [parameters[name] for name in space.names]))
        by_checkpoint.append([torch.stack([row[p].flatten() for row in rows]) for p in range(len(space.names))])
    both, single = [], []
    for of_checkpoints in zip(*by_checkpoint, strict=True):
        pairs = [float((a * b).sum()) for a, b in permutations(of_checkpoints, 2)]
        both.append(np.mean(pairs))
        single.append(np.mean([float(rows.square().sum()) for rows in of_checkpoints]))
    return torch.tensor(both) / torch.tensor(single), torch.tensor(single)


@pytest.mark.parametrize("checkpoints", [2, 3, 5])
def test_agreement_is_what_its_definition_says(checkpoints: int) -> None:
    """Of 16 examples every one is a batch of its own: what is left is the error of a small sketch."""
    data = sentences(16)
    run = language_run(checkpoints, apart={"table": 1.0, "layer": 0.1, "head": 0.02})
    space = ParameterSpace.from_model(Language())
    source = BatchSource(data, 64)
    found, sizes = agreement(Language(), sp.CausalLM(), run, [source], [np.arange(16)], space, None, None)
    expected, expected_sizes = naive_agreement(run, data, space)
    assert expected.max() - expected.min() > 0.3  # or there would be nothing to tell
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.06)
    torch.testing.assert_close(sizes.float(), expected_sizes.float(), rtol=0.15, atol=0)


def test_random_signs_tell_the_agreement_of_many_examples() -> None:
    """Of 1,024 examples 128 are looked at, in batches of 8 whose cross terms cancel but for noise."""
    data, run = sentences(1024), language_run(3, apart={"table": 1.0, "layer": 0.1, "head": 0.02})
    space = ParameterSpace.from_model(Language())
    found, _ = agreement(Language(), sp.CausalLM(), run, [BatchSource(data, 64)], [np.arange(1024)], space, None, None)
    expected, _ = naive_agreement(run, data[::8], space)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.2)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_agreement_does_not_depend_on_batches(batch_size: int) -> None:
    data, run = sentences(300), language_run(3)
    space, ids = ParameterSpace.from_model(Language()), [np.arange(300)]
    whole, _ = agreement(Language(), sp.CausalLM(), run, [BatchSource(data, 64)], ids, space, None, None)
    loader = BatchSource(DataLoader(data, batch_size=batch_size), 64)
    found, _ = agreement(Language(), sp.CausalLM(), run, [loader], ids, space, None, None)
    # Signs belong to the beginning of a batch: smaller ones draw others, which may err otherwise by as much.
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6 if batch_size >= 8 else 0.25)


def test_checkpoints_that_are_alike_agree_wholly() -> None:
    run = language_run(3, apart={"table": 0.0, "layer": 0.0, "head": 0.0})
    space = ParameterSpace.from_model(Language())
    found = agreement(
        Language(), sp.CausalLM(), run, [BatchSource(sentences(200), 64)], [np.arange(200)], space, None, None
    )
    torch.testing.assert_close(found[0], torch.ones(len(space.names), dtype=torch.float64))
    assert weighted_by_agreement(space, *found).weights == (1.0,) * len(space.names)


@pytest.mark.parametrize("power", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_weights_keep_the_sum_of_the_squares(seed: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rho = torch.rand(7, generator=generator, dtype=torch.float64) * 2 - 0.5
    sizes = torch.randn(7, generator=generator, dtype=torch.float64).exp()
    weights = with_sizes_kept(rho, sizes, power)
    torch.testing.assert_close((weights.square() * sizes).sum(), sizes.sum())
    clear = rho > 0.2 * rho.max()  # what agrees by less than a tenth of the largest counts as that tenth
    ratio = weights[clear] / rho[clear] ** power
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert (weights > 0).all()


def test_a_parameter_without_gradient_counts_for_no_one_else() -> None:
    rho, sizes = torch.tensor([0.4, float("nan"), 0.8]), torch.tensor([1.0, 0.0, 3.0])
    weights = with_sizes_kept(rho, sizes)
    torch.testing.assert_close(weights[[0, 2]], with_sizes_kept(rho[[0, 2]], sizes[[0, 2]]))
    assert bool(torch.isfinite(weights).all())
    nothing = torch.full((3,), float("nan"))
    assert with_sizes_kept(nothing, torch.zeros(3)).tolist() == [1.0] * 3
