"""Records of runs: what is written is read back, what is malformed is refused by name, times follow from each cut."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import source_proj as sp
from source_proj.gradients import ParameterSpace
from source_proj.trajectory import CheckpointRef, RunRecord, StageRecord, split_segments
from source_proj.trajectory.optimizers import Optimizer

HASHES = st.integers(0, 2**256 - 1).map("{:064x}".format)
POSITIVE = st.floats(1e-6, 1e6)
OPTIMIZERS = st.one_of(
    st.builds(sp.SGD, st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 0.99)),
    st.builds(sp.Adam, st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), decoupled=st.booleans()),
    st.builds(
        sp.RMSprop, groups=st.lists(st.builds(sp.ParameterGroup, st.lists(st.text(min_size=1), min_size=1)), max_size=2)
    ),
)  # fmt: skip


@st.composite
def stages(draw, name, metrics):
    count, start = draw(st.integers(1, 5)), draw(st.integers(0, 9))
    steps = sorted(draw(st.sets(st.integers(start + 1, 10**6), min_size=count, max_size=count)))
    refs = tuple(CheckpointRef(step, draw(st.none() | st.text()), draw(HASHES)) for step in steps)
    preconditioner = draw(st.sampled_from(["none", "scalar", "shared", "per_segment"]))

    def numbers():
        return tuple(draw(st.lists(POSITIVE, min_size=count, max_size=count)))

    return StageRecord(
        name=name,
        optimizer=draw(OPTIMIZERS),
        preconditioner=preconditioner,
        loss_scale=draw(POSITIVE),
        start_step=start,
        checkpoints=refs,
        final=CheckpointRef(steps[-1], None, draw(HASHES)),
        segments=tuple(map(tuple, split_segments(count, draw(st.integers(1, count))))),
        lr_integrals=tuple(np.cumsum(numbers()).tolist()),
        lr_sums=draw(st.none() | st.just(tuple(np.cumsum(numbers()).tolist()))),
        time_factor=draw(POSITIVE),
        scalars=numbers() if preconditioner == "scalar" else None,
        decays=draw(st.none() | st.just(numbers())),
        metrics=tuple(draw(st.integers(0, metrics - 1)) for _ in range(count)),
    )


@st.composite
def runs(draw):
    digests = draw(st.lists(st.none() | HASHES, min_size=1, max_size=3, unique=True))
    names = draw(st.lists(st.text(), min_size=1, max_size=3, unique=True))
    return RunRecord(tuple(draw(stages(name, len(digests))) for name in names), tuple(digests))


@given(runs())
def test_what_is_written_is_read_back(run):
    content = json.loads(json.dumps(run.to_json(), allow_nan=False))
    assert RunRecord.from_json(content) == run
    assert RunRecord.from_json(content).to_json() == run.to_json() == content


@given(runs(), st.data())
def test_times_and_decays_of_any_cut(run, data):
    """Against sums over the intervals between checkpoints, one at a time."""
    stage = data.draw(st.sampled_from(run.stages))
    count = len(stage.checkpoints)
    groups = split_segments(count, data.draw(st.integers(1, count)))
    if any(len({stage.metrics[c] for c in group}) > 1 for group in groups):
        with pytest.raises(ValueError, match="different metrics"):
            stage.cut(groups)
        return
    scalars = stage.scalars or [1.0] * count
    decays = stage.decays or [stage.optimizer.weight_decay] * count
    rates = np.diff(stage.lr_integrals, prepend=0.0)
    unclipped = np.diff(stage.lr_sums or stage.lr_integrals, prepend=0.0)
    for group, segment in zip(groups, stage.cut(groups), strict=True):
        time = sum(stage.time_factor * scalars[c] * rates[c] for c in group)
        decayed = sum(stage.time_factor * decays[c] * unclipped[c] for c in group)
        assert segment.checkpoints == tuple(group)
        assert segment.time == pytest.approx(time, rel=1e-6)
        assert segment.decay * segment.time == pytest.approx(decayed, rel=1e-6, abs=1e-12)
        assert segment.metric == stage.metrics[group[0]]


@given(runs())
def test_crossed_metrics_are_the_earlier_ones(run):
    earlier = []
    for index, stage in enumerate(run.stages):
        for checkpoint, own in enumerate(stage.metrics):
            assert run.crossed_metrics(index, checkpoint) == sorted(set(earlier) - {own})
            earlier.append(own)


def clipped_run():
    """A record with every optional entry, as JSON."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    points = []
    for step in (4, 8):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        points.append(sp.Checkpoint(model.state_dict(), step, 0.1, optimizer.state_dict()))
    adam = sp.Adam(weight_decay=0.1)
    run = sp.Trajectory.from_stages(
        [
            sp.Stage("a", points, adam, clip_factors=lambda _: 0.5),
            sp.Stage("b", points, adam, 2, preconditioner="per_segment"),
        ]
    )
    resolved = run.resolve(model, ParameterSpace.from_model(model))
    assert sorted(resolved.scales) == sorted(resolved.record.scales)
    return json.loads(json.dumps(resolved.record.to_json()))


