"""Stages that were captured one after the other make one bank, as the checkpoints of both would."""

import numpy as np
import pytest
import torch
from captured_runs import Twin, batches_of, data_for, example_gradients, loss_of, mlp, rows_of, size_of, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import source_proj as sp


def trained(folder, model, name, n, *, lr=0.05, steps=6, **options):
    """A stage of its own, with its own examples and optimizer; the recorder is closed, as the next one's needs."""
    recorder = train(folder / name, model, n=n, steps=steps, lr=lr, stage=name, examples=n, **options)
    recorder.close()
    return recorder


def rows(bank, stage, segment=0):
    return torch.cat([block.rows for block in bank.stages[stage].iter_rows(segment)])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mlp()


@settings(max_examples=8, deadline=None)
@given(sizes=st.tuples(st.integers(4, 14), st.integers(4, 14)), cut=st.booleans(), seed=st.integers(0, 99))
def test_each_stage_has_the_sums_of_its_own_steps(tmp_path_factory, sizes, cut, seed):
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(seed)
    model, twins, recorders = mlp(), [], []
    for name, n in zip(("first", "second"), sizes, strict=True):
        twins.append([Twin(n, size_of(model)) for _ in range(1 + cut)])
        taken = iter(range(6))

        def before_step(index, inputs, labels, rate, own=twins[-1], taken=taken):
            own[int(cut and next(taken) >= 2)].add(index, example_gradients(model, inputs, labels), rate)

        ends = {"segment_ends": [2]} if cut else {}
        recorders.append(trained(folder, model, name, n, before_step=before_step, **ends))
    ids = [f"other {place}" for place in range(sizes[0])]
    bank = recorders[1].bank(after=[recorders[0].captured(ids=ids)], storage="float32")
    assert [(stage.name, stage.n) for stage in bank.stages] == [("first", sizes[0]), ("second", sizes[1])]
    assert list(bank.stages[0].ids) == ids
    for stage, own in enumerate(twins):
        for segment, twin in enumerate(own):
            for found, expected in (
                (rows(bank, stage, segment), twin.bank_rows()),
                (bank.stages[stage].captured_curvature(segment)[0], twin.bank_curvature()),
            ):
                assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert bank.verify().ok


def test_frozen_weights_give_the_scores_of_the_bank_that_is_built_of_both_stages(tmp_path, model):
    """One epoch each at learning rates that move nothing: propagators, queries and the order of stages are the same."""
    sets, recorders, stages = {}, [], []
    for name, n in (("first", 12), ("second", 8)):
        sets[name] = TensorDataset(*data_for(model, n))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
        sketch = sp.Sketch(size_of(model), "identity")
        recorder = sp.Recorder(
            model, optimizer, tmp_path / name, stage=name, capture=sketch, task=sp.Classification()
        )  # fmt: skip
        for index in batches_of(n, 4, n // 4):
            optimizer.zero_grad()
            loss_of(model, *sets[name][index]).backward()
            optimizer.step()
            recorder.step(ids=index)
        stages.append(recorder.stage())
        recorder.close()
        recorders.append(recorder)
    captured = recorders[1].bank(after=[recorders[0].captured()], storage="float32")
    built = sp.build(
        model, sp.Classification(), sp.Trajectory.from_stages(stages), sets, tmp_path / "built", storage="float32",
        sketch=sketch, parameters=["*"], progress=False,
    )  # fmt: skip
    queries = TensorDataset(*data_for(model, 5, seed=1))
    own, other = (
        sp.Source(bank, model=model, curvature="empirical_fisher", time_scale=1e10, progress=False)
        for bank in (captured, built)
    )
    first, second = own.score(queries).to_numpy(), other.score(queries).to_numpy()
    assert first.shape == (5, 20)
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-5 * np.abs(second).max())


def test_a_bank_of_two_stages_goes_on_where_it_was(tmp_path, model):
    """Both Recorders made anew from their folders, as after a kill between training and the bank, say the same."""
    first = trained(tmp_path, model, "first", 12)
    second = trained(tmp_path, model, "second", 8)
    expected = second.bank(tmp_path / "one", after=[first.captured()])
    for _ in range(2):  # the second time it is there
        parts = []
        for name, n in (("first", 12), ("second", 8)):
            recorder = trained(tmp_path, model, name, n)  # restores its end, and takes no step
            parts.append(recorder)
        found = parts[1].bank(tmp_path / "again", after=[parts[0].captured()])
        for stage in range(2):
            assert torch.equal(rows(found, stage), rows(expected, stage))
            curvature = [bank.stages[stage].captured_curvature(0)[0] for bank in (found, expected)]
            assert torch.equal(*curvature)
        assert found.settings == expected.settings


def test_stages_that_were_captured_otherwise_are_refused_by_name(tmp_path, model):
    first = trained(tmp_path, model, "first", 12)
    other = trained(tmp_path, model, "other", 8, capture=sp.Sketch(16))
    part = trained(tmp_path, model, "part", 8, parameters=["0.*"])
    named = trained(tmp_path / "again", model, "first", 8)
    for later, message in (
        (other, "the sketch of stage 'first'"),
        (part, r"the parameters of stage 'first' .* differ by \['2.weight', '2.bias'\]: where stages train other"),
        (named, "first"),
    ):
        with pytest.raises(ValueError, match=message):
            later.bank(tmp_path / "bank", after=[first.captured()])
        assert not (tmp_path / "bank").exists() or not (tmp_path / "bank" / "zarr.json").exists()


def test_of_two_stages_a_step_counts_in_its_own(tmp_path, model):
    """The second optimizer's steps are none of the first Recorder's, which is closed."""
    first = trained(tmp_path, model, "first", 12)
    before = first.captured()
    inputs, labels = data_for(model, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in batches_of(8, 4, 4):
        optimizer.zero_grad()
        loss_of(model, inputs[index], labels[index]).backward()
        optimizer.step()
    after = first.captured()
    assert torch.equal(before.contents[0]["rows"], after.contents[0]["rows"])
    assert rows_of(first.bank()).shape == (12, size_of(model))
