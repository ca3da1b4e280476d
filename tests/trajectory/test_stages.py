"""Stages and segments: learning rates against brute-force loops over torch's optimizers and schedulers."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from source_proj.trajectory import SGD, Checkpoint, Stage, Trajectory, split_segments

WEIGHTS = {"w": torch.ones(2)}


def described(run):
    return [stage.describe() for stage in run.stages]


def times(stage, segments):
    return [segment.time for segment in stage.describe().cut(segments)]


def checkpoints(*steps, lr=None):
    return [Checkpoint(WEIGHTS, step, lr) for step in steps]


SCHEDULERS = {
    "constant": lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=50),
    "warm-up": lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=20),
    "step decay": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1),
    "warm-up, then cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=40),
        ],
        milestones=[10],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("as_function", [True, False])
def test_integrals_equal_the_rates_that_an_optimizer_used(name, as_function):
    """Under a constant gradient of one, plain SGD moves the weight by the very integral."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    scheduler = SCHEDULERS[name](optimizer)
    rates, travelled = [], {}
    for step in range(1, 51):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones((), dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        travelled[step] = -weight.item()
    steps = [7, 20, 41, 50]
    schedule = rates.__getitem__ if as_function else rates
    stage = Stage("train", checkpoints(*steps), SGD(momentum=0.5), segments=[[0, 1], [2], [3]], lr_schedule=schedule)
    assert stage.lr_integrals == pytest.approx([travelled[step] for step in steps], rel=1e-12)
    times = [segment.time for segment in stage.describe().cut()]
    expected = [travelled[20], travelled[41] - travelled[20], travelled[50] - travelled[41]]
    assert times == pytest.approx([2 * part for part in expected], rel=1e-12)


def test_constant_rate():
    stage = Stage("train", checkpoints(10, 30, 60, lr=0.1), SGD(momentum=0.9), segments=2)
    assert stage.lr_integrals == pytest.approx([1.0, 3.0, 6.0])
    assert times(stage, [[0, 1], [2]]) == pytest.approx([30.0, 30.0])
    assert times(stage, 1) == pytest.approx([60.0])


@pytest.mark.parametrize("rates", [(0.1, None), (None, None), (0.1, 0.2)])
def test_rates_at_checkpoints_are_never_interpolated(rates):
    given = [Checkpoint(WEIGHTS, 10, rates[0]), Checkpoint(WEIGHTS, 20, rates[1])]
    with pytest.raises(ValueError, match="lr_schedule") as error:
        Trajectory(given)
    assert (str(list(rates)) if None not in rates else "gives no learning rate") in str(error.value)


def test_schedule_counts_from_the_stage_start_step():
    asked = []
    stage = Stage("b", checkpoints(103, 105), start_step=100, lr_schedule=lambda step: asked.append(step) or 1.0)
    assert asked == [100, 101, 102, 103, 104]
    assert stage.lr_integrals == [3.0, 5.0]
    listed = Stage("b", checkpoints(103, 105), start_step=100, lr_schedule=[1, 2, 3, 4, 5])
    assert listed.lr_integrals == [6.0, 15.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_schedule": [0.1] * 19}, "19 entries for the 20 optimizer steps 0 to 20"),
        ({"lr_schedule": [0.1] * 21}, "21 entries"),
        ({"lr_schedule": lambda step: -0.1}, "-0.1 for update 0"),
        ({"lr_schedule": [0.1] * 10 + [float("nan")] * 10}, "nan for update 10"),
        ({"checkpoints": []}, "no checkpoint"),
        ({"checkpoints": checkpoints(20, 10, lr=0.1)}, "10 follows 20"),
        ({"checkpoints": checkpoints(20, 20, lr=0.1)}, "20 follows 20"),
        ({"start_step": 11}, "step 10 lies before start_step=11"),
        ({"start_step": -1}, "start_step .*-1"),
        ({"start_step": 10, "segments": 2}, "segment 0 .* has no optimizer step"),
        ({"segments": 3}, "segments=3"),
        ({"loss_reduction": "none"}, "'none'"),
        ({"loss_reduction": "sum"}, "needs batch_size"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"accumulation": 0}, "accumulation.*0"),
        ({"accumulation": 1.5}, "accumulation.*1.5"),
        ({"final": Checkpoint(WEIGHTS, 25)}, "final is at step 25, the last checkpoint at 20"),
    ],
)
def test_what_does_not_add_up_is_refused(changes, message):
    arguments = {"name": "train", "checkpoints": checkpoints(10, 20, lr=0.1), **changes}
    with pytest.raises(ValueError, match=message):
        Stage(**arguments)