RUN = clipped_run()


def places(content, path=()):
    """Every entry of a record, as the keys that lead to it."""
    yield path
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, entry in pairs:
        yield from places(entry, (*path, key))


def entry(path):
    content = RUN
    for key in path:
        content = content[key]
    return content


def changed(path, change):
    content = copy.deepcopy(RUN)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return content


def put(value):
    return lambda holder, key: holder.__setitem__(key, value)


FREE = ("path", "name")  # any text will do


@pytest.mark.parametrize("path", [path for path in places(RUN) if path], ids=str)
@pytest.mark.parametrize("value", [{}, [None], math.nan, "x", True, -1, 10**400], ids=lambda value: repr(value)[:9])
def test_an_entry_of_another_type_is_refused(path, value):
    fits = path[-1] in FREE if isinstance(value, str) else value is True and path[-1] in ("amsgrad", "decoupled")
    if fits:
        return
    with pytest.raises(ValueError, match="trajectory"):
        RunRecord.from_json(changed(path, put(value)))


@pytest.mark.parametrize("path", [path for path in places(RUN) if path and isinstance(path[-1], str)], ids=str)
def test_a_missing_entry_is_refused(path):
    with pytest.raises(ValueError, match=path[-1]):
        RunRecord.from_json(changed(path, lambda holder, key: holder.pop(key)))


OBJECTS = [(), ("stages", 0), ("stages", 1), ("stages", 0, "final"), ("stages", 1, "checkpoints", 0),
           ("stages", 0, "optimizer")]  # fmt: skip


@pytest.mark.parametrize("path", OBJECTS, ids=str)
def test_an_unknown_entry_is_refused(path):
    with pytest.raises(ValueError, match="extra"):
        RunRecord.from_json(changed((*path, "extra"), put(1)))


@pytest.mark.parametrize("content", [None, [], "x", 3])
def test_what_is_no_object_is_refused(content):
    with pytest.raises(ValueError, match="trajectory must be an object"):
        RunRecord.from_json(content)


LISTS = ["checkpoints", "lr_integrals", "lr_sums", "scalars", "decays", "metrics", "segments"]


@pytest.mark.parametrize("name", LISTS)
def test_unequal_lengths_are_refused(name):
    with pytest.raises(ValueError, match=r"trajectory\.stages\[0\]"):
        RunRecord.from_json(changed(("stages", 0, name), lambda holder, key: holder[key].pop()))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("metrics",), [], "metrics must be at least one"),
        (("metrics",), ["../../etc"], r"metrics\[0\] must be 64 hexadecimal digits"),
        (("metrics",), [None, None, None], "metrics must be at least one, and differ"),
        (("metrics",), [None], r"stages\[1\].metrics names metric 2, and metrics has 1"),
        (("stages",), [], "stages must be at least one"),
        (("stages", 1, "name"), "a", "of different names"),
        (("stages", 0, "checkpoints", 0, "hash"), "../../etc", "hash must be 64 hexadecimal digits"),
        (("stages", 0, "checkpoints", 0, "step"), 8, "checkpoints are at the steps"),
        (("stages", 0, "checkpoints", 0, "step"), -4, "step must be at least 0"),
        (("stages", 0, "start_step"), 5, "from step 5 on"),
        (("stages", 0, "final", "step"), 9, "final is at step 9"),
        (("stages", 0, "preconditioner"), "metric", "preconditioner must be one of 'shared'"),
        (("stages", 0, "preconditioner"), "none", "preconditioner is 'none', and scalars is"),
        (("stages", 0, "lr_integrals"), [2.0, 1.0], "lr_integrals must not fall"),
        (("stages", 0, "scalars"), [-1.0, 1.0], "scalars must be at least 0"),
        (("stages", 0, "loss_scale"), 0, "loss_scale must be positive"),
        (("stages", 0, "segments"), [[1], [0]], "has 1 where 0 should be"),
        (
            ("stages", 0, "optimizer", "name"),
            "Lion",
            f"its name is 'Lion', and known optimizers are {', '.join(Optimizer.known)}",
        ),
        (("stages", 0, "optimizer", "betas"), [0.9], r"optimizer: Adam\.betas must have 2 entries"),
    ],
)
def test_what_is_out_of_range_is_refused(path, value, named):
    with pytest.raises(ValueError, match=named):
        RunRecord.from_json(changed(path, put(value)))
