"""A Trainer's run, read back: rates of steps that were not logged, what was clipped, what must be asked."""

import math

import pytest
import torch
from trainer_runs import STEPS, copied, edit_state, examples, history, train, transformers
from trainer_runs import classifier as make_classifier

import source_proj as sp
from source_proj.gradients import ParameterSpace
from source_proj.integrations.trainer_folder import logged
from source_proj.integrations.trainer_folders import trainer_folders
from source_proj.integrations.trainer_rates import trainer_rates

SCHEDULES = {
    "linear": {"warmup_steps": 3},
    "linear, no warm-up": {},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 5},
    "cosine, a share": {"lr_scheduler_type": "cosine", "warmup_steps": 0.2},
    "constant": {"lr_scheduler_type": "constant", "warmup_steps": 4},
    "constant_with_warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8},
    "polynomial": {"lr_scheduler_type": "polynomial", "warmup_steps": 2},
    "inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "warmup_steps": 3, "save_steps": 2},
    "accumulation that divides no epoch": {"gradient_accumulation_steps": 3, "save_steps": 2},
    "five epochs, a step each": {"gradient_accumulation_steps": 10, "num_train_epochs": 5, "save_strategy": "epoch"},
}


def oracle(directory, step):
    """Learning rates of updates 0 to step - 1, each as it was logged."""
    rates = logged(history(directory, step), "learning_rate")
    assert sorted(rates) == list(range(1, step + 1))
    return [rates[t + 1] for t in range(step)]


def integrals(rates, steps):
    return [math.fsum(rates[:step]) for step in steps]


@pytest.mark.parametrize("name", SCHEDULES)
def test_unlogged_learning_rates_equal_those_logged_at_every_step(name, tmp_path):
    train(tmp_path, **SCHEDULES[name])
    (stage,) = sp.Trajectory.from_hf_trainer(tmp_path, max_grad_norm=0).stages
    steps = [c.step for c in stage.checkpoints]
    # Of this model the Trainer sums the gradients of micro-batches: see `accumulated_undivided`.
    accumulation = SCHEDULES[name].get("gradient_accumulation_steps", 1)
    expected = [accumulation * total for total in integrals(oracle(tmp_path, steps[-1]), steps)]
    assert stage.lr_integrals == pytest.approx(expected, rel=1e-12)
    for folder in steps:  # as if every seventh step had been logged
        edit_state(
            tmp_path, folder, lambda s: s.update(log_history=[e for e in s["log_history"] if e["step"] % 7 == 0])
        )
    schedule = {"schedule": "constant"} if name == "constant" else {}  # warm-up before the first log cannot be told
    (sparse,) = sp.Trajectory.from_hf_trainer(tmp_path, max_grad_norm=0, **schedule).stages
    # Sums differ in their order, and rates by the order of a few float64 operations.
    assert sparse.lr_integrals == pytest.approx(expected, rel=1e-12)


def test_a_run_logged_at_every_seventh_step(tmp_path):
    train(tmp_path / "all", warmup_steps=3)
    train(tmp_path / "some", warmup_steps=3, logging_steps=7)
    expected = integrals(oracle(tmp_path / "all", STEPS), range(4, STEPS + 1, 4))
    (stage,) = sp.Trajectory.from_hf_trainer(tmp_path / "some", segments=2, max_grad_norm=0).stages
    assert stage.lr_integrals == pytest.approx(expected, rel=1e-12)
    assert stage.segment_indices == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("logging_steps", [1, 7])
