"""What the callback records of a Trainer's run, beside what the Trainer itself logged and saved."""

from types import SimpleNamespace

import pytest
import torch
from trainer_runs import STEPS, StopAt, classifier, copied, history, train, transformers

import source_proj as sp
from source_proj.integrations import RecorderCallback, task_for
from source_proj.integrations.callback_log import CallbackLog
from source_proj.integrations.callback_settings import RunSettings
from source_proj.integrations.trainer_folder import logged


def recorded(directory, **arguments):
    callback = RecorderCallback(
        directory / "recorded", **{k: arguments.pop(k) for k in ("every", "at") if k in arguments}
    )
    train(directory / "run", callbacks=[callback, *arguments.pop("callbacks", ())], **arguments)
    return callback


@pytest.fixture(scope="module")
def saved_at_three(tmp_path_factory):
    """A run whose weights were saved at the third step."""
    folder = tmp_path_factory.mktemp("at three")
    recorded(folder, at=[3])
    return folder / "recorded"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_records_the_rates_and_norms_that_the_trainer_logs(tmp_path, accumulation):
    recorded(tmp_path, every=2, warmup_steps=3, gradient_accumulation_steps=accumulation)
    steps = STEPS // accumulation
    log = CallbackLog.open(tmp_path / "recorded")
    assert log.rates == logged(history(tmp_path / "run", steps), "learning_rate")
    assert log.norms == logged(history(tmp_path / "run", steps), "grad_norm")


def test_takes_norms_before_clipping_by_itself(tmp_path):
    """logging_steps=7: the Trainer's own norms are known at two steps, the callback's at all."""
    recorded(tmp_path / "sparse", logging_steps=7, max_grad_norm=0.4)
    recorded(tmp_path / "dense", max_grad_norm=0.4)
    expected = logged(history(tmp_path / "dense/run", STEPS), "grad_norm")
    found = CallbackLog.open(tmp_path / "sparse/recorded").norms
    assert sorted(found) == sorted(expected)
    assert min(expected.values()) < 0.4 < max(expected.values())
    # Float32 sums of some hundred squares, in another order.
    assert [found[t] for t in expected] == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_directory_gives_the_trajectory_of_the_trainers_own_folder(tmp_path):
    callback = recorded(tmp_path, warmup_steps=3, weight_decay=0.1, max_grad_norm=0.4)
    ours = callback.trajectory(segments=2).stages[0]
    theirs = sp.Trajectory.from_hf_trainer(tmp_path / "run", segments=2, max_grad_norm=0.4).stages[0]
    again = sp.Trajectory.from_hf_trainer(tmp_path / "recorded", segments=2).stages[0]
    assert [c.step for c in ours.checkpoints] == [c.step for c in theirs.checkpoints] == [4, 8, 12, 16, 20]
    assert ours.lr_integrals == again.lr_integrals == pytest.approx(theirs.lr_integrals, rel=1e-5)
    model = classifier()
    for name, _ in model.named_parameters():
        assert ours.optimizer.group(name).weight_decay == theirs.optimizer.group(name).weight_decay
    for mine, other in zip(ours.checkpoints, theirs.checkpoints, strict=True):
        state, expected = mine.load(), other.load()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_recorders_reader_names_that_of_the_callback(saved_at_three):
    with pytest.raises(sp.MismatchError, match=r"by a RecorderCallback: .*from_hf_trainer \(--hf-run"):
        sp.Trajectory.from_recorder(saved_at_three)


def test_goes_on_where_a_run_is_resumed(tmp_path):
    whole = recorded(tmp_path / "whole", every=4, warmup_steps=3)
    recorded(tmp_path / "parts", every=4, warmup_steps=3, callbacks=[StopAt(14)])
    resumed = recorded(tmp_path / "parts", every=4, warmup_steps=3, resume=str(tmp_path / "parts/run/checkpoint-8"))
    expected, found = whole.trajectory().stages[0], resumed.trajectory().stages[0]
    assert [c.step for c in found.checkpoints] == [c.step for c in expected.checkpoints]  # no 14
    assert found.lr_integrals == expected.lr_integrals
    with pytest.raises(sp.MismatchError, match=r"goes on from step 8, and .* knows those up to 0"):
        train(
            tmp_path / "parts/run",
            resume=str(tmp_path / "parts/run/checkpoint-8"),
            callbacks=[RecorderCallback(tmp_path / "elsewhere")],
        )


