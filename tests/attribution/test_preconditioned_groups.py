"""SOURCE with preconditioned optimizers whose parameter groups differ, against dense matrices."""

import numpy as np
import pytest
import torch
from preconditioned import (
    ADAM,
    EVERY,
    LR,
    dense_scores,
    dense_segment,
    margin,
    per_example,
    run,
    second_moments,
)

import source_proj as sp


def source(problem, bank, **options):
    options = {"damping": None, "query_gradient": "final", "progress": False, **options}
    return sp.Source(bank, model=problem.model, **options)


def names_of(problem):
    return [name for name, _ in problem.model.named_parameters()]


def preconditioner(problem, checkpoints):
    """Mean of 1/(√v̂ + ε)."""
    moments = [second_moments(c, names_of(problem), ADAM["betas"][1]) for c in checkpoints]
    return torch.stack([1 / (v.sqrt() + ADAM["eps"]) for v in moments]).mean(0)


def query_gradients(problem):
    return per_example(problem.model, problem.trajectory.final.load(), margin, problem.queries)


def assert_equal_scores(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)


def groups_run(decays=(0.3, 0.0), scale=3.0, **options):
    """Biases with another learning rate and decay."""

    def make(model):
        weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        groups = [
            {"params": weights, "weight_decay": decays[0]},
            {"params": biases, "weight_decay": decays[1], "lr": scale * LR},
        ]
        return torch.optim.AdamW(groups, lr=LR, **ADAM)

    groups = [
        sp.ParameterGroup("*.weight", weight_decay=decays[0]),
        sp.ParameterGroup("*.bias", lr_scale=scale, weight_decay=decays[1]),
    ]
    return run(sp.Adam(**ADAM, groups=groups), make, **options)


def grouped_moments(problem, checkpoint):
    """v̂ in the model's order, from a state in the order of the groups: weights, then biases."""
    entries = checkpoint.optimizer_state["state"]
    order = [0, 2, 1, 3]  # of 0.weight, 0.bias, 2.weight, 2.bias
    beta = ADAM["betas"][1]
    return torch.cat(
        [entries[n]["exp_avg_sq"].double().flatten() / (1 - beta ** float(entries[n]["step"])) for n in order]
    )


def of_groups(problem, weight, bias):
    return torch.cat(
        [torch.full((p.numel(),), bias if "bias" in n else weight) for n, p in problem.model.named_parameters()]
    ).double()


@pytest.mark.parametrize("mode", ["shared", "per_segment"])
def test_groups_with_one_decay_are_exact(tmp_path, mode):
    """Learning rates are part of P; a decay whose product with the learning rate is the same everywhere is a number."""
    problem = groups_run(decays=(0.3, 0.1), preconditioner=mode)
    stage = problem.trajectory.stages[0]
    scale = of_groups(problem, 1.0, 3.0)
    p = [scale / (grouped_moments(problem, c).sqrt() + ADAM["eps"]) for c in stage.checkpoints]
    dense = []
    for group, before in zip([[0, 1], [2, 3]], (0, 2 * EVERY), strict=True):
        own = group if mode == "per_segment" else [0, 1, 2, 3]
        mean = torch.stack([p[c] for c in own]).mean(0)
        dense.append(dense_segment(problem, stage, group, problem.train, 0, mean, 0.3, before))
    bank = problem.build(tmp_path / "bank")
    expected = dense_scores(dense, query_gradients(problem), len(problem.train))
    assert_equal_scores(source(problem, bank).score(problem.queries), expected)


def test_differing_decays_are_replaced_by_their_mean_where_gradients_are(tmp_path):
    """λ̄ = Σ Λ P v̂ / Σ P v̂; it errs less than either decay taken for all."""
    problem = groups_run(decays=(0.5, 0.0), scale=1.0, segments=1, preconditioner="shared")
    stage = problem.trajectory.stages[0]
    p = torch.stack([1 / (grouped_moments(problem, c).sqrt() + ADAM["eps"]) for c in stage.checkpoints]).mean(0)
    v = torch.stack([grouped_moments(problem, c) for c in stage.checkpoints]).mean(0)
    decay = of_groups(problem, 0.5, 0.0)
    mean = float((decay * p * v).sum() / (p * v).sum())
    bank = problem.build(tmp_path / "bank")
    method = source(problem, bank)
    assert method.segments[0].decay == pytest.approx(mean, rel=1e-9)
    queries, rows = query_gradients(problem), len(problem.train)

    def dense(diagonal):
        return dense_scores([dense_segment(problem, stage, [0, 1, 2, 3], problem.train, 0, p, diagonal)], queries, rows)

    scores = np.asarray(method.score(problem.queries))
    assert_equal_scores(scores, dense(mean))
    truth = dense(decay)
    errors = [np.linalg.norm(one - truth) for one in (scores, dense(0.0), dense(0.5))]
    assert errors[0] < min(errors[1:])


def test_coupled_decay_is_its_mean_too(tmp_path):
    def make(model):
        return torch.optim.Adam(model.parameters(), lr=LR, weight_decay=0.02, **ADAM)

    problem = run(sp.Adam(**ADAM, weight_decay=0.02, decoupled=False), make, segments=1, preconditioner="shared")
    stage = problem.trajectory.stages[0]
    moments = [second_moments(c, names_of(problem), ADAM["betas"][1]) for c in stage.checkpoints]
    p = torch.stack([1 / (v.sqrt() + ADAM["eps"]) for v in moments]).mean(0)
    v = torch.stack(moments).mean(0)
    method = source(problem, problem.build(tmp_path / "bank"))
    assert method.segments[0].decay == pytest.approx(float((0.02 * p * p * v).sum() / (p * v).sum()), rel=1e-9)
