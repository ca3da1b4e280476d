"""A large sketch that is taken as several: scores, sizes and errors, against the same formula on each block alone."""

import dataclasses
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from problems import classification

import source_proj as sp
from source_proj.attribution import moments
from source_proj.attribution.curvature import iter_factors
from source_proj.attribution.fits import BlockFits, Fit
from source_proj.attribution.shards import shard_groups
from source_proj.attribution.spectral import decay_operator, response
from source_proj.sketch.columns import blocks_of


def naive(bank, problem, blocks, damping):
    """One segment's scores by eigenvectors of each block's own Ĥ, of rows and queries as they are in the bank."""
    stage, dim = bank.stages[0], bank.sketch.dim
    (cut,) = stage.record.cut(1)
    points = [bank.checkpoint(0, c) for c in range(stage.n_checkpoints)]
    features = sp.Source(bank, model=problem.model, progress=False).sketch(problem.queries)[0]
    query = torch.stack([features.at(point, bank.metrics.hash(0)) for point in points]).mean(0).double()
    rows = [torch.cat([b.rows * b.d1[:, None] for b in stage.iter_rows(c)]) for c in range(stage.n_checkpoints)]
    factors, mean = torch.cat(rows).double(), torch.stack(rows).double().mean(0)
    total = torch.zeros(len(query), len(mean), dtype=torch.float64)
    for start in range(0, dim, dim // blocks):
        own = slice(start, start + dim // blocks)
        part = factors[:, own] * blocks**0.5
        values, vectors = torch.linalg.eigh(part.T @ part / len(part))
        c = response(cut.time, cut.decay, damping)(values.clamp(min=0))
        total -= ((query[:, own] @ vectors) * c) @ vectors.T @ mean[:, own].T / len(mean)
    return total.numpy()


@pytest.mark.parametrize("small", [1024, 4])
@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_scores_are_the_sum_of_what_each_block_says(tmp_path, monkeypatch, small, n, blocks):
    """By spectra, by factors and by Gram matrices; again from what the bank keeps."""
    monkeypatch.setattr(moments, "_SMALL", small)
    problem = classification(n=n)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    options = {"model": problem.model, "progress": False, "segments": 1, "blocks": blocks, "damping": 0.02}
    expected = naive(bank, problem, blocks, 0.02)
    first = sp.Source(bank, **options).score(problem.queries).to_numpy()
    np.testing.assert_allclose(first, expected, rtol=0, atol=2e-4 * abs(expected).max())
    assert (sp.Source(bank, **options).score(problem.queries).to_numpy() == first).all()


def test_damping_by_noise_is_that_of_the_whole_sketch(tmp_path):
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    source, whole = (
        sp.Source(bank, model=problem.model, progress=False, segments=1, blocks=blocks).segments[0] for blocks in (4, 1)
    )
    assert source.trace == pytest.approx(whole.trace)
    assert source.damping == pytest.approx(whole.trace / 40)


@pytest.mark.parametrize("preconditioner", ["scalar", "per_segment"])
@pytest.mark.parametrize("segments", [1, 2])
def test_one_block_is_the_whole_and_many_agree_among_themselves(tmp_path, preconditioner, segments):
    """Verbs that walk the segments by queries and by matrices: scores, parts, self-influence, with metrics between."""
    problem = classification(n=40)
    stages = [dataclasses.replace(stage, preconditioner=preconditioner) for stage in problem.trajectory.stages]
    problem = dataclasses.replace(problem, trajectory=sp.Trajectory.from_stages(stages))
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=24))
    options = {"model": problem.model, "progress": False}
    if preconditioner == "scalar":
        options["segments"] = segments
    whole, one = (sp.Source(bank, **options, **more) for more in ({}, {"blocks": 1}))
    assert (whole.score(problem.queries).to_numpy() == one.score(problem.queries).to_numpy()).all()
    several = sp.Source(bank, blocks=3, **options)
    scores = several.score(problem.queries)
    np.testing.assert_allclose(several.by_segment(problem.queries).total(), scores, rtol=1e-4, atol=1e-7)
    assert several.fidelity(problem.queries).blocks == 3
    assert "of 8 in each of 3 blocks" in repr(several.fidelity(problem.queries))


@pytest.mark.parametrize("blocks", [1, 3])
def test_self_influence_is_the_score_of_an_examples_own_loss(tmp_path, blocks):
    """Minus the score of its loss, which is ℓ' times that of its margin, at weights where both are taken."""
    problem = classification(n=30)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=24), storage="float32")
    source = sp.Source(bank, model=problem.model, progress=False, segments=1, query_gradient="final", blocks=blocks)
    own = np.asarray(source.self_influence())
    last = bank.stages[0].n_checkpoints - 1
    slopes = torch.cat([block.d1 for block in bank.stages[0].iter_rows(last)]).numpy()
    scores = source.score(problem.train).to_numpy().diagonal()
    np.testing.assert_allclose(own, -slopes * scores, rtol=1e-3, atol=1e-3 * abs(own).max())


