"""Weights of parameters in a bank: measured by the agreement of checkpoints, given by glob, or left at 1."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bank_runs import make_data, make_run
from language_runs import Language, build, language_run, sentences
from torch import Tensor
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj._errors import BankError, MismatchError
from source_proj.bank.build import build as building
from source_proj.bank.build.agreement import agreement
from source_proj.bank.build.at_work import at_work
from source_proj.bank.read.part import Part
from source_proj.bank.store import LocalStore
from source_proj.gradients import ParameterSpace


@pytest.mark.parametrize(
    ("options", "weighted"),
    [
        ({}, True),
        ({"n": 127}, False),
        ({"checkpoints": 2}, False),
        ({"checkpoints": 2, "parameter_weights": "agreement"}, True),
        ({"n": 20, "parameter_weights": "agreement"}, True),
        ({"parameter_weights": "none"}, False),
        ({"parameter_weights": {}}, False),
        ({"sketch": sp.Sketch(259, "identity")}, False),
        ({"sketch": sp.Sketch(259, "identity"), "parameter_weights": "agreement"}, True),
    ],
)
def test_language_models_are_weighted_by_default_where_enough_is_known(
    options: dict[str, Any], weighted: bool, tmp_path: Path
) -> None:
    bank = build(tmp_path / "bank", **options)
    assert ("weights" in bank.space_spec) == weighted
    assert (set(bank.parameter_weights.values()) != {1.0}) == weighted
    assert ("weighted by how well checkpoints agree" in bank.parameter_choice) == weighted
    assert list(bank.parameter_weights) == list(ParameterSpace.from_model(Language()).names)


def test_other_tasks_are_weighted_where_it_is_asked_for(tmp_path: Path) -> None:
    run = make_run(checkpoints=3, n=200)
    assert set(run.build(tmp_path / "plain").parameter_weights.values()) == {1.0}
    assert set(run.build(tmp_path / "bank", parameter_weights="agreement").parameter_weights.values()) != {1.0}


def exact(bank: sp.Bank, what: Any = "output") -> Tensor:
    return torch.cat([block.rows for block in bank.stages[0].iter_rows(0, what)])


@pytest.mark.parametrize("given", ["agreement", {"table.*": 0.25, "*.bias": 3}])
@pytest.mark.parametrize("what", ["output", "sampled_fisher"])
def test_rows_are_gradients_times_the_weights(given: Any, what: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sketch": sp.Sketch(259, "identity"), "storage": "float32", "sampled_fisher": 1}
    plain = build(tmp_path / "plain", parameter_weights="none", **options)
    bank = build(tmp_path / "bank", parameter_weights=given, **options)
    space = ParameterSpace.from_spec(bank.space_spec)
    by_name = zip(space.names, space.shapes, strict=True)
    factors = torch.cat([torch.full(shape, bank.parameter_weights[name]).flatten() for name, shape in by_name])
    torch.testing.assert_close(exact(bank, what), exact(plain, what) * factors, rtol=1e-5, atol=1e-7)


def test_queries_have_the_weights_of_the_rows(tmp_path: Path) -> None:
    """A weight next to nothing is next to leaving a parameter out; weights of 2 are four times each inner product."""
    ask = sentences(5)
    options: dict[str, Any] = {"sketch": sp.Sketch(1024), "storage": "float32", "parameter_weights": "none"}
    plain, left = build(tmp_path / "plain", **options), build(tmp_path / "left", parameters=["!table.*"], **options)
    small = build(tmp_path / "small", **{**options, "parameter_weights": {"table.*": 1e-5}})
    double = build(tmp_path / "double", **{**options, "parameter_weights": {"*": 2.0}})
    tracin = {
        name: np.asarray(sp.TracIn(bank, model=Language(), progress=False).score(ask))
        for name, bank in {"plain": plain, "double": double}.items()
    }
    np.testing.assert_allclose(tracin["double"], 4 * tracin["plain"], rtol=1e-4)
    exact_left = sp.Sketch(ParameterSpace.from_spec(left.space_spec).size, "identity")
    exact_all = sp.Sketch(ParameterSpace.from_spec(small.space_spec).size, "identity")
    one = build(tmp_path / "one", **{**options, "sketch": exact_left, "parameters": ["!table.*"]})
    two = build(tmp_path / "two", **{**options, "sketch": exact_all, "parameter_weights": {"table.*": 1e-5}})
    scores = [
        np.asarray(sp.Source(bank, model=Language(), damping=0.01, progress=False).score(ask)) for bank in (one, two)
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3, atol=1e-4 * np.abs(scores[0]).max())


def test_reranked_scores_have_the_weights(tmp_path: Path) -> None:
    """Full gradients of all candidates, weighted as the bank is: the scores of an exact bank."""
    data = sentences(130)
    weights = {"table.*": 0.2, "head.*": 1.5}
    options: dict[str, Any] = {"parameter_weights": weights, "sampled_fisher": 0, "storage": "float32"}
    bank = build(tmp_path / "bank", **{**options, "sketch": sp.Sketch(259, "identity")})
    source = sp.Source(bank, model=Language(), progress=False)
    plain = source.top_k(data[:3], 5)
    again = source.top_k(data[:3], 5, rerank=20, train=data)
    np.testing.assert_allclose(again.scores, plain.scores, rtol=1e-3)


class Stopped(Exception):
    pass


def test_a_build_goes_on_with_the_weights_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured once, and another process that measured a little else takes those that are there."""
    whole = build(tmp_path / "whole")

    commit = Part.commit

    def stopping(part: Part, checkpoint: int, shard: int, values: Any) -> None:
        commit(part, checkpoint, shard, values)
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(Part, "commit", stopping)
        with pytest.raises(Stopped):
            build(tmp_path / "bank")

    def unmeasured(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(building, "agreement", unmeasured)
        bank = build(tmp_path / "bank")
    assert bank.fingerprint == whole.fingerprint

    def second(*args: Any) -> tuple[Tensor, Tensor]:
        monkeypatch.undo()
        build(tmp_path / "raced")
        found, sizes = agreement(*args)
        return found * torch.linspace(0.995, 1.0, len(found), dtype=found.dtype), sizes

    monkeypatch.setattr(building, "agreement", second)
    assert build(tmp_path / "raced").fingerprint == whole.fingerprint


def test_a_bank_that_was_begun_on_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it has rows, whose data could be compared, while another process is at work on it."""

    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped

    def other(n: int) -> Any:
        return [{"input_ids": row % 2, "labels": row % 2} for row in (each["input_ids"] for each in sentences(n))]

    with monkeypatch.context() as patched:
        patched.setattr(building, "fill", stopped)
        with pytest.raises(Stopped):
            build(tmp_path / "bank")
    with at_work(LocalStore(tmp_path / "bank")) as process:
        process.share()
        with pytest.raises(MismatchError, match=r"parameters\.weights"):
            sp.build(
                Language(), sp.CausalLM(), language_run(3), other(130), tmp_path / "bank", sketch=sp.Sketch(64),
                progress=False, batch_size=32,
            )  # fmt: skip


def test_a_bank_without_weights_goes_on_without(tmp_path: Path) -> None:
    begun = build(tmp_path / "bank", parameter_weights="none", shard=(0, 2), shard_rows=32)
    assert not begun.finalized
    bank = build(tmp_path / "bank", shard_rows=32)
    assert bank.fingerprint == build(tmp_path / "whole", parameter_weights="none", shard_rows=32).fingerprint


def test_measured_weights_may_be_given(tmp_path: Path) -> None:
    bank = build(tmp_path / "bank")
    weights = bank.parameter_weights
    assert build(tmp_path / "bank", parameter_weights=weights).fingerprint == bank.fingerprint
    # Of fewer parameters too: others are named in vain, but are no slip.
    fewer = build(tmp_path / "fewer", parameters=["!table.*"], parameter_weights=weights)
    assert fewer.parameter_weights == {name: w for name, w in weights.items() if name != "table.weight"}
    ones = build(tmp_path / "ones", parameter_weights={"*": 1})
    assert ones.fingerprint == build(tmp_path / "none", parameter_weights="none").fingerprint


def test_a_tied_parameter_answers_to_each_of_its_names(tmp_path: Path) -> None:
    model = Language()
    model.head.weight = model.table.weight
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), 1, lr=0.1)])
    options: dict[str, Any] = {"sketch": sp.Sketch(16), "progress": False, "parameter_weights": {"head.weight": 0.5}}
    bank = sp.build(model, sp.CausalLM(), run, sentences(4), tmp_path / "bank", **options)
    assert bank.parameter_weights["table.weight"] == 0.5


def test_banks_of_language_models_are_made_by_other_processes(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        by_others = build(tmp_path / "others", executor=pool)
    assert by_others.fingerprint == build(tmp_path / "here").fingerprint
    task = pickle.loads(pickle.dumps(sp.CausalLM(reduction="sum")))
    assert task.spec() == sp.CausalLM(reduction="sum").spec()


def test_a_plan_counts_the_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials measure nothing, whose share of a small build is large."""

    def measured(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(building, "agreement", measured)
    plans = [
        sp.distribute.plan(
            Language(), sp.CausalLM(), language_run(3), sentences(2000), sketch=sp.Sketch(64), batch_size=64,
            progress=False, **options,
        )
        for options in ({}, {"parameter_weights": "none"})
    ]  # fmt: skip
    assert plans[0].passes == plans[1].passes


def test_workers_share_the_weights(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", shard_rows=32)
    for worker in range(3):
        build(tmp_path / "bank", shard_rows=32, shard=(worker, 3))
    bank = sp.bank.open(tmp_path / "bank")
    bank.finalize()
    assert bank.fingerprint == whole.fingerprint


@pytest.mark.parametrize("other", ["none", {"table.*": 0.5}])
def test_another_weighting_is_another_bank(other: Any, tmp_path: Path) -> None:
    build(tmp_path / "bank")
    with pytest.raises(MismatchError, match="weight"):
        build(tmp_path / "bank", parameter_weights=other)


def test_appended_rows_have_the_weights(tmp_path: Path) -> None:
    data = sentences(260)
    options: dict[str, Any] = {"storage": "float32", "sketch": sp.Sketch(64), "progress": False, "batch_size": 26}
    weights = {"table.*": 0.25}
    run = language_run(3)
    long = sp.build(Language(), sp.CausalLM(), run, data, tmp_path / "a", parameter_weights=weights, **options)
    short = sp.build(Language(), sp.CausalLM(), run, data[:130], tmp_path / "b", parameter_weights=weights, **options)
    short.append(Language(), sp.CausalLM(), data[130:], ids=range(130, 260), progress=False)
    torch.testing.assert_close(exact(short), exact(long))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parameter_weights": "agreed"}, ValueError, "'agreement', 'none' or numbers by glob.*got 'agreed'"),
        ({"parameter_weights": 2.0}, ValueError, "got 2.0"),
        ({"parameter_weights": {"nothing.*": 1.0}}, ValueError, "matches none of the parameters"),
        ({"parameter_weights": {"table.*": 0}}, ValueError, "from 1e-06 to 1e[+]06, got 0; to leave them out"),
        ({"parameter_weights": {"*": 1e39}}, ValueError, "got 1e[+]39$"),
        ({"parameter_weights": {"*": 10**400}}, ValueError, "from 1e-06 to 1e[+]06"),
        ({"parameter_weights": {3: 1.0}}, TypeError, "belong to globs on their names, got 3"),
        (
            {"parameter_weights": {"*": 2.0, "table.*": 0.1}},
            ValueError,
            "'table.*' has no effect, as '.*' comes before",
        ),
        ({"autocast": "bf16"}, ValueError, "autocast 'bf16' is unknown; choose one of"),
        ({"autocast": torch.bfloat16, "parameter_weights": "none"}, ValueError, "is unknown; choose one of"),
        ({"parameter_weights": "agreement", "checkpoints": 1}, ValueError, "no stage of the trajectory has two"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path / "bank", **options)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    "weights", [[1.0], "1", [0.0] * 5, [float("nan")] * 5, [-1.0] * 5, [True] * 5, [10**400] * 5, {}]
)
def test_a_bank_of_other_weights_than_numbers_is_refused(weights: Any, tmp_path: Path) -> None:
    build(tmp_path / "bank")
    root = tmp_path / "bank" / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["settings"]["parameters"]["weights"] = weights
    root.write_text(json.dumps(document))
    with pytest.raises(BankError, match="weights"):
        sp.bank.open(tmp_path / "bank")


def test_an_example_that_is_not_finite_is_named_by_the_build(tmp_path: Path) -> None:
    """Not by the measure, which leaves its batch out."""
    data = make_data(200)
    inputs, labels = data.tensors
    inputs[7] = float("nan")
    run = make_run(checkpoints=3, n=200)
    with pytest.raises(sp.GradientError, match=r"\[7\]"):
        replace(run, data=TensorDataset(inputs, labels)).build(tmp_path / "bank", parameter_weights="agreement")
    assert set(sp.bank.open(tmp_path / "bank").parameter_weights.values()) != {1.0}
