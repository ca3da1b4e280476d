"""Options that cannot be meant are refused when a method is made, by their values."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import source

import source_proj as sp
from source_proj.attribution.arguments import checked_number
from source_proj.trajectory import split_segments

NUMBERS = [
    (sp.Source, "time_scale", 0.5, 0),
    (sp.Source, "damping", 0.5, -1),
    (sp.InfluenceFunction, "damping", 0, -1),
    (sp.ArnoldiInfluence, "damping", 1, -1),
    (sp.DataInf, "damping_factor", 0.1, 0),
    (sp.Trak, "ridge", 0, -1),
]


@pytest.mark.parametrize(("method", "name", "good", "bad"), NUMBERS)
def test_numbers_are_checked_when_a_method_is_made(blobs, method, name, good, bad):
    problem, bank = blobs
    for value in (good, np.float32(good), Fraction(good)):
        method(bank, model=problem.model, **{name: value})
    for value in (bad, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"{name} must be .*a number .*, got {value!r}"):
            method(bank, model=problem.model, **{name: value})
    for value in ([1.0], True, b"1"):
        with pytest.raises(TypeError, match=f"{name} must be .*a number .*, got"):
            method(bank, model=problem.model, **{name: value})
    with pytest.raises((TypeError, ValueError), match=f"{name} must be .*a number .*, got '1'"):
        method(bank, model=problem.model, **{name: "1"})


@given(value=st.floats() | st.integers(), above=st.integers(-5, 5))
def test_a_number_is_taken_where_it_lies_within_its_bounds(value, above):
    if math.isfinite(value) and value > above:
        assert checked_number("ridge", value, above=above) == float(value)
    else:
        with pytest.raises(ValueError, match=f"ridge must be a number > {above}, got"):
            checked_number("ridge", value, above=above)


@pytest.mark.parametrize("method", [sp.Source, sp.InfluenceFunction, sp.ArnoldiInfluence, sp.DataInf])
def test_a_curvature_is_checked_when_a_method_is_made(blobs, staged, method):
    problem, bank = blobs
    for value in ("x", "", "features"):
        with pytest.raises(ValueError, match=f"unknown curvature '{value}'; choose one of"):
            method(bank, model=problem.model, curvature=value)
    problem, bank = staged
    with pytest.raises(ValueError, match="this bank has none"):
        method(bank, model=problem.model, curvature="sampled_fisher")


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, np.array])
def test_segments_are_a_number_of_any_kind_that_counts(blobs, staged, kind):
    for problem, bank in (blobs, staged):
        wanted, given = source(problem, bank, segments=2), source(problem, bank, segments=kind(2))
        assert wanted.segments == given.segments
    assert split_segments(5, kind(2)) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("value", [2.0, "2", np.float32(2), [2, 2], object, np.eye(2)])
def test_segments_of_other_kinds_are_refused(blobs, value):
    with pytest.raises(TypeError, match="segments must be a whole number, or lists of checkpoint indices"):
        source(*blobs, segments=value)


@pytest.mark.parametrize("size", [0, -1, 1.5, "64", None, True])
def test_the_size_of_a_batch_is_checked_when_a_method_is_made(blobs, size):
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got"):
        source(*blobs, batch_size=size)


@pytest.mark.parametrize("bad", [b"q", 1j, ("a", b"q"), frozenset("q")])
@pytest.mark.parametrize("ending", [".zarr", ".parquet"])
def test_ids_that_no_file_holds_are_refused_before_anything_is_scored(blobs, tmp_path, monkeypatch, bad, ending):
    problem, bank = blobs
    method = source(problem, bank)
    features = method.sketch(problem.queries, ids=[0, 1, 2, 3, 4, 5, bad])
    assert method.top_k(features, 2).query_ids[6] == bad
    monkeypatch.setattr(sp.Source, "all_terms", lambda *_: pytest.fail("scored"))
    verbs = [lambda: method.top_k(features, 2, out=tmp_path / f"hits{ending}")]
    verbs += [lambda: method.score(features, out=tmp_path / "scores.zarr")] if ending == ".zarr" else []
    for verb in verbs:
        with pytest.raises(TypeError, match="an id in a file is a number, a string, or a tuple of such, got"):
            verb()
    assert not list(tmp_path.iterdir())