def points():
    return checkpoints(10, 20, lr=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_schedule": 0.1}, "lr_schedule of stage 'train' is 0.1: give a function"),
        ({"lr_schedule": "cosine"}, "is 'cosine': give a function"),
        ({"lr_schedule": dict.fromkeys(range(20), 0.1)}, "give a function"),
        ({"clip_factors": {1.0}}, "clip_factors .* give a function"),
        ({"optimizer": torch.optim.SGD([WEIGHTS["w"].clone().requires_grad_()], lr=0.1)}, "a Recorder reads torch's"),
        ({"optimizer": SGD}, "as sp.SGD\\(momentum=0.9\\) does .* got <class"),
        ({"optimizer": "sgd"}, "got 'sgd'"),
        ({"name": 1}, "name must be a string, got 1: give '1'"),
        ({"checkpoints": points()[0]}, "must be a list, got one: give \\[Checkpoint"),
    ],
)
def test_arguments_of_another_kind_are_refused(changes, message):
    arguments = {"name": "train", "checkpoints": points(), **changes}
    with pytest.raises(TypeError, match=message):
        Stage(**arguments)


def test_schedules_of_no_numbers_are_refused():
    with pytest.raises(ValueError, match="gives None for update 0"):
        Stage("train", points(), lr_schedule=lambda step: None)
    for rate in ("0.1", [0.1], -0.1, float("nan"), torch.ones(2)):  # a list is what schedulers' get_last_lr() gives
        with pytest.raises(ValueError, match="lr must be a number, finite and at least 0, got"):
            Checkpoint(WEIGHTS, 10, lr=rate)


def test_checkpoints_may_come_one_by_one():
    stage = Stage("train", (point for point in points()))
    assert [point.step for point in stage.checkpoints] == [10, 20]


def test_stages_are_put_together_from_stages_alone():
    stage = Stage("train", points())
    assert Trajectory.from_stages(one for one in [stage]).stages == (stage,)
    with pytest.raises(TypeError, match="got the stage 'train': give \\[stage\\]"):
        Trajectory.from_stages(stage)
    with pytest.raises(TypeError, match="got a Trajectory: a Recorder gives its own by stage"):
        Trajectory.from_stages([Trajectory(points())])


@given(st.data())
def test_split_by_count(data):
    count = data.draw(st.integers(1, 40))
    segments = data.draw(st.integers(1, count))
    groups = split_segments(count, segments)
    sizes = [len(group) for group in groups]
    assert [i for group in groups for i in group] == list(range(count))
    assert len(groups) == segments
    assert max(sizes) - min(sizes) <= 1
    assert split_segments(count, groups) == groups


@pytest.mark.parametrize(
    ("segments", "error", "message"),
    [
        (0, ValueError, "segments=0"),
        (5, ValueError, "1 to 4 segments, got segments=5"),
        (True, ValueError, "segments=True"),
        ([[0, 1], [3]], ValueError, "has 3 where 2 should be"),
        ([[0, 1], [1, 2, 3]], ValueError, "has 1 where 2 should be"),
        ([[2, 3], [0, 1]], ValueError, "has 2 where 0 should be"),
        ([[1, 0], [2, 3]], ValueError, "has 1 where 0 should be"),
        ([[0, 1], [2]], ValueError, "leave out the checkpoints from 3 to 3"),
        ([], ValueError, "leave out the checkpoints from 0 to 3"),
        ([[0, 1], [], [2, 3]], ValueError, "segment 1 .* has no checkpoint"),
        ([[0, 1], [2, 3, 4]], ValueError, "has 4 where the end should be"),
        ([[-4, -3, -2, -1]], ValueError, "has -4 where 0 should be"),
        ([[0, True, 2, 3]], ValueError, "has True where 1 should be"),
        ([[0, 1.5], [2, 3]], ValueError, "has 1.5 where 1 should be"),
        ([0, 1, 2, 3], TypeError, r"lists of checkpoint indices"),
        (["01", "23"], TypeError, r"lists of checkpoint indices"),
        ("0123", TypeError, r"lists of checkpoint indices"),
    ],
)
def test_malformed_segments(segments, error, message):
    with pytest.raises(error, match=message):
        split_segments(4, segments)
    with pytest.raises(error, match=message):
        Trajectory(checkpoints(1, 2, 3, 4, lr=0.1), segments=segments)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"loss_reduction": "sum", "batch_size": 8}, 8),
        ({"accumulation": 4}, 4),
        ({"loss_reduction": "sum", "batch_size": 8, "accumulation": 4}, 32),
        ({"batch_size": 8}, 1),
    ],
)
def test_loss_scale_against_training_on_the_mean_loss(options, scale):
    """Summed losses at lr η and decay λ make the very steps of mean losses at scale·η and λ/scale."""
    torch.manual_seed(0)
    data = torch.randn(8, 3, dtype=torch.float64)
    stage = Stage("train", checkpoints(5, lr=0.01), SGD(momentum=0.5, weight_decay=0.1), **options)
    record = stage.describe()

    def train(lr, weight_decay, multiplier):
        weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=lr, momentum=0.5, weight_decay=weight_decay)
        for _ in range(5):
            optimizer.zero_grad()
            (multiplier * (data @ weight).sin().mean()).backward()
            optimizer.step()
        return weight.detach()

    as_trained = train(0.01, 0.1, scale)
    as_described = train(record.lr_integrals[-1] / 5, record.optimizer.weight_decay, 1)
    assert stage.loss_scale == scale
    torch.testing.assert_close(as_described, as_trained, rtol=1e-12, atol=0)