def test_all_blocks_are_made_in_one_pass_over_the_rows(tmp_path, monkeypatch):
    bank = classification(n=60).build(tmp_path / "bank", sp.Sketch(dim=32))
    passes = []
    made = moments._summed
    monkeypatch.setattr(moments, "_summed", lambda *args: passes.append(1) or made(*args))
    fits = BlockFits(Fit(bank, 0, [0, 1], "empirical_fisher"), 4)
    stage = bank.stages[0]
    (shards,) = shard_groups(stage, [0, 1], 1)
    rows = torch.cat(list(iter_factors(stage, shards, "empirical_fisher", "cpu"))).double()
    for index, columns in enumerate(blocks_of(32, 4)):
        own = rows[:, columns.slice]
        torch.testing.assert_close(fits.matrix(index).double(), 4 * own.T @ own / len(own), rtol=1e-5, atol=1e-7)
    assert len(passes) == 1
    whole = fits.whole()
    assert whole.trace == pytest.approx(float((rows**2).sum()) / len(rows), rel=1e-5)
    query = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    function = decay_operator(1.0, 0.0)
    torch.testing.assert_close(
        whole.multiply(query, function).double(), query.double() @ whole.apply(function), rtol=1e-4, atol=1e-6
    )


def test_blocks_that_cannot_be(tmp_path):
    problem = classification(n=20)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=16))
    for method in (sp.Source, sp.InfluenceFunction):
        with pytest.raises(ValueError, match=r"blocks must lie in 1\.\.16, the sketch's columns, got 17"):
            method(bank, blocks=17)
        with pytest.raises(TypeError, match=r"blocks must be an integer, got 2\.0"):
            method(bank, blocks=2.0)
        with pytest.raises(ValueError, match=r"blocks must lie in 1\.\.16, the sketch's columns, got True"):
            method(bank, blocks=True)
        expected, found = (
            method(bank, model=problem.model, progress=False, blocks=kind(2)).score(problem.queries).to_numpy()
            for kind in (int, np.int64)
        )
        assert (found == expected).all()
    exact = classification(n=20)
    size = sum(parameter.numel() for parameter in exact.model.parameters())
    bank = exact.build(tmp_path / "exact", sp.Sketch(size, "identity"))
    with pytest.raises(ValueError, match="blocks=2 takes a sketch as several, and an exact one has a column a para"):
        sp.Source(bank, blocks=2)


def test_influence_functions_take_the_same_blocks(tmp_path):
    """With infinite time SOURCE of one segment is the averaged influence function."""
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    options = {"model": problem.model, "progress": False, "blocks": 4}
    source = sp.Source(bank, segments=1, time_scale=1e9, **options).score(problem.queries).to_numpy()
    influence = sp.InfluenceFunction(bank, average=True, **options).score(problem.queries).to_numpy()
    np.testing.assert_allclose(influence, source, rtol=0, atol=1e-4 * abs(source).max())


@pytest.mark.parametrize("blocks", [3, 7])
def test_blocks_of_unequal_widths_have_the_trace_of_the_whole(tmp_path, blocks):
    """40 columns are 13, 13 and 14: a mean of what each says of the trace would weigh a column of the last by less."""
    problem = classification(n=60)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    source, whole = (sp.Source(bank, progress=False, blocks=own).segments for own in (blocks, 1))
    assert [each.trace for each in source] == pytest.approx([each.trace for each in whole])
    assert [each.damping for each in source] == pytest.approx([each.damping for each in whole])


@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("small", [10, 4])
@pytest.mark.parametrize("cache", [True, False])
def test_rows_are_read_once_and_nothing_of_them_is_left(tmp_path, monkeypatch, cache, small, n):
    """Of 31 columns in blocks of 10 and 11: fits, fidelity and what a damaged cache makes anew."""
    monkeypatch.setattr(moments, "_SMALL", small)
    reads = []
    for place, made in (("moments._summed", moments._summed), ("fits.factor_rows", moments.factor_rows)):
        counted = lambda *args, made=made, **more: reads.append(1) or made(*args, **more)  # noqa: E731
        monkeypatch.setattr(f"source_proj.attribution.{place}", counted)
    problem = classification(n=n)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=31))
    options = {"model": problem.model, "progress": False, "segments": 1, "blocks": 3, "cache": cache}

    def left(source):
        return [own._made for own in source._of(bank)._fits.values() if own._made]

    source = sp.Source(bank, **options)
    expected = source.score(problem.queries).to_numpy()
    fidelity = source.fidelity(problem.queries).correlation
    assert len(reads) <= 2  # two where blocks go by different routes, or by Gram matrices that are in the bank
    assert not left(source)
    if cache:
        for entry in sorted(bank.fits.folder.glob("*-*"))[::2]:
            shutil.rmtree(entry)
    again = sp.Source(bank, **options)
    assert (again.score(problem.queries).to_numpy() == expected).all()
    assert (again.fidelity(problem.queries).correlation == fidelity).all()
    assert not left(again)


