"""The Trainer's callback captures the rows of a bank while the Trainer trains."""

import pytest
import torch
from trainer_runs import BATCH, EXAMPLES, StopAt, classifier, examples, train
from transformers import TrainerCallback

import source_proj as sp
from source_proj.integrations import RecorderCallback


def captured(directory, callback=None, **arguments):
    callback = callback or RecorderCallback(
        directory / "recorded",
        capture=sp.Sketch(64, "sparse"),
        task=sp.Classification(),
        segment_ends=[8],
        examples=EXAMPLES,
    )
    others = arguments.pop("callbacks", [])
    train(
        directory / "run",
        callbacks=[callback, *others],
        data=sp.IndexedDataset(examples()),
        remove_unused_columns=False,
        **arguments,
    )
    return callback


def rows_of(bank, segment):
    return torch.cat([block.rows for block in bank.stages[0].iter_rows(segment)])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_sum_to_the_gradients_that_adamw_saw(tmp_path, accumulation):
    """Clipped at a norm below most gradients', with dropout: Σ_z row_z is the mean of the gradients before clipping.

    The Trainer sums those of micro-batches, undivided, and rows are of the mean loss.
    """
    sums, weights = [torch.zeros(64) for _ in range(2)], [0.0, 0.0]
    sketch, factors = sp.Sketch(64, "sparse"), []

    class Watch(StopAt):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            segment, rate = int(state.global_step >= 8), float(optimizer.param_groups[0]["lr"])
            factors.append(min(1.0, 0.3 / (callback._norm + 1e-6)))
            sums[segment] += rate * sketch(gradient) / factors[-1]
            weights[segment] += rate

    callback = RecorderCallback(
        tmp_path / "recorded", capture=sketch, task=sp.Classification(), segment_ends=[8], examples=EXAMPLES
    )
    captured(tmp_path, callback, callbacks=[Watch(10**6)], max_grad_norm=0.3, gradient_accumulation_steps=accumulation)
    assert min(factors) < 1
    bank = callback.bank(storage="float32")
    assert [stage.loss_scale for stage in bank.trajectory.stages] == [accumulation]  # summed, undivided
    for segment in (0, 1):
        total = accumulation * rows_of(bank, segment).mean(0)
        expected = sums[segment] / weights[segment]
        assert torch.allclose(total, expected, atol=1e-4 * float(expected.norm()))
    model = classifier()
    queries = [{**each, "input_ids": torch.tensor(each["input_ids"])} for each in examples()[:2]]
    assert sp.Source(bank, model=model, progress=False).score(queries).to_numpy().shape == (2, EXAMPLES)


def test_a_resumed_run_has_the_rows_of_one_that_was_left_alone(tmp_path):
    whole = captured(tmp_path / "whole").bank()
    captured(tmp_path / "parts", callbacks=[StopAt(14)])
    checkpoint = str(tmp_path / "parts/run/checkpoint-12")
    resumed = captured(tmp_path / "parts", resume=checkpoint).bank()
    for segment in (0, 1):
        assert torch.equal(rows_of(whole, segment), rows_of(resumed, segment))
    assert whole.trajectory.curvatures == resumed.trajectory.curvatures


def test_examples_without_an_index_are_refused(tmp_path):
    callback = RecorderCallback(tmp_path / "recorded", capture=sp.Sketch(64), task=sp.Classification())
    with pytest.raises(TypeError, match="remove_unused_columns=False"):
        train(tmp_path / "run", callbacks=[callback], per_device_train_batch_size=BATCH)
    with pytest.raises(TypeError, match="go together"):
        RecorderCallback(tmp_path, capture=sp.Sketch(64))


def test_two_trainings_make_one_bank_of_two_stages(tmp_path):
    """The second Trainer goes on with other examples; the stages are those of each alone."""
    first, second = captured(tmp_path / "one"), captured(tmp_path / "two")
    bank = second.bank(after=[first.captured(stage="before")], stage="after")
    assert [stage.name for stage in bank.stages] == ["before", "after"]
    alone = first.bank()
    for segment in (0, 1):
        rows = torch.cat([block.rows for block in bank.stages[0].iter_rows(segment)])
        assert torch.equal(rows, rows_of(alone, segment))


class Spoils(TrainerCallback):
    """As `load_best_model_at_end` does: other weights before the callbacks hear of the end."""

    def on_train_end(self, args, state, control, model=None, **_):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)


class StopOnLog(TrainerCallback):
    """As early stopping does, after the step's own event."""

    def on_log(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= 9


def test_a_model_that_is_exchanged_at_the_end_is_not_taken_for_the_last_step(tmp_path):
    plain, other = (RecorderCallback(tmp_path / name, every=7) for name in ("plain", "other"))
    train(tmp_path / "one", callbacks=[plain])
    train(tmp_path / "two", callbacks=[Spoils(), other])
    found, expected = (one.trajectory().stages[0].checkpoints for one in (other, plain))
    assert [each.step for each in found] == [each.step for each in expected] == [7, 14, 20]
    assert [each.hash() for each in found] == [each.hash() for each in expected]
    early = RecorderCallback(tmp_path / "early", every=7)
    with pytest.warns(UserWarning, match="not those of its last step, 9"):
        train(tmp_path / "three", callbacks=[Spoils(), StopOnLog(), early])
    assert [each.step for each in early.trajectory().stages[0].checkpoints] == [7]
