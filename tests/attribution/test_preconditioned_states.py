"""Optimizer states that do not fit, are dead, or go on changing."""

import pytest
import torch
from preconditioned import (
    ADAM,
    EVERY,
    LR,
    adam_run,
    adamw,
    run,
)
from torch import nn

import source_proj as sp


def source(problem, bank, **options):
    options = {"damping": None, "query_gradient": "final", "progress": False, **options}
    return sp.Source(bank, model=problem.model, **options)


def test_a_dead_parameter_counts_as_unmoved(tmp_path):
    """Where no gradient has ever been, P would be 1/ε and meet nothing; queries must not see it."""

    def make(model):
        model[0].weight.register_hook(lambda gradient: gradient * (torch.arange(5) > 0))
        return adamw(model)

    problem = run(sp.Adam(**ADAM), make, preconditioner="shared")
    with pytest.warns(UserWarning, match="pass through register_hook"):
        bank = problem.build(tmp_path / "bank")
    scale = bank.metrics.scale(0).diagonal[:20].view(4, 5)
    assert (scale[:, 0] == 0).all()
    assert (scale[:, 1:] > 0).all()


@pytest.mark.parametrize("change", ["shape", "count", "kind", "wrapped"])
@pytest.mark.parametrize("mode", ["scalar", "shared"])
def test_states_that_do_not_fit_are_refused(tmp_path, change, mode):
    problem = adam_run()
    first = problem.trajectory.stages[0].checkpoints[0]
    state = first.optimizer_state
    entries, groups = state["state"], state["param_groups"]
    if change == "shape":
        state, match = {"state": {**entries, 0: entries[1], 1: entries[0]}, "param_groups": groups}, "in another order"
    elif change == "count":
        state = {"state": entries, "param_groups": [{**groups[0], "params": [0, 1, 2]}]}
        match = r"groups of \[3\] parameters without names. Sequential has 4 parameters"
    elif change == "kind":
        state = {"state": {0: {"square_avg": entries[0]["exp_avg_sq"]}}, "param_groups": groups}
        match = r"a state of \['square_avg'\]; they are not those of any"
    else:
        state, match = {"weights": {}}, r"must be an optimizer's state_dict\(\), and has \['weights'\]"
    only = [sp.Checkpoint(first.load(), EVERY, LR, state)]
    problem.trajectory = sp.Trajectory(only, sp.Adam(**ADAM), preconditioner=mode)
    with pytest.raises(sp.MismatchError, match=match):
        problem.build(tmp_path / "bank")


def test_the_live_state_is_copied():
    """Training goes on to overwrite it."""
    model = nn.Linear(2, 1)
    optimizer = adamw(model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = sp.Checkpoint(model.state_dict(), 1, LR, optimizer.state_dict())
    before = checkpoint.optimizer_state["state"][0]["exp_avg_sq"].clone()
    optimizer.step()
    assert torch.equal(checkpoint.optimizer_state["state"][0]["exp_avg_sq"], before)
    assert checkpoint.optimizer_state["state"][0]["exp_avg"].is_meta  # known by name, without its bytes