def test_a_line_that_a_kill_cut_short_does_not_count(saved_at_three, tmp_path):
    callback = RecorderCallback(copied(saved_at_three, tmp_path / "recorded"))
    expected = callback.trajectory().stages[0].describe()
    file = tmp_path / "recorded" / "updates.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 21, "lr"')
    assert callback.trajectory().stages[0].describe() == expected
    file.write_text("nonsense\n" + whole)
    with pytest.raises(sp.MismatchError, match="damaged"):
        callback.trajectory()


def test_changed_weights_are_refused(saved_at_three, tmp_path):
    callback = RecorderCallback(copied(saved_at_three, tmp_path / "recorded"))
    torch.save({}, tmp_path / "recorded" / "step_00000003.pt")
    with pytest.raises(sp.MismatchError, match=r"step_00000003.pt' was changed"):
        callback.trajectory()


def test_refuses_what_it_cannot_do(saved_at_three, tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RecorderCallback(tmp_path, every=0)
    with pytest.raises(FileNotFoundError, match=r"holds no updates.jsonl"):
        RecorderCallback(tmp_path / "none").trajectory()
    with pytest.raises(AttributeError, match="no attribute 'off_train'"):
        _ = RecorderCallback(tmp_path).off_train
    with pytest.raises(ValueError, match="leave optimizer=, learning_rate="):
        sp.Trajectory.from_hf_trainer(saved_at_three, learning_rate=0.1)


def test_leaves_no_hook_behind(tmp_path):
    model = classifier()
    train(tmp_path / "run", model=model, callbacks=[RecorderCallback(tmp_path / "recorded")])
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def optimizers_of(kind, **options):
    """A model with an optimizer and a cycled schedule of its own, as ``Trainer(optimizers=)`` takes them."""
    model = classifier()
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
    return model, (optimizer, scheduler)


def test_an_optimizer_that_is_not_described_is_refused_at_once(tmp_path):
    model = classifier()
    callback = RecorderCallback(tmp_path / "recorded")
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"got torch.optim.rprop.Rprop, which steps by the sign"):
        callback.on_train_begin(arguments, transformers.TrainerState(), None, model=model, optimizer=optimizer)
    assert not (tmp_path / "recorded").exists()


def test_a_cycled_momentum_is_recorded_and_else_refused(tmp_path):
    model, optimizers = optimizers_of(torch.optim.SGD, momentum=0.9)
    momenta = []
    optimizers[0].register_step_post_hook(lambda made, *_: momenta.append(made.param_groups[0]["momentum"]))
    callback = recorded(tmp_path, model=model, optimizers=optimizers)
    stage = callback.trajectory().stages[0]
    assert min(momenta) < 0.9 < max(momenta)
    assert stage.time_factors == [sp.SGD(momentum=value).time_factor for value in momenta]
    with pytest.raises(ValueError, match=r"momentum changed .* give momentum="):
        sp.Trajectory.from_hf_trainer(tmp_path / "run", model=classifier())
    again = sp.Trajectory.from_hf_trainer(tmp_path / "run", model=classifier(), momentum=momenta).stages[0]
    assert again.lr_integrals == pytest.approx(stage.lr_integrals, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_recorded_run_tells_the_task_how_labels_were_smoothed(tmp_path, smoothing):
    CallbackLog.begin(tmp_path / "run", 0, RunSettings(1.0, smoothing))
    model = type("BertForSequenceClassification", (torch.nn.Module,), {})()
    model.config = SimpleNamespace(problem_type=None, num_labels=3)
    assert task_for(model, tmp_path / "run").spec() == sp.Classification(label_smoothing=smoothing).spec()
