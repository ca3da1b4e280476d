"""The trajectory ends at the model that people use; and it starts from the data that the run's numbers allow."""

import shutil

import pytest
import torch
from trainer_runs import BATCH, EXAMPLES, STEPS, SaveAt, classifier, copied, edit_state, examples, train, transformers

import source_proj as sp
from source_proj.integrations.trainer_data import check_training_set


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    train(directory, max_grad_norm=0)
    return directory


def steps_of(directory, **options):
    (stage,) = sp.Trajectory.from_hf_trainer(directory, max_grad_norm=0, **options).stages
    return [checkpoint.step for checkpoint in stage.checkpoints]


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_a_run_that_loads_its_best_model_ends_there(tmp_path):
    """The evaluation says that step 8 was the best one; the Trainer then saves the model of that step."""
    losses = iter([3.0, 1.0, 4.0, 2.0, 5.0])
    trainer = transformers.Trainer(
        classifier(),
        transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=BATCH, learning_rate=1e-2, save_steps=4,
            eval_steps=4, eval_strategy="steps", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            load_best_model_at_end=True, metric_for_best_model="mine", greater_is_better=False, max_grad_norm=0,
        ),
        train_dataset=examples(), eval_dataset=examples()[:8], compute_metrics=lambda _: {"mine": next(losses)},
    )  # fmt: skip
    trainer.train()
    with pytest.warns(UserWarning, match=r"the model that was given has the weights of checkpoint-8 .*not at step 20"):
        assert steps_of(tmp_path, model=trainer.model) == [4, 8]
    trainer.save_model()
    with pytest.warns(UserWarning, match=r"the model in .* has the weights of checkpoint-8"):
        trajectory = sp.Trajectory.from_hf_trainer(tmp_path, max_grad_norm=0)
    own = trainer.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trajectory.final.load().items())
    assert steps_of(tmp_path, steps=[4, 8, 12, 16, 20]) == [4, 8, 12, 16, 20]


def test_the_last_checkpoint_goes_without_saying(run, tmp_path):
    copy = copied(run, tmp_path)
    assert steps_of(copy) == [4, 8, 12, 16, 20]
    shutil.copy(copy / "checkpoint-20" / "model.safetensors", copy)
    assert steps_of(copy) == [4, 8, 12, 16, 20]
    assert steps_of(run, model=classifier()) == [4, 8, 12, 16, 20]  # whose weights are of the beginning


def test_a_final_model_that_is_none_of_the_checkpoints_is_named(run, tmp_path):
    copy = copied(run, tmp_path)
    classifier().save_pretrained(copy)
    with pytest.warns(UserWarning, match=r"has the weights of none of the checkpoints: .* ends at step 20"):
        assert steps_of(copy) == [4, 8, 12, 16, 20]


def test_pieces_of_other_frameworks_are_refused_with_their_tools(run, tmp_path):
    copy = copied(run, tmp_path)
    for step in range(4, STEPS + 1, 4):
        folder = copy / f"checkpoint-{step}"
        (folder / "global_step").mkdir()
        (folder / "zero_to_fp32.py").write_text("")
        (folder / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no optimizer.pt \(DeepSpeed cut it into pieces.*zero_to_fp32.py"):
        steps_of(copy)
    assert steps_of(copy, optimizer=sp.SGD()) == [4, 8, 12, 16, 20]
    for step in range(4, STEPS + 1, 4):
        (copy / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"DeepSpeed cut it into pieces.*zero_to_fp32.py"):
        steps_of(copy, optimizer=sp.SGD())
    for step in range(4, STEPS + 1, 4):
        (copy / f"checkpoint-{step}" / "zero_to_fp32.py").unlink()
        (copy / f"checkpoint-{step}" / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(FileNotFoundError, match="accelerate merge-weights"):
        steps_of(copy, optimizer=sp.SGD())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_cut_files_are_named(run, tmp_path, name, share):
    copy = copied(run, tmp_path)
    file = copy / "checkpoint-20" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises((ValueError, sp.MismatchError), match=rf"checkpoint-20/{name}"):
        sp.Trajectory.from_hf_trainer(copy, max_grad_norm=0, model=classifier()).final.load()


def test_a_checkpoint_that_lacks_a_weight_is_not_filled_with_random_ones(run, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = copied(run, tmp_path)
    for step in range(4, STEPS + 1, 4):
        file = copy / f"checkpoint-{step}" / "model.safetensors"
        state = load_file(file)
        save_file({f"other.{name}" if "classifier" in name else name: v for name, v in state.items()}, file)
    with pytest.raises(sp.MismatchError, match=r"does not fit BertForSequenceClassification: it lacks: classifier"):
        steps_of(copy, model=classifier())


COUNTS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "save_steps": 2},
    "accumulated, with a rest": {"gradient_accumulation_steps": 3, "save_steps": 2},
    "a short batch": {"per_device_train_batch_size": 7, "save_steps": 2},
    "the short batch dropped": {"per_device_train_batch_size": 7, "dataloader_drop_last": True, "save_steps": 2},
    "stopped within an epoch": {"max_steps": 7, "save_steps": 3},
    "within the second epoch": {"max_steps": 13, "save_steps": 5, "gradient_accumulation_steps": 1},
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_training_set_of_a_run_is_accepted_and_most_others_are_not(name, tmp_path):
    train(tmp_path, **COUNTS[name])
    check_training_set(tmp_path, EXAMPLES)
    batch = COUNTS[name].get("per_device_train_batch_size", BATCH)
    for other in (EXAMPLES - 2 * batch, EXAMPLES + 2 * batch):
        with pytest.raises(sp.MismatchError, match=rf"{other} examples, and the run's own numbers rule that out"):
            check_training_set(tmp_path, other)


def test_the_error_says_how_many_would_do(run):
    with pytest.raises(sp.MismatchError, match=r"20 updates were 2 epochs, at batches of 4 .*37 to 43 with .*steps=1,"):
        check_training_set(run, 61, "lines.jsonl")


def test_runs_without_counts_pass(run, tmp_path):
    copy = copied(run, tmp_path)
    for step in range(4, STEPS + 1, 4):
        edit_state(copy, step, lambda state: state.update(epoch=None))
    check_training_set(copy, 61)


def test_a_run_saved_at_odd_steps_and_resumed_passes(tmp_path):
    train(tmp_path, callbacks=[SaveAt((3, 7))], stop=8)
    train(tmp_path, resume=str(tmp_path / "checkpoint-8"), num_train_epochs=3)
    check_training_set(tmp_path, EXAMPLES)
    with pytest.raises(sp.MismatchError):
        check_training_set(tmp_path, EXAMPLES + 20)
