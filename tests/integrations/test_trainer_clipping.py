"""What gradients were clipped to is the run's own word, at the steps that it was said of."""

import math
import random

import pytest
import torch
from trainer_runs import STEPS, copied, history, train, transformers

import source_proj as sp
from source_proj.integrations import RecorderCallback
from source_proj.integrations.trainer_arguments import trainer_arguments
from source_proj.integrations.trainer_clipping import clipping
from source_proj.integrations.trainer_folder import logged


def stage_of(directory, **options):
    return sp.Trajectory.from_hf_trainer(directory, **options).stages[0]


def clipped_integrals(directory, most):
    """Σ lr · clip to each checkpoint, from a log of every step; ``most``: of every update."""
    entries = history(directory, STEPS)
    rates, norms = logged(entries, "learning_rate"), logged(entries, "grad_norm")
    factors = [min(1.0, most[t] / (norms[t + 1] + 1e-6)) if most[t] else 1.0 for t in range(STEPS)]
    return [math.fsum(rates[t + 1] * factors[t] for t in range(step)) for step in range(4, STEPS + 1, 4)]


@pytest.mark.parametrize("norm", [0.0, round(random.Random(3).uniform(0.1, 0.5), 3), 4])
def test_the_runs_own_norm_counts_where_none_is_given(tmp_path, norm):
    train(tmp_path / "run", max_grad_norm=norm)
    expected = clipped_integrals(tmp_path / "run", [norm] * STEPS)
    assert stage_of(tmp_path / "run").lr_integrals == pytest.approx(expected, rel=1e-12)
    assert stage_of(tmp_path / "run", max_grad_norm=0).clip_factors is None
    with pytest.warns(UserWarning, match=rf"^max_grad_norm=0.2 was given, .* says {float(norm)}: what was given"):
        other = stage_of(tmp_path / "run", max_grad_norm=0.2)
    assert other.lr_integrals == pytest.approx(clipped_integrals(tmp_path / "run", [0.2] * STEPS), rel=1e-12)
    gone = copied(tmp_path / "run", tmp_path / "gone")
    for file in gone.glob("checkpoint-*/training_args.bin"):
        file.unlink()
    default = clipped_integrals(tmp_path / "run", [1.0] * STEPS)
    assert stage_of(gone).lr_integrals == pytest.approx(default, rel=1e-12)


@pytest.mark.parametrize("norm", [None, 0, 3, 0.7])
def test_an_argument_of_none_is_no_clipping(tmp_path, norm):
    """Some versions take None; the Trainer's default of 1 is not what was trained with then."""
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    arguments.max_grad_norm = norm
    torch.save(arguments, tmp_path / "training_args.bin")
    assert trainer_arguments(tmp_path)["max_grad_norm"] == (norm or 0.0)


@pytest.mark.parametrize(("first", "second"), [(0.2, 0.0), (0.0, 0.3), (0.3, 0.15)])
def test_a_run_resumed_with_another_norm_has_each_at_its_steps(tmp_path, first, second):
    train(tmp_path / "run", max_grad_norm=first, stop=8)
    train(tmp_path / "run", max_grad_norm=second, resume=str(tmp_path / "run/checkpoint-8"))
    expected = clipped_integrals(tmp_path / "run", [first] * 8 + [second] * (STEPS - 8))
    assert stage_of(tmp_path / "run").lr_integrals == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_each_update_has_its_own_norm_and_most(seed):
    """Against torch's clipping; an update that was not logged is taken to have the next logged one's norm."""
    rng = random.Random(seed)
    norms = [rng.uniform(0.1, 3) for _ in range(12)]
    most = [rng.choice([0.0, 0.5, 1.0]) for _ in range(12)]
    seen = sorted(rng.sample(range(12), 5))
    taken = [next((norms[s] for s in seen if s >= t), 0.0) for t in range(12)]
    expected = []
    for norm, limit in zip(taken, most, strict=True):
        weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        weight.grad = torch.full((1,), norm, dtype=torch.float64)
        if limit:
            torch.nn.utils.clip_grad_norm_([weight], limit)
        expected.append(float(weight.grad) / norm if norm else 1.0)
    found = clipping([{"step": s + 1, "grad_norm": norms[s]} for s in seen], most)
    assert found.factors == pytest.approx(expected, rel=1e-12)
    whole = clipping([{"step": t + 1, "grad_norm": norms[t]} for t in range(12) if most[t]], most)
    assert whole.assumed is None  # norms of what was not clipped do not matter


@pytest.mark.parametrize(("looked_at", "said"), [(1, True), (29, True), (30, False), (100, False)])
def test_a_few_short_gradients_say_little_of_the_others(looked_at, said):
    """One logged norm of a hundred, shorter than was allowed, leaves all others' clipping to chance."""
    history = [{"step": 100 // looked_at * place + 1, "grad_norm": 0.5} for place in range(looked_at)]
    found = clipping(history, [1.0] * 100)
    assert found.factors == [1.0] * 100
    words = f"norms of {looked_at} of 100 steps were logged, and none of these was clipped: the others are assumed"
    assert (found.assumed is not None and words in found.assumed) is said


def test_the_callbacks_directory_takes_no_norm(tmp_path):
    train(tmp_path / "run", callbacks=[RecorderCallback(tmp_path / "recorded")])
    with pytest.raises(ValueError, match=r"wrote down .* clipping .* max_grad_norm="):
        stage_of(tmp_path / "recorded", max_grad_norm=1.0)
