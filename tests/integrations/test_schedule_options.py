"""Schedules with settings of their own, and constant ones, where few rates were logged."""

import math

import pytest
from trainer_runs import STEPS, copied, edit_state, history, train

import source_proj as sp
from source_proj.integrations.trainer_folder import logged

SCHEDULES = {
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "warmup_stable_decay": {"num_decay_steps": 6, "min_lr_ratio": 0.1},
    "inverse_sqrt": {"timescale": 5},
}


def sparse(directory, every=7):
    """As if every seventh step had been logged."""
    for step in range(4, STEPS + 1, 4):
        edit_state(
            directory,
            step,
            lambda state: state.update(log_history=[e for e in state["log_history"] if e["step"] % every == 0]),
        )
    return directory


def integral(directory, **options):
    return sp.Trajectory.from_hf_trainer(directory, max_grad_norm=0, **options).stages[0].lr_integrals[-1]


def expected(directory):
    rates = logged(history(directory, STEPS), "learning_rate")
    return math.fsum(rates[step] for step in range(1, STEPS + 1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_with_settings_gives_the_rates_that_were_logged(name, tmp_path):
    options = SCHEDULES[name]
    train(tmp_path / "all", lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=3)
    few = sparse(copied(tmp_path / "all", tmp_path / "few"))
    for warmup_steps in (None, 3):
        if name == "warmup_stable_decay" and warmup_steps is None:  # its decay does not depend on the warm-up
            with pytest.raises(ValueError, match="under 5 warm-ups: give warmup_steps="):
                integral(few, schedule=name, schedule_options=options)
        else:
            found = integral(few, schedule=name, schedule_options=options, warmup_steps=warmup_steps)
            assert found == pytest.approx(expected(tmp_path / "all"), rel=1e-9)


def test_settings_that_contradict_the_run_are_refused(tmp_path):
    train(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-3}, warmup_steps=3)
    sparse(tmp_path)
    with pytest.raises(ValueError, match=r"'cosine_with_min_lr' .*'min_lr': 0.005.* does not give the learning rates"):
        integral(tmp_path, schedule="cosine_with_min_lr", schedule_options={"min_lr": 5e-3})
    with pytest.raises(ValueError, match="makes no schedule 'cosine_with_min_lr' with"):
        integral(tmp_path, schedule="cosine_with_min_lr", schedule_options={"lowest": 5e-3})
    with pytest.raises(ValueError, match="makes no schedule 'zigzag'"):
        integral(tmp_path, schedule="zigzag", schedule_options={"a": 1})
    with pytest.raises(ValueError, match="belong to a schedule by name, got None"):
        integral(tmp_path, schedule_options={"min_lr": 1e-3})


@pytest.mark.parametrize(
    ("name", "warmup"), [("constant", 0), ("constant", 4), ("constant_with_warmup", 2), ("linear", 2)]
)
def test_a_constant_rate_needs_no_log(name, warmup, tmp_path):
    train(tmp_path / "all", lr_scheduler_type=name, warmup_steps=warmup)
    few = sparse(copied(tmp_path / "all", tmp_path / "few"), every=100)
    if name == "constant_with_warmup":  # the warm-up ended before the first rate that is known
        with pytest.raises(ValueError, match="say which by schedule= and warmup_steps="):
            integral(few)
        assert integral(few, schedule=name, warmup_steps=warmup) == pytest.approx(expected(tmp_path / "all"), rel=1e-9)
    else:
        assert integral(few) == pytest.approx(expected(tmp_path / "all"), rel=1e-9)
