"""What the callback is told of a run besides its steps: sums that nobody divides, smoothed labels, clipping."""

import random

import pytest
import torch
from trainer_runs import EXAMPLES, STEPS, classifier, examples, history, train, transformers

import source_proj as sp
from source_proj.integrations import RecorderCallback
from source_proj.integrations.trainer_folder import logged


def recorded(directory, *, every=4, **arguments):
    callback = RecorderCallback(directory / "recorded", every=every)
    train(directory / "run", callbacks=[callback], **arguments)
    return callback


def without_dropout():
    model = classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_time_is_what_a_gradient_moved_the_weights_by(tmp_path, accumulation, smoothing):
    """One step of SGD over a batch in parts: of this model the Trainer sums their gradients, unless it smooths."""
    model, rate = without_dropout(), random.Random(accumulation).uniform(0.01, 0.1)
    begun = flat(model.parameters())
    data = examples()
    batch = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
    logits = model(input_ids=batch["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)
    gradient = flat(torch.autograd.grad(loss, list(model.parameters())))
    callback = recorded(
        tmp_path, model=model, optim="sgd", learning_rate=rate, lr_scheduler_type="constant", max_steps=1,
        per_device_train_batch_size=EXAMPLES // accumulation, gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0, label_smoothing_factor=smoothing, save_steps=1, every=1,
    )  # fmt: skip
    moved = float((begun - flat(model.parameters())) @ gradient / gradient.square().sum())
    stage = callback.trajectory().stages[0]
    assert stage.lr_integrals == pytest.approx([moved], rel=1e-3)  # of weights in float32
    assert stage.accumulation == (1 if smoothing else accumulation)
    folder = sp.Trajectory.from_hf_trainer(tmp_path / "run", model=model, max_grad_norm=0).stages[0]
    assert stage.lr_integrals == folder.lr_integrals


@pytest.mark.parametrize("divided", [False, True])
def test_a_loss_of_ones_own_says_whether_it_divides(tmp_path, divided):
    """The Trainer leaves the division to compute_loss_func, and no file says whether it did."""
    model, begun = without_dropout(), without_dropout()
    batch = {key: torch.tensor([row[key] for row in examples()]) for key in ("input_ids", "labels")}
    gradient = flat(torch.autograd.grad(begun(**batch).loss, list(begun.parameters())))

    def loss(outputs, labels, num_items_in_batch):
        total = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / (num_items_in_batch if divided else len(labels))

    callback = RecorderCallback(tmp_path / "recorded", every=1, accumulation=1 if divided else 2)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_steps=1,
        per_device_train_batch_size=EXAMPLES // 2, gradient_accumulation_steps=2, max_grad_norm=0.0, save_steps=1,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        model, arguments, train_dataset=examples(), callbacks=[callback], compute_loss_func=loss
    ).train()
    moved = float((flat(begun.parameters()) - flat(model.parameters())) @ gradient / gradient.square().sum())
    assert callback.trajectory().stages[0].lr_integrals == pytest.approx([moved], rel=1e-3)
    told = {"model": model, "max_grad_norm": 0, "accumulation": 1 if divided else 2}
    assert sp.Trajectory.from_hf_trainer(tmp_path / "run", **told).stages[0].lr_integrals == pytest.approx(
        [moved], 1e-3
    )
    with pytest.raises(ValueError, match="accumulation= out"):
        sp.Trajectory.from_hf_trainer(tmp_path / "recorded", accumulation=2)


@pytest.mark.parametrize("changed", [{"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}])
def test_a_run_that_goes_on_with_another_loss_is_refused(tmp_path, changed):
    recorded(tmp_path, stop=8)
    checkpoint = str(tmp_path / "run/checkpoint-8")
    with pytest.raises(
        sp.MismatchError, match=rf"goes on with .*{next(iter(changed))}|{next(iter(changed))}=.*goes on"
    ):
        recorded(tmp_path, resume=checkpoint, **changed)
    recorded(tmp_path / "plain", stop=8)
    train(tmp_path / "plain/run", resume=str(tmp_path / "plain/run/checkpoint-8"), max_steps=STEPS, **changed)
    with pytest.raises(sp.MismatchError, match=r"until step 4 .* and in the end with .* by steps="):
        sp.Trajectory.from_hf_trainer(tmp_path / "plain/run", max_grad_norm=0)
    before = sp.Trajectory.from_hf_trainer(tmp_path / "plain/run", max_grad_norm=0, steps=[4, 8]).stages[0]
    assert (before.accumulation, before.label_smoothing) == (1, 0.0)


def test_a_run_resumed_with_other_norms_has_each_at_its_steps(tmp_path):
    """Three processes; what one that was given up was told counts no more."""
    norms = [round(random.Random(7).uniform(0.1, 0.4), 3), 0.0, 0.25]
    recorded(tmp_path, max_grad_norm=norms[0], stop=8)
    for norm, begin, stop in ((0.01, 4, 8), (norms[1], 4, 12), (norms[2], 12, None)):
        checkpoint = str(tmp_path / f"run/checkpoint-{begin}")
        callback = recorded(tmp_path, max_grad_norm=norm, resume=checkpoint, stop=stop)
    most = [norms[0]] * 4 + [norms[1]] * 8 + [norms[2]] * (STEPS - 12)
    seen = logged(history(tmp_path / "run", STEPS), "grad_norm")
    expected = [min(1.0, norm / (seen[t + 1] + 1e-6)) if norm else 1.0 for t, norm in enumerate(most)]
    assert min(expected[:4]) < 1 > min(expected[12:])
    # Norms are sums of some hundred squares in float32, in another order.
    assert callback.trajectory().stages[0].clip_factors == pytest.approx(expected, rel=1e-5)
    folder = sp.Trajectory.from_hf_trainer(tmp_path / "run").stages[0]
    assert folder.clip_factors == pytest.approx(expected, rel=1e-12)


def test_a_new_run_leaves_the_former_record_alone(tmp_path):
    expected = recorded(tmp_path, stop=8).trajectory().stages[0].describe()
    with pytest.raises(
        sp.MismatchError, match=r"record of a run up to step 8, and this one begins at step 0: .* empty"
    ):
        recorded(tmp_path)
    assert RecorderCallback(tmp_path / "recorded").trajectory().stages[0].describe() == expected
    recorded(tmp_path, resume=str(tmp_path / "run/checkpoint-8"))


def test_a_run_that_was_killed_before_its_first_step_begins_again(tmp_path):
    class Killed(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            raise KeyboardInterrupt

    callback = RecorderCallback(tmp_path / "recorded", every=4)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", callbacks=[callback, Killed()])
    assert len(recorded(tmp_path).trajectory().stages[0].checkpoints) == STEPS // 4


def test_an_attempt_that_the_trainer_gives_up_is_recorded_anew(tmp_path):
    """With auto_find_batch_size it begins again at step 0, in the same process, with half of the batch."""

    class Full(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.train_batch_size > 5 and state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")

    model, callback = classifier(), RecorderCallback(tmp_path / "recorded", every=4)
    options = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    train(tmp_path / "run", model=model, callbacks=[callback, Full()], **options)
    steps = [checkpoint.step for checkpoint in callback.trajectory().stages[0].checkpoints]
    last = max(int(folder.name.removeprefix("checkpoint-")) for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert steps == [*range(4, last, 4), last]
    assert last > EXAMPLES // 8 * 2
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_bank_of_another_smoothing_is_refused(tmp_path, smoothing):
    model = classifier()
    run = recorded(tmp_path, model=model, label_smoothing_factor=smoothing, max_steps=4).trajectory()
    data = [{name: torch.tensor(value) for name, value in row.items()} for row in examples()]
    for given in (0.0, 0.2):
        options = {"sketch": sp.Sketch(16), "progress": False}
        task = sp.Classification(label_smoothing=given)
        if given == smoothing:
            sp.build(model, task, run, data, tmp_path / "bank", **options)
        else:
            with pytest.raises(sp.MismatchError, match=f"was trained with label smoothing {smoothing}, and the task"):
                sp.build(model, task, run, data, tmp_path / "other", **options)


def test_groups_of_unequal_decay_are_refused_with_what_helps(tmp_path):
    """The Trainer's own SGD has two groups; an optimizer of one, and the folders with optimizer=, are both read."""
    options = {"optim": "sgd", "weight_decay": 0.1, "max_grad_norm": 0.0}
    with pytest.raises(ValueError, match=r"different weight_decay: \[0.1, 0.0\].*optimizers=.*from_hf_trainer"):
        recorded(tmp_path, **options)
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    stage = recorded(tmp_path, model=model, optimizers=(optimizer, None), max_grad_norm=0.0).trajectory().stages[0]
    assert stage.optimizer == sp.SGD(weight_decay=0.1)
    train(tmp_path / "plain", **options)
    folder = sp.Trajectory.from_hf_trainer(tmp_path / "plain", optimizer=sp.SGD(weight_decay=0.1)).stages[0]
    assert folder.lr_integrals == pytest.approx(stage.lr_integrals, rel=1e-12)