def random_state(seed):
    torch.manual_seed(seed)
    return {"w": torch.randn(3, 2), "h": torch.randn(2).half(), "running": torch.rand(2), "count": torch.tensor(seed)}


def test_average_parameters():
    states = [random_state(seed) for seed in range(5)]
    rates = [0.1 * (1 + t % 3) for t in range(50)]
    run = Trajectory(
        [Checkpoint(state, 10 * (i + 1)) for i, state in enumerate(states)],
        SGD(momentum=0.9),
        segments=[[0, 1], [2, 3, 4]],
        lr_schedule=rates,
    )
    averaged = run.average_parameters()
    (before,), (after,) = described(run), described(averaged)
    for checkpoint, group in zip(averaged.stages[0].checkpoints, ([0, 1], [2, 3, 4]), strict=True):
        mean = checkpoint.load()
        for name in ("w", "running"):
            torch.testing.assert_close(mean[name], torch.stack([states[i][name] for i in group]).mean(0))
        assert mean["h"].dtype == torch.float16
        assert mean["count"] == states[group[-1]]["count"]
    assert after.steps == (20, 50)
    for segment, again in zip(before.cut(), after.cut(), strict=True):
        assert again.time == pytest.approx(segment.time, rel=1e-14)  # summed over other intervals
    assert after.final == before.final
    assert averaged.final.load()["w"].equal(states[-1]["w"])
    assert described(averaged.average_parameters()) == described(averaged)


def test_average_of_single_checkpoints_is_the_trajectory_itself():
    run = Trajectory(checkpoints(10, 20, lr=0.1), segments=2)
    assert described(run.average_parameters()) == described(run)


def test_stages():
    pretrain = Stage("pretrain", checkpoints(10, 20, lr=0.1), SGD(momentum=0.9), segments=2)
    again = Stage("finetune", checkpoints(5, lr=0.01))
    onward = Stage("onward", checkpoints(25, lr=0.01), start_step=20)
    run = Trajectory.from_stages([pretrain, again, onward])
    assert [stage.name for stage in run.stages] == ["pretrain", "finetune", "onward"]
    assert [stage.lr_integrals for stage in described(run)] == [
        pytest.approx((1.0, 2.0)),
        pytest.approx((0.05,)),
        pytest.approx((0.05,)),
    ]
    assert run.final is onward.checkpoints[-1]
    with pytest.raises(ValueError, match="'pretrain'"):
        Trajectory.from_stages([pretrain, pretrain])
    with pytest.raises(ValueError, match="at least one stage"):
        Trajectory.from_stages([])


def test_descriptions_tell_runs_apart(tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.pt")
    (path_stage,) = described(Trajectory([Checkpoint(tmp_path / "a.pt", 10, 0.1)]))
    dict_run = Trajectory(checkpoints(10, lr=0.1))
    assert path_stage.checkpoints[0].path == str(tmp_path / "a.pt")
    assert described(dict_run)[0].final.path is None
    others = [
        Trajectory([Checkpoint({"w": torch.zeros(2)}, 10, 0.1)]),
        Trajectory(checkpoints(11, lr=0.1)),
        Trajectory(checkpoints(10, lr=0.2)),
        Trajectory(checkpoints(10, lr=0.1), SGD(weight_decay=0.1)),
    ]
    assert all(described(other) != described(dict_run) for other in others)
    assert described(Trajectory(checkpoints(10, lr=0.1))) == described(dict_run)


def test_numpy_integers_are_integers():
    stage = Stage(
        "train", [Checkpoint(WEIGHTS, np.int64(12), 0.1)], start_step=np.int32(2), loss_reduction="sum",
        batch_size=np.int64(4), accumulation=np.uint8(2),
    )  # fmt: skip
    assert stage.lr_integrals == pytest.approx([8.0])
    assert all(type(value) is int for value in (stage.checkpoints[0].step, stage.start_step, stage.batch_size))
    assert json.loads(json.dumps(stage.describe().start_step)) == 2


def test_stages_in_place_of_checkpoints_are_sent_to_from_stages():
    stage = Stage("pretrain", checkpoints(10, lr=0.1))
    with pytest.raises(TypeError, match=r"the stage 'pretrain': put stages together by Trajectory.from_stages"):
        Trajectory([stage])
    with pytest.raises(TypeError, match="got a dict"):
        Trajectory([WEIGHTS])


def test_a_checkpoint_without_a_learning_rate_is_named_with_the_remedy():
    given = [Checkpoint(WEIGHTS, 10, 0.1), Checkpoint(WEIGHTS, 76)]
    with pytest.raises(
        ValueError, match=r"step=76.* no learning rate: .*Checkpoint\(state, 76, lr=0.1\); .*lr_schedule"
    ):
        Trajectory(given, optimizer=SGD())
    with pytest.raises(ValueError, match=r"give the learning rates \[0.1, 0.2\]; .*lr_schedule"):
        Trajectory([given[0], Checkpoint(WEIGHTS, 76, 0.2)])