def test_captured_curvature_is_cut_into_the_same_blocks(captured_run):
    model, data, bank = captured_run
    source = sp.Source(bank, model=model, progress=False, blocks=3, damping=0.1)
    features = source.sketch(data)
    query = source._query(bank, features[0], 0).double()
    rows = torch.cat([block.rows for block in bank.stages[0].iter_rows(0)]).double()
    curvature, (segment,) = bank.stages[0].captured_curvature(0)[0].double(), source.segments
    total = torch.zeros(len(query), len(rows), dtype=torch.float64)
    for columns in blocks_of(32, 3):
        own = columns.slice
        values, vectors = torch.linalg.eigh(columns.scale * curvature[own, own])
        c = response(segment.time, segment.decay, 0.1)(values.clamp(min=0))
        total -= ((query[:, own] @ vectors) * c) @ vectors.T @ rows[:, own].T / len(rows)
    np.testing.assert_allclose(source.score(features), total, rtol=0, atol=1e-4 * float(total.abs().max()))
    assert segment.trace == pytest.approx(float(curvature.trace()))


@pytest.fixture
def captured_run(tmp_path):
    return capture(tmp_path / "run")


def capture(folder, stops=(10,)):
    """A model, its training set, and the bank of a run of ten steps, which processes carry on at some stops."""
    inputs, labels = torch.randn(20, 4, generator=torch.manual_seed(0)), torch.arange(20) % 3
    batches = [torch.randperm(20)[:8] for _ in range(10)]
    for stop in stops:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = sp.Recorder(model, optimizer, folder, every=5, capture=sp.Sketch(32), task=sp.Classification())
        for index in batches[recorder.restore() : stop]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[index]), labels[index]).backward()
            optimizer.step()
            recorder.step(ids=index)
        if stop < len(batches):
            recorder.close()
    return model, torch.utils.data.TensorDataset(inputs, labels), recorder.bank(storage="float32")


def test_curvature_of_many_columns_is_captured_in_blocks(tmp_path, monkeypatch):
    """It is that of the same columns of the whole, in a run at a stretch or carried on, and so are scores."""
    model, data, whole = capture(tmp_path / "whole")
    (matrix,) = whole.stages[0].captured_curvature(0)
    expected = {count: sp.Source(whole, model=model, progress=False, blocks=count).score(data) for count in (3, 6)}
    monkeypatch.setattr("source_proj.sketch.columns._MOST", 11)
    for name, stops in (("blocks", (10,)), ("carried_on", (7, 10))):
        _, _, bank = capture(tmp_path / name, stops)
        blocks = bank.stages[0].captured_blocks
        assert [columns.width for columns in blocks] == [10, 11, 11]
        for columns, own in zip(blocks, bank.stages[0].captured_curvature(0), strict=True):
            torch.testing.assert_close(own, matrix[columns.slice, columns.slice])
        for count, scores in expected.items():
            given = None if count == 3 else count
            found = sp.Source(bank, model=model, progress=False, blocks=given).score(data).to_numpy()
            np.testing.assert_allclose(found, scores.to_numpy(), rtol=0, atol=1e-5 * np.abs(found).max())
        for method in (sp.Source, partial(sp.InfluenceFunction, average=True)):
            with pytest.raises(ValueError, match=r"kept in 3 blocks .* a multiple of 3, got 4"):
                method(bank, model=model, blocks=4)
    with pytest.raises(sp.BankError, match=r"1024 numbers, and that of 3 blocks of 32 columns has 342.*another"):
        whole.stages[0].captured_curvature(0)


def test_the_banks_of_an_ensemble_have_blocks_of_their_own(tmp_path, monkeypatch):
    """A sketch beside an exact one of as many numbers, whose columns are never cut."""
    monkeypatch.setattr("source_proj.sketch.columns._MOST", 20)
    problem = classification(n=20)
    banks = [problem.build(tmp_path / kind, sp.Sketch(problem.size, kind)) for kind in ("tensor", "identity")]
    for method in (sp.Source, sp.InfluenceFunction):
        options = {"model": problem.model, "progress": False, "query_gradient": "final"}
        both = method(banks, **options).score(problem.queries).to_numpy()
        alone = [method(bank, **options).score(problem.queries).to_numpy() for bank in banks]
        np.testing.assert_allclose(both, np.mean(alone, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "count"), [(6, 1), (60, 2)])
def test_few_rows_are_fitted_by_one_gram_matrix_and_many_in_blocks(tmp_path, monkeypatch, n, count):
    """Unless somebody says how many blocks; to each method by its own rows."""
    monkeypatch.setattr("source_proj.sketch.columns._MOST", 20)
    problem = classification(n=n, segments=1)
    bank = problem.build(tmp_path / "bank", sp.Sketch(dim=40))
    for method, options in ((sp.Source, {}), (sp.InfluenceFunction, {"average": True})):
        by_default, asked = (
            method(bank, model=problem.model, progress=False, **options, **more).score(problem.queries).to_numpy()
            for more in ({}, {"blocks": count})
        )
        assert (by_default == asked).all()
    assert sp.Source(bank, model=problem.model, progress=False).fidelity(problem.queries).blocks == count
