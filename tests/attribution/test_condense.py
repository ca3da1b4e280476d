"""A bank of mean rows and their curvature gives the scores of the bank that it was made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import Problem, classification, regression, source, two_stages
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution.condense import _MeanRows

PROBLEMS = {"segments": classification, "stages": two_stages, "regression": regression}


def adam(preconditioner: str, segments: int = 1) -> Problem:
    """The classifier as if Adam had trained it."""
    problem = classification(segments=1)
    points = []
    for checkpoint in problem.trajectory.stages[0].checkpoints:
        moments = [torch.rand_like(p) * 1e-4 for p in problem.model.parameters()]
        state = {index: {"step": 1.0, "exp_avg_sq": moment} for index, moment in enumerate(moments)}
        optimizer = {"state": state, "param_groups": [{"params": list(state)}]}
        points.append(sp.Checkpoint(checkpoint.load(), checkpoint.step, lr=1e-3, optimizer_state=optimizer))
    run = sp.Trajectory(points, sp.Adam(), preconditioner=preconditioner, segments=segments)
    return replace(problem, trajectory=run)


def influence(problem: Problem, bank: sp.Bank, **options) -> sp.InfluenceFunction:
    return sp.InfluenceFunction(bank, model=problem.model, average=True, progress=False, **options)


def same(condensed: sp.Bank, bank: sp.Bank, problem: Problem, tolerance: float = 1e-4, **options) -> None:
    methods = [source]
    if all(stage.n_checkpoints == 1 for stage in condensed.stages):  # influence functions know no segments
        methods.append(influence)
    for method in methods:
        expected, found = (
            method(problem, each, **options).score(problem.queries).to_numpy() for each in (bank, condensed)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("sketch", [None, sp.Sketch(32)])
def test_scores_are_those_of_the_checkpoints_rows(tmp_path, kind, sketch):
    problem = PROBLEMS[kind]()
    bank = problem.build(tmp_path / "bank", sketch)
    condensed = sp.condense(bank, tmp_path / "condensed", progress=False)
    assert [stage.n_checkpoints for stage in condensed.stages] == [len(s.record.segments) for s in bank.stages]
    assert condensed.ids == bank.ids
    assert condensed.verify().ok
    assert [c.hash() for c in condensed.query_points()] == [c.hash() for c in bank.query_points()]
    same(condensed, bank, problem)


def test_self_influence_and_parts_are_the_same(tmp_path):
    """Of one segment: of several, an example's own gradient is the mean of theirs."""
    problem = classification(segments=1)
    bank = problem.build(tmp_path / "bank", sp.Sketch(32))
    both = [source(problem, each) for each in (sp.condense(bank, tmp_path / "condensed", progress=False), bank)]
    np.testing.assert_allclose(*(np.asarray(each.self_influence()) for each in both), rtol=1e-4)
    np.testing.assert_allclose(*(each.by_segment(problem.queries).to_numpy() for each in both), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preconditioner", ["scalar", "shared", "factored"])
def test_rows_stay_in_adams_metric(tmp_path, preconditioner):
    problem = adam(preconditioner)
    bank = problem.build(tmp_path / "bank")
    same(sp.condense(bank, tmp_path / "condensed", progress=False), bank, problem)


def test_segments_and_curvature_are_chosen_when_it_is_made(tmp_path):
    problem = classification(segments=1)
    bank = problem.build(tmp_path / "bank", sampled_fisher=2)
    options = {"segments": [[0], [1, 2, 3]], "curvature": "sampled_fisher"}
    condensed = sp.condense(bank, tmp_path / "condensed", progress=False, **options)
    expected = source(problem, bank, **options)
    assert source(problem, condensed).curvature == "sampled_fisher"
    scores = source(problem, condensed).score(problem.queries).to_numpy()
    np.testing.assert_allclose(scores, expected.score(problem.queries).to_numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="take 'sampled_fisher', which was kept with them"):
        source(problem, condensed, curvature="empirical_fisher")
    for method in (sp.TracIn, sp.Trak):
        with pytest.raises(ValueError, match="are of whole segments of training"):
            method(condensed, model=problem.model)
    with pytest.raises(ValueError, match="say nothing of errors at checkpoints: use by='self_influence'"):
        sp.curate.mislabelled(source(problem, condensed), problem.train.tensors[1].tolist())
    assert condensed.examples is bank.examples is not None
    with pytest.raises(sp.BankError, match="one row for each example and segment already"):
        sp.condense(condensed, tmp_path / "again")


def test_a_large_sketch_is_kept_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("source_proj.sketch.columns._MOST", 20)
    problem = classification(n=60, segments=1)
    bank = problem.build(tmp_path / "bank", sp.Sketch(40))
    condensed = sp.condense(bank, tmp_path / "condensed", progress=False)
    assert len(condensed.stages[0].captured_curvature(0)) == 2
    same(condensed, bank, problem)
    same(condensed, bank, problem, blocks=4)


def test_queries_are_asked_at_some_checkpoints(tmp_path):
    problem = classification(checkpoints=5, segments=1)
    bank = problem.build(tmp_path / "bank", sp.Sketch(32), storage="int2")
    condensed = sp.condense(bank, tmp_path / "condensed", query_points=2, progress=False)
    assert condensed.storage == "int8"
    assert [c.step for c in condensed.query_points()] == [40, 100]
    assert condensed.verify().ok  # holds no other weights
    own = source(problem, condensed)
    sketched = own.sketch(problem.queries)
    assert len(sketched[0].rows) == 2
    assert own.score(sketched).shape == (7, 40)
    for count in (0, -1, 2.5, "all"):
        with pytest.raises((ValueError, TypeError), match="query_points"):
            sp.condense(bank, tmp_path / "other", query_points=count)


def test_appended_rows_and_codes_come_along(tmp_path):
    """Of several parts, and in fewer bytes: a code errs by less than the sketch."""
    problem = classification(n=48, segments=1)
    inputs, labels = problem.train.tensors
    first = replace(problem, train=TensorDataset(inputs[:40], labels[:40]))
    bank = first.build(tmp_path / "bank", shard_rows=16)
    bank.append(problem.model, problem.task, TensorDataset(inputs[40:], labels[40:]), progress=False)
    same(sp.condense(bank, tmp_path / "plain", progress=False), bank, problem)
    coded = sp.condense(bank, tmp_path / "coded", storage="int8", progress=False)
    assert coded.storage == "int8"
    assert coded.nbytes()["rows"] < bank.nbytes()["rows"] / 4
    same(coded, bank, problem, tolerance=0.05)


def test_ids_that_are_strings_come_along(tmp_path):
    problem = classification(n=48, segments=1)
    inputs, labels = problem.train.tensors
    first = replace(problem, train=TensorDataset(inputs[:40], labels[:40]))
    bank = first.build(tmp_path / "bank", ids=[f"é{place}" for place in range(40)])
    more = TensorDataset(inputs[40:], labels[40:])
    bank.append(problem.model, problem.task, more, ids=[str(place) for place in range(8)], progress=False)
    condensed = sp.condense(bank, tmp_path / "condensed", progress=False)
    assert condensed.ids == bank.ids
    assert condensed.verify().ok
    same(condensed, bank, problem)


def test_weight_decay_is_that_of_all_intervals(tmp_path):
    """Where a number stands for P, each interval between checkpoints has a weight decay of its own."""
    problem = adam("scalar")
    points = [
        sp.Checkpoint(checkpoint.load(), step, lr=1e-3, optimizer_state=checkpoint.optimizer_state)
        for checkpoint, step in zip(problem.trajectory.stages[0].checkpoints, (10, 100, 110, 500), strict=True)
    ]
    run = sp.Trajectory(points, sp.Adam(weight_decay=0.1), preconditioner="scalar", segments=1)
    problem = replace(problem, trajectory=run)
    bank = problem.build(tmp_path / "bank", sp.Sketch(32))
    intervals = bank.stages[0].record.cut(4)
    assert len({interval.decay for interval in intervals}) == 4
    condensed = sp.condense(bank, tmp_path / "condensed", progress=False)
    same(condensed, bank, problem, damping=1e-6)


def test_few_rows_of_a_large_sketch_are_warned_of(tmp_path, monkeypatch):
    """Source takes them in one block, and blocks are what is kept."""
    monkeypatch.setattr("source_proj.sketch.columns._MOST", 20)
    problem = classification(n=10)
    bank = problem.build(tmp_path / "bank", sp.Sketch(90))
    with pytest.warns(UserWarning, match=r"has more than 20 rows of 90 numbers.*blocks=5"):
        condensed = sp.condense(bank, tmp_path / "condensed", progress=False)
    same(condensed, bank, problem, blocks=5)


def test_no_bank_is_written_into_another(tmp_path):
    """Whose objects it would be taken for."""
    problem = classification()
    bank = problem.build(tmp_path / "bank")
    with pytest.raises(sp.BankError, match="is the bank itself; give another path"):  # and not: remove it
        sp.condense(bank, bank.path, progress=False)
    with pytest.raises(sp.BankError, match=r"within the bank .*; give a path outside of it"):
        sp.condense(bank, tmp_path / "bank" / "inside", progress=False)
    (tmp_path / "link").symlink_to(tmp_path / "bank")
    for outer in ("bank", "link"):
        with pytest.raises(sp.BankError, match=r"within the bank .*; give a path outside of it"):
            problem.build(tmp_path / outer / "inside")
    assert sp.open(tmp_path / "bank").verify().ok


def test_one_that_was_stopped_goes_on(tmp_path, monkeypatch):
    problem = classification()
    bank = problem.build(tmp_path / "bank")
    whole = sp.condense(bank, tmp_path / "whole", progress=False)
    rows = _MeanRows.rows

    def stopped(self, segment, start, stop):
        if segment == 1:
            raise KeyboardInterrupt
        return rows(self, segment, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(_MeanRows, "rows", stopped)
        with pytest.raises(KeyboardInterrupt):
            sp.condense(bank, tmp_path / "stopped", progress=False)
    assert not sp.open(tmp_path / "stopped").finalized
    assert sp.condense(bank, tmp_path / "stopped", progress=False).fingerprint == whole.fingerprint
    with pytest.raises(sp.MismatchError, match="storage"):
        sp.condense(bank, tmp_path / "stopped", storage="float16", progress=False)


def test_a_moved_bank_finds_its_checkpoints(tmp_path):
    """Files that were moved with the bank are named where they lie now."""
    problem = classification(segments=1)
    (tmp_path / "old").mkdir()
    points = []
    for checkpoint in problem.trajectory.stages[0].checkpoints:
        torch.save(checkpoint.load(), tmp_path / "old" / f"{checkpoint.step}.pt")
        points.append(sp.Checkpoint(tmp_path / "old" / f"{checkpoint.step}.pt", checkpoint.step, lr=0.05))
    problem = replace(problem, trajectory=sp.Trajectory(points, sp.SGD(momentum=0.5, weight_decay=1e-2)))
    problem.build(tmp_path / "old" / "bank")
    (tmp_path / "old").rename(tmp_path / "new")
    bank = sp.open(tmp_path / "new" / "bank")
    condensed = sp.condense(bank, tmp_path / "condensed", progress=False)
    assert {c.path.parent.name for c in condensed.query_points()} == {"new"}
    same(condensed, bank, problem)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"device": "gpu"}, ValueError, "'gpu' cannot be used"),
        ({"device": "meta"}, ValueError, "'meta' cannot be used"),
        ({"storage": "int3"}, ValueError, "got 'int3'"),
        ({"segments": 7}, ValueError, "segments=7"),
        ({"curvature": "fisher"}, ValueError, "unknown curvature 'fisher'"),
        ({"executor": 3}, TypeError, "executor"),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_work(tmp_path, options, error, named):
    bank = classification().build(tmp_path / "bank")
    with pytest.raises(error, match=named):
        sp.condense(bank, tmp_path / "condensed", **options)
    for place in ("bank", [bank, bank]):
        with pytest.raises(TypeError, match="bank"):
            sp.condense(place, tmp_path / "condensed")
    other = classification(segments=1).build(tmp_path / "other")
    with pytest.raises(sp.MismatchError, match="begun with other settings"):
        sp.condense(bank, other.path, progress=False)
    assert not (tmp_path / "condensed").exists()


def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    bank = classification().build(tmp_path / "bank")
    monkeypatch.setattr("source_proj.attribution.condense.mean_panels", None)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(sp.BankError, match=r"cannot write the bank .*Permission denied.*make it writable"):
        sp.condense(bank, tmp_path / "new" / "condensed", progress=False)
    assert not (tmp_path / "new").exists()


def test_a_whole_one_is_found_again_where_nothing_can_be_written(tmp_path, monkeypatch):
    bank = classification().build(tmp_path / "bank")
    made = sp.condense(bank, tmp_path / "condensed", progress=False)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert sp.condense(bank, tmp_path / "condensed", progress=False).fingerprint == made.fingerprint


def test_rows_in_several_metrics_have_no_mean(tmp_path):
    bank = adam("per_segment", segments=2).build(tmp_path / "bank")
    with pytest.raises(ValueError, match="are in 2 metrics"):
        sp.condense(bank, tmp_path / "condensed")
    assert not (tmp_path / "condensed").exists()
