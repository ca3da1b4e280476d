"""SOURCE over stages that trained different parameters: each moves, and lets decay, its own ones alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from preconditioned import LR, dense_scores, dense_segment, margin, per_example
from problems import Problem, _blobs
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp

DECAY = 3.0
LAYERS = {"0": slice(0, 24), "2": slice(24, 39)}
ORDERS = [("02", "2"), ("2", "02"), ("0", "2"), ("02", "0", "02"), ("2", "02", "0")]


def frozen_run(orders, told, *, decay=DECAY, directory=None, make=None):
    """Stages that train the layers named each, recorded or told by the weights alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    make = make or (lambda parameters: torch.optim.SGD(parameters, lr=LR, weight_decay=decay))
    stages, data = [], {}
    for number, layers in enumerate(orders):
        name, (x, y) = f"stage{number}", _blobs(12 + 6 * number)
        for layer in LAYERS:
            model[int(layer)].requires_grad_(layer in layers)
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        points = []
        recorder = sp.Recorder(model, optimizer, directory / name, every=10, stage=name) if told == "recorder" else None
        for step in range(1, 21):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if recorder is not None:
                recorder.step()
            elif step % 10 == 0:
                points.append(sp.Checkpoint(model.state_dict(), step, LR))
        made = (
            sp.Stage(name, points[-1:] if told == "the end" else points, sp.SGD(weight_decay=decay)) if points else None
        )
        stages.append(made or recorder.stage())
        data[name] = TensorDataset(x, y)
    model.requires_grad_(True)
    return Problem(model, sp.Classification(), sp.Trajectory.from_stages(stages), data, TensorDataset(*_blobs(5)))


def dense(problem, orders, times=None):
    """The formula in the space of all parameters: P, and the decay, are 0 where a stage trained nothing."""
    segments, start = [], 0
    for place, (stage, layers) in enumerate(zip(problem.trajectory.stages, orders, strict=True)):
        p = torch.zeros(problem.size, dtype=torch.float64, device="cpu")
        for layer in layers:
            p[LAYERS[layer]] = 1.0
        data, group = problem.train[stage.name], range(len(stage.checkpoints))
        segments.append(dense_segment(problem, stage, group, data, start, p, DECAY * p))
        if times is not None:
            segments[-1].time, segments[-1].decay = times[place].time, times[place].decay * p
        start += len(data)
    queries = per_example(problem.model, problem.trajectory.final.load(), margin, problem.queries)
    return dense_scores(segments, queries, start)


def scores(problem, bank):
    method = sp.Source(bank, model=problem.model, damping=None, query_gradient="final", progress=False)
    return method.score(problem.queries).to_numpy()


def assert_equal(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("told", ["recorder", "weights"])
@pytest.mark.parametrize("orders", ORDERS, ids=" then ".join)
def test_a_stage_moves_its_own_parameters_alone(tmp_path, orders, told):
    """A frozen backbone takes no part in fine-tuning; nor does what is frozen decay."""
    problem = frozen_run(orders, told, directory=tmp_path)
    assert_equal(scores(problem, problem.build(tmp_path / "bank")), dense(problem, orders))


def test_one_checkpoint_is_compared_with_the_end_of_the_stage_before(tmp_path):
    """Of the first stage, whose only weights they are, nothing is known: it may have trained all."""
    problem = frozen_run(("02", "2"), "the end")
    bank = problem.build(tmp_path / "bank")
    assert_equal(scores(problem, bank), dense(problem, ("02", "2")))


def test_adam_of_a_head_alone(tmp_path):
    """The number in place of P is the head's, and the backbone is none of its metric."""
    orders = ("02", "2")
    problem = frozen_run(
        orders, "recorder", directory=tmp_path, make=lambda p: torch.optim.AdamW(p, lr=LR, eps=1e-3, weight_decay=0.2)
    )
    bank = problem.build(tmp_path / "bank")
    times = [stage.record.cut()[0] for stage in bank.stages]
    assert times[1].decay > 0
    assert_equal(scores(problem, bank), dense(problem, orders, times))


@pytest.mark.parametrize("mode", ["scalar", "shared", "factored", "per_segment", "factored_per_segment", "none"])
def test_a_head_that_adam_trained_first_says_nothing_of_the_backbone(tmp_path, mode):
    """Its optimizer held none of the attributed parameters: what counts is the other stage, as by itself."""
    problem = frozen_run(
        ("2", "02"), "recorder", directory=tmp_path, make=lambda p: torch.optim.AdamW(p, lr=LR, eps=1e-3)
    )
    stages = [replace(stage, preconditioner=mode) for stage in problem.trajectory.stages]
    found = []
    for own in (stages, stages[1:]):
        told = replace(
            problem,
            trajectory=sp.Trajectory.from_stages(own),
            train={stage.name: problem.train[stage.name] for stage in own},
        )
        bank = told.build(tmp_path / f"bank{len(own)}", parameters=["0.*"])
        found.append(scores(problem, bank))
    first = len(problem.train["stage0"])
    assert_equal(found[0][:, first:], found[1])
    assert not found[0][:, :first].any()


def test_parameters_that_no_stage_moved_are_as_they_were_asked_for(tmp_path):
    problem = frozen_run(("2", "2"), "recorder", directory=tmp_path)
    bank = problem.build(tmp_path / "bank", parameters=["*"])
    assert list(bank.trajectory.metrics) == [None]


@pytest.mark.parametrize("method", [sp.InfluenceFunction, sp.ArnoldiInfluence, sp.DataInf, sp.Trak])
def test_what_knows_the_end_alone_refuses_a_last_stage_that_moved_nothing(tmp_path, method):
    problem = frozen_run(("0", "2"), "recorder", directory=tmp_path)
    bank = problem.build(tmp_path / "bank", parameters=["0.*"])
    with pytest.raises(sp.MismatchError, match="the last stage, 'stage1', moved none of the parameters"):
        method(bank, model=problem.model, progress=False).score(problem.queries)
    assert sp.Source(bank, model=problem.model, progress=False).score(problem.queries).values.any()


@pytest.mark.parametrize("kind", ["tensor", "sparse", "rademacher", "kronecker"])
def test_sketched_rows_of_a_stage_are_of_its_own_parameters(tmp_path, kind):
    """What is frozen is none of a sketch: its rows are those of a bank of the head alone, at the same coordinates."""
    problem = frozen_run(("02", "2"), "recorder", directory=tmp_path)
    sketch = sp.Sketch(16, kind)
    bank = problem.build(tmp_path / "bank", sketch)
    (own,) = bank.stages[1].iter_rows(0)
    (whole,) = bank.stages[1].iter_rows(0, metric=0)
    state = bank.trajectory.stages[1].checkpoints[0]
    full = per_example(problem.model, sp.Checkpoint(state.path, 10).load(), margin, problem.train["stage1"]).float()
    names, space = bank.space_spec["names"], dict(zip(bank.space_spec["names"], bank.space_spec["shapes"], strict=True))
    for rows, wanted in ((own.rows, names[2:]), (whole.rows, names)):
        expected, begin = torch.zeros_like(rows), 0
        for name in names:
            stop = begin + int(np.prod(space[name]))
            if name in wanted:
                sketch.add_(expected, full[:, begin:stop].contiguous(), begin, tuple(space[name]))
            begin = stop
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