def test_a_resumed_run_is_the_run(tmp_path, logging_steps):
    train(tmp_path / "whole", warmup_steps=3)
    train(tmp_path / "parts", warmup_steps=3, logging_steps=logging_steps, stop=8)
    train(tmp_path / "parts", warmup_steps=3, logging_steps=logging_steps, resume=str(tmp_path / "parts/checkpoint-8"))
    whole = sp.Trajectory.from_hf_trainer(tmp_path / "whole", max_grad_norm=0).stages[0]
    parts = sp.Trajectory.from_hf_trainer(tmp_path / "parts", max_grad_norm=0).stages[0]
    assert parts.lr_integrals == pytest.approx(whole.lr_integrals, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_run_resumed_for_more_epochs_has_a_schedule_for_each_part(tmp_path, kind):
    for name, logging_steps in (("all", 1), ("some", 7)):
        arguments = {"warmup_steps": 2, "logging_steps": logging_steps, "lr_scheduler_type": kind}
        train(tmp_path / name, **arguments)
        train(tmp_path / name, **arguments, num_train_epochs=3, resume=str(tmp_path / name / "checkpoint-20"))
    steps = range(4, 31, 4)
    rates = oracle(tmp_path / "all", 30)
    assert rates[19] > rates[20] == 0 < rates[21]  # one step at the saved optimizer's rate, then a new schedule's
    found = sp.Trajectory.from_hf_trainer(tmp_path / "some", max_grad_norm=0).stages[0]
    assert [c.step for c in found.checkpoints] == [*steps, 30]
    assert found.lr_integrals == pytest.approx(integrals(rates, [*steps, 30]), rel=1e-12)


def test_trainers_that_log_the_next_rate_are_told_apart(tmp_path):
    train(tmp_path, warmup_steps=3, logging_steps=4)
    rates = [t / 3 * 1e-2 if t < 3 else (STEPS - t) / (STEPS - 3) * 1e-2 for t in range(STEPS + 1)]

    def log_the_next(state):
        for entry in state["log_history"]:
            entry["learning_rate"] = rates[entry["step"]]

    for step in range(4, STEPS + 1, 4):
        edit_state(tmp_path, step, log_the_next)
    found = sp.Trajectory.from_hf_trainer(tmp_path, max_grad_norm=0).stages[0]
    assert found.lr_integrals[-1] == pytest.approx(math.fsum(rates), rel=1e-12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    train(directory, warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5)
    return directory


def test_clip_factors_enter_the_time_scale_where_every_step_was_logged(run):
    rates, norms = oracle(run, STEPS), logged(history(run, STEPS), "grad_norm")
    factors = [min(1.0, 0.5 / (norms[t + 1] + 1e-6)) for t in range(STEPS)]
    assert 0 < sum(factor < 1 for factor in factors) < STEPS
    stage = sp.Trajectory.from_hf_trainer(run, max_grad_norm=0.5).stages[0]
    assert stage.lr_integrals[-1] == pytest.approx(sum(r * c for r, c in zip(rates, factors, strict=True)), rel=1e-12)


def test_says_what_it_assumes_of_unlogged_norms(run, tmp_path):
    some = copied(run, tmp_path)
    norms = logged(history(run, STEPS), "grad_norm")
    clipped = max(norms, key=norms.get)
    for keep, message in (({clipped}, "some steps only"), (set(), "no gradient norm was logged")):
        for step in range(4, STEPS + 1, 4):
            edit_state(
                some,
                step,
                lambda s, keep=keep: [e.pop("grad_norm", 0) for e in s["log_history"] if e["step"] not in keep],
            )
        with pytest.warns(UserWarning, match=rf"{message}.*Give max_grad_norm=0 \(--max-grad-norm 0\) if none was"):
            sp.Trajectory.from_hf_trainer(some, max_grad_norm=0.5)


def test_describes_adamw_with_the_trainers_groups(run):
    stage = sp.Trajectory.from_hf_trainer(run, max_grad_norm=0).stages[0]
    adam, model = stage.optimizer, make_classifier()
    assert (adam.betas, adam.eps, adam.decoupled) == ((0.9, 0.999), 1e-8, True)
    for name, parameter in model.named_parameters():
        is_plain = "bias" in name or "LayerNorm" in name
        assert adam.group(name).weight_decay == (0.0 if is_plain else 0.1), name
        assert parameter.dim() == 2 or is_plain


def test_second_moments_carry_the_names_of_their_parameters(run):
    """One more update by hand leads from a checkpoint's weights to the same ones as the Trainer's optimizer."""
    stage = sp.Trajectory.from_hf_trainer(run, max_grad_norm=0).stages[0]
    checkpoint = stage.checkpoints[-1]
    state = checkpoint.optimizer_state
    trainer = train(run.parent / "again", warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5)
    kept = {name: trainer.optimizer.state[p]["exp_avg_sq"] for name, p in trainer.model.named_parameters()}
    numbers = {n: i for g in state["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    assert set(numbers) == set(kept)
    for name, moment in kept.items():
        torch.testing.assert_close(state["state"][numbers[name]]["exp_avg_sq"], moment)


def test_a_model_with_other_parameters_is_refused(run):
    with pytest.raises(sp.MismatchError, match="Linear has 2 parameters, 2 of which require a gradient"):
        sp.Trajectory.from_hf_trainer(run, model=torch.nn.Linear(2, 2))


def strip(directory, *names):
    for step in range(4, STEPS + 1, 4):
        for name in names:
            (directory / f"checkpoint-{step}" / name).unlink()
    return directory


def unlogged(directory, keep=()):
    for step in range(4, STEPS + 1, 4):
        edit_state(directory, step, lambda s: s.update(log_history=[e for e in s["log_history"] if e["step"] in keep]))
    return directory


def test_what_cannot_be_inferred_is_asked_for_by_name(run, tmp_path):
    alone = strip(unlogged(copied(run, tmp_path), keep=(12,)), "scheduler.pt", "optimizer.pt")
    with pytest.raises(ValueError, match="give learning_rate="):
        sp.Trajectory.from_hf_trainer(alone)
    with pytest.raises(ValueError, match=r"no optimizer.pt .*--preconditioner none .*optimizer="):
        sp.Trajectory.from_hf_trainer(alone, learning_rate=1e-2, max_grad_norm=0)
    options = {"learning_rate": 1e-2, "max_grad_norm": 0, "optimizer": sp.SGD()}
    stage = sp.Trajectory.from_hf_trainer(alone, **options).stages[0]
    assert stage.lr_integrals[-1] == pytest.approx(sum(oracle(run, STEPS)), rel=1e-12)
    with pytest.raises(ValueError, match=r"fit .*'linear' with .*'cosine' with .* schedule= and warmup_steps="):
        sp.Trajectory.from_hf_trainer(unlogged(alone), **options)
    known = sp.Trajectory.from_hf_trainer(alone, **options, schedule="linear", warmup_steps=3).stages[0]
    assert known.lr_integrals == pytest.approx(stage.lr_integrals, rel=1e-12)


def test_plain_gradients_need_no_state_of_adams(run, tmp_path):
    """The run counts as it does with its states."""
    whole = sp.Trajectory.from_hf_trainer(run, preconditioner="none").stages[0]
    alone = strip(copied(run, tmp_path), "optimizer.pt")
    plain = sp.Trajectory.from_hf_trainer(alone, preconditioner="none").stages[0]
    assert plain.lr_integrals == whole.lr_integrals
    assert plain.optimizer.preconditioned == whole.optimizer.preconditioned
    model = make_classifier()
    space = ParameterSpace.from_model(model)
    first, second = (
        sp.Trajectory.from_stages([stage]).resolve(model, space).record.stages[0] for stage in (plain, whole)
    )
    assert first.metrics == second.metrics
    assert first.decays == pytest.approx(second.decays, rel=1e-9)
    strip(alone, "training_args.bin")  # it may have been SGD
    with pytest.raises(ValueError, match=r"no optimizer\.pt"):
        sp.Trajectory.from_hf_trainer(alone, preconditioner="none", max_grad_norm=1.0)


def test_a_momentum_that_plays_no_part_is_refused(run):
    with pytest.raises(ValueError, match=r"momentum= \(--momentum\) belongs to SGD and RMSprop, .* trained with Adam"):
        sp.Trajectory.from_hf_trainer(run, momentum=[0.9] * STEPS)


def test_a_schedule_that_contradicts_the_log_is_refused(run):
    with pytest.raises(ValueError, match=r"fit none of the schedules tried .cosine"):
        sp.Trajectory.from_hf_trainer(run, schedule="cosine")
    with pytest.raises(sp.MismatchError, match=r"for update 0, and the run logged 0.0"):
        sp.Trajectory.from_hf_trainer(run, schedule=lambda t: 1e-2)
    with pytest.raises(sp.MismatchError, match=r"learning_rate=0.5, but checkpoint-4 has 0.01"):
        sp.Trajectory.from_hf_trainer(run, learning_rate=0.5)
    with pytest.raises(ValueError, match="3 entries for the 20 updates"):
        sp.Trajectory.from_hf_trainer(run, schedule=[0.1] * 3)
    rates = oracle(run, STEPS)
    assert trainer_rates(trainer_folders(run)[1], schedule=rates) == rates


def test_steps_skipped_by_a_grad_scaler_are_asked_for(run, tmp_path):
    copy = copied(run, tmp_path)
    file = copy / "checkpoint-20" / "scheduler.pt"
    torch.save({**torch.load(file), "last_epoch": 19}, file)
    with pytest.raises(ValueError, match="checkpoint-20 took 19 steps of 20: a GradScaler skipped"):
        sp.Trajectory.from_hf_trainer(copy)
    rates = [0.0 if t == 5 else rate for t, rate in enumerate(oracle(run, STEPS))]
    unlogged(copy)
    stage = sp.Trajectory.from_hf_trainer(copy, schedule=rates, max_grad_norm=0).stages[0]
    assert stage.lr_integrals[-1] == pytest.approx(sum(rates), rel=1e-12)


def test_checkpoints_of_a_former_run_in_the_same_folder_are_refused(run, tmp_path):
    copy = copied(run, tmp_path)
    edit_state(copy, 8, lambda s: s["log_history"][1].update(learning_rate=0.5))
    with pytest.raises(sp.MismatchError, match=r"checkpoint-8.* logged the learning rate 0.5 at step 2.*steps="):
        sp.Trajectory.from_hf_trainer(copy)
    stage = sp.Trajectory.from_hf_trainer(copy, steps=[4, 20], max_grad_norm=0).stages[0]
    assert stage.lr_integrals == pytest.approx(integrals(oracle(run, STEPS), [4, 20]), rel=1e-12)


def test_directories_that_are_no_run(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no folder checkpoint-N"):
        sp.Trajectory.from_hf_trainer(run / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match=r"'.*absent' does not exist: give a Trainer's output_dir"):
        sp.Trajectory.from_hf_trainer(run / "absent")
    with pytest.raises(FileNotFoundError, match=r"has checkpoints of the steps \[4, 8, 12, 16, 20\] alone"):
        sp.Trajectory.from_hf_trainer(run, steps=[5])
    copy = copied(run, tmp_path)
    (copy / "checkpoint-20").rename(copy / "checkpoint-24")
    with pytest.raises(sp.MismatchError, match="is of step 20, and its folder is named after step 24"):
        sp.Trajectory.from_hf_trainer(copy)
    edit_state(copy, 24, lambda s: s.pop("max_steps"))
    with pytest.raises(sp.MismatchError, match=r"not written by a Trainer .KeyError"):
        sp.Trajectory.from_hf_trainer(copy)


def test_training_args_are_never_unpickled(run, tmp_path):
    copy = copied(run, tmp_path)
    for step in range(4, STEPS + 1, 4):
        (copy / f"checkpoint-{step}" / "training_args.bin").write_bytes(b"not to be read")
    sp.Trajectory.from_hf_trainer(copy, max_grad_norm=0)


@pytest.mark.parametrize("name", ["lion_32bit", "galore_adamw", "adamw_bnb_8bit", "paged_lion_8bit", "stable_adamw"])
def test_optimizers_that_are_not_described_are_refused_by_name(run, tmp_path, name):
    """From the arguments that the Trainer saved, before its optimizer's state is looked for."""
    copy = strip(copied(run, tmp_path), "optimizer.pt")
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    arguments.optim = transformers.training_args.OptimizerNames(name)
    for step in range(4, STEPS + 1, 4):
        torch.save(arguments, copy / f"checkpoint-{step}" / "training_args.bin")
    with pytest.raises(ValueError, match=rf"optim='{name}' trains with .*not described, which .*: use .*adamw_torch"):
        sp.Trajectory.from_hf_trainer(copy, max_grad_norm=0)


def test_a_model_that_was_trained_under_autocast_is_what_a_fresh_one_is(tmp_path):
    """accelerate leaves its autocast around the model's forward, which rounds more than the rows' law stands."""
    model = make_classifier()
    data = [{k: torch.as_tensor(v) for k, v in one.items()} for one in examples()]
    train(tmp_path / "run", model=model, bf16=True)
    run, rows = sp.Trajectory.from_hf_trainer(tmp_path / "run", model=make_classifier()), []
    for each in (model, make_classifier()):
        path = tmp_path / f"bank_{len(rows)}"
        bank = sp.build(each, sp.Classification(), run, data, path, sketch=sp.Sketch(dim=64), progress=False)
        rows.append(sp.Source(bank, model=each, progress=False).score(data[:2]).to_numpy())
    assert (rows[0] == rows[1]).all()
