"""What a build puts into the bank, against the engine itself."""

import warnings
from dataclasses import replace

import pytest
import torch
import zarr
from bank_runs import BATCH, SHARD, SKETCH, N, assert_same, content, make_data, make_run, make_states, rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from source_proj import bank as banks
from source_proj._errors import BankError, MismatchError
from source_proj.bank.build.uniform import Uniforms
from source_proj.bank.codecs import codec_names, find_codec
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.sketch import Sketch
from source_proj.task import Classification, Regression
from source_proj.trajectory import Checkpoint, Stage, Trajectory

INT8_ERROR = 0.51 / 127  # of the largest entry


def direct(run, checkpoint, stage=0, data=None):
    """Rows, ℓ' and ℓ'' of all examples, batch by batch, without a bank."""
    model = run.model
    space = ParameterSpace.from_model(model)
    found = []
    with run.trajectory.stages[stage].checkpoints[checkpoint].applied_to(model):
        engine = gradient_engine(model, space, SKETCH)
        for batch in DataLoader(data or run.data, batch_size=BATCH):
            values, sketched = engine.sketch(run.task.output, batch)
            found.append((sketched, *run.task.loss_derivatives(values, batch)))
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def built(run, tmp_path_factory):
    torch.set_num_threads(1)
    return run.build(tmp_path_factory.mktemp("built") / "bank")


@pytest.mark.parametrize("storage", codec_names())
def test_rows_are_the_sketched_gradients(run, tmp_path, storage):
    bank = run.build(tmp_path / "bank", storage=storage)
    assert bank.finalized
    assert bank.storage == storage
    for checkpoint in range(2):
        expected, d1, d2 = direct(run, checkpoint)
        blocks = list(bank.stages[0].iter_rows(checkpoint))
        assert [(b.start, b.stop) for b in blocks] == [(0, 24), (24, 48), (48, 72), (72, 90)]
        codec = find_codec(storage)
        assert torch.equal(rows(bank, checkpoint), codec.decode(*codec.encode(expected), expected.shape[1]))
        assert torch.equal(torch.cat([b.d1 for b in blocks]), d1)
        assert torch.equal(torch.cat([b.d2 for b in blocks]), d2)


def test_plain_zarr_shows_it_all_without_warnings(built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open_group(built.path, mode="r")
        names = [name for name, _ in root.members(max_depth=None)]
        values = root["stage_0/part_0/checkpoint_1/rows"][:]
        scale = root["stage_0/part_0/checkpoint_1/scale"][:]
    assert "stage_0/part_0/ids" in names
    assert torch.equal(torch.from_numpy(values * scale[:, None]), rows(built, 1))


def test_what_the_bank_says_of_itself(run, built):
    assert built.n_rows == N
    assert built.ids == list(range(N))
    assert built.sketch == SKETCH
    assert built.task_spec == run.task.spec()
    assert built.trajectory == run.trajectory.resolve(run.model, ParameterSpace.from_model(run.model)).record
    assert ParameterSpace.from_spec(built.space_spec) == ParameterSpace.from_model(run.model)
    stage = built.stages[0]
    assert (stage.name, stage.n, stage.n_checkpoints, stage.draws) == ("train", N, 2, 0)
    assert stage.record == run.trajectory.stages[0].describe()
    assert "torch" in built.versions
    assert built.missing() == []


def test_the_model_comes_back_unchanged(run, tmp_path):
    run.model.train()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.build(tmp_path / "bank")
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    assert run.model.training


def test_counts_of_bytes_are_those_on_disk(built):
    total = sum(file.stat().st_size for file in built.path.rglob("*") if file.is_file())
    assert sum(built.nbytes().values()) == total
    assert built.nbytes()["derivatives"] >= 2 * 2 * 4 * N
    assert built.nbytes()["fits"] == built.nbytes()["temporary"] == 0


@pytest.mark.parametrize(("dim", "n"), [(512, 300), (1024, 1000)])
def test_int8_takes_at_most_a_tenth_more_than_a_byte_a_number(tmp_path, dim, n):
    run = make_run(checkpoints=1, n=n)
    bank = run.build(tmp_path / "bank", sketch=Sketch(dim=dim), batch_size=64, shard_rows=None)
    assert sum(bank.nbytes().values()) - bank.nbytes()["weights"] <= 1.1 * n * dim


# Splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3, 20])
def test_workers_make_the_same_bank(run, built, tmp_path, workers):
    path = tmp_path / "bank"
    for index in reversed(range(workers)):
        part = run.build(path, shard=(index, workers))
        assert not part.finalized
    bank = banks.open(path)
    bank.finalize()
    assert bank.finalized
    assert_same(path, built.path)


def test_finalize_names_what_is_missing(run, tmp_path):
    bank = run.build(tmp_path / "bank", shard=(1, 3))
    for refused in (
        bank.finalize,
        bank.require_finalized,
        lambda: bank.stages[0].iter_rows(0),
        lambda: bank.fingerprint,
    ):
        with pytest.raises(BankError, match=r"shard 0 \(rows 0 to 23\) of stage 'train' at the checkpoint of step 10"):
            refused()
    with pytest.raises(BankError) as caught:
        bank.finalize()
    assert "rows 24 to 47" not in str(caught.value).split("step 10")[0]
    run.build(tmp_path / "bank", shard=(0, 3))
    run.build(tmp_path / "bank", shard=(2, 3))
    with pytest.raises(BankError, match="not finalized: call its finalize"):
        bank.require_finalized()
    bank.finalize()
    assert bank.finalized


@pytest.mark.parametrize("shard_rows", [7, 0, 8.0])
def test_shards_hold_whole_batches(run, tmp_path, shard_rows):
    with pytest.raises(ValueError, match=f"shard_rows must be .* got {shard_rows}"):
        run.build(tmp_path / "bank", shard_rows=shard_rows)


def test_shard_size_changes_no_row(run, built, tmp_path):
    bank = run.build(tmp_path / "bank", shard_rows=None)
    assert len(list(bank.stages[0].iter_rows(0))) == 1
    assert torch.equal(rows(bank, 1), rows(built, 1))


# Data ----------------------------------------------------------------------------------------------------------


class Dicts(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return {"input": x, "labels": y}


@pytest.mark.parametrize(
    "wrap",
    [lambda data: DataLoader(data, batch_size=BATCH), lambda data: [data[i] for i in range(len(data))], Dicts],
    ids=["loader", "list", "dicts"],
)
def test_every_kind_of_data_gives_the_same_rows(run, built, tmp_path, wrap):
    bank = run.build(tmp_path / "bank", data=wrap(run.data), batch_size=BATCH)
    assert torch.equal(rows(bank, 0), rows(built, 0))


def test_ids_may_be_strings(run, tmp_path):
    names = [f"é{i}" for i in range(N)]
    bank = run.build(tmp_path / "bank", ids=names)
    assert bank.ids == names
    assert bank.stages[0].ids == names
    assert banks.open(bank.path).fingerprint != run.build(tmp_path / "other").fingerprint


def test_a_single_example(tmp_path):
    bank = make_run(checkpoints=1, n=1).build(tmp_path / "bank")
    assert bank.ids == [0]
    assert rows(bank, 0).shape == (1, SKETCH.dim)
    assert bank.verify().ok


def two_stages():
    first, second = make_states(2), make_states(1, seed=1)
    return Trajectory.from_stages(
        [
            Stage("before", [Checkpoint(s, 10 * (i + 1), lr=0.1) for i, s in enumerate(first)]),
            Stage("after", [Checkpoint(second[0], 5, lr=0.1)]),
        ]
    )


def test_stages_have_their_own_data(run, tmp_path):
    data = {"before": make_data(30), "after": make_data(13, seed=1)}
    trajectory = two_stages()
    bank = run.build(tmp_path / "bank", trajectory=trajectory, data=data, ids={"before": None, "after": range(5, 18)})
    assert [(s.name, s.n, s.n_checkpoints) for s in bank.stages] == [("before", 30, 2), ("after", 13, 1)]
    assert bank.ids[:2] == [("before", 0), ("before", 1)]
    assert bank.ids[30] == ("after", 5)
    run.trajectory, kept = trajectory, run.trajectory
    expected, _, _ = direct(run, 0, stage=1, data=data["after"])
    run.trajectory = kept
    assert (rows(bank, 0, stage=1) - expected).abs().max() <= INT8_ERROR * expected.abs().max()
    assert bank.final_checkpoint().hash() == trajectory.final.hash()
    for index in range(2):
        run.build(tmp_path / "split", trajectory=trajectory, data=data, ids={"before": None, "after": range(5, 18)}, shard=(index, 2))  # fmt: skip  # noqa: E501
    banks.open(tmp_path / "split").finalize()
    assert_same(tmp_path / "split", bank.path)


def test_data_of_stages_go_by_name(run, tmp_path):
    with pytest.raises(TypeError, match="give train_set as"):
        run.build(tmp_path / "bank", trajectory=two_stages())
    with pytest.raises(ValueError, match=r"train_set has entries \['before'\]"):
        run.build(tmp_path / "bank", trajectory=two_stages(), data={"before": run.data})


# Tasks ---------------------------------------------------------------------------------------------------------


def constant(output, batch):
    return -torch.ones_like(output), None


def test_a_task_without_second_derivative(run, tmp_path):
    bank = run.build(tmp_path / "bank", task=Classification(label_smoothing=0.1))
    block = next(bank.stages[0].iter_rows(0))
    assert block.d2 is None
    assert block.d1.tolist() == [-1.0] * SHARD
    assert "stage_0/part_0/checkpoint_0/d2" not in content(bank.path)
    assert bank.verify().ok


def test_regression(tmp_path):
    torch.manual_seed(0)
    run = make_run(checkpoints=1)
    model = nn.Linear(6, 1)
    data = TensorDataset(torch.randn(20, 6), torch.randn(20))
    bank = run.build(
        tmp_path / "bank",
        model=model,
        task=Regression(),
        data=data,
        trajectory=Trajectory([Checkpoint(model.state_dict(), 1, lr=0.1)]),
        sketch=Sketch(dim=7, kind="identity"),
        storage="float32",
    )
    block = torch.cat([b.rows for b in bank.stages[0].iter_rows(0)])
    assert torch.equal(block, torch.cat([data.tensors[0], torch.ones(20, 1)], dim=1))


@pytest.mark.parametrize("gradients", ["hooks", "general"])
def test_sampled_rows_are_gradients_of_sampled_labels(run, tmp_path, gradients):
    bank = run.build(tmp_path / "bank", sampled_fisher=2, storage="float32", gradients=gradients)
    assert bank.stages[0].draws == 2
    blocks = list(bank.stages[0].iter_rows(1, "sampled_fisher"))
    assert [(b.start, b.stop) for b in blocks] == [(0, 48), (48, 96), (96, 144), (144, 180)]
    assert all(b.d2 is None and (b.d1 == -1).all() for b in blocks)
    found = torch.cat([b.rows for b in blocks]).unflatten(0, (N, 2))
    space = ParameterSpace.from_model(run.model)
    positions = torch.arange(N)
    with run.trajectory.stages[0].checkpoints[1].applied_to(run.model):
        engine = gradient_engine(run.model, space, SKETCH, method="hooks")
        for draw in range(2):
            uniform = Uniforms(positions, seed=SKETCH.seed, stage=0, checkpoint=1, draw=draw)
            _, expected = engine.sketch(  # all examples at once: the labels do not depend on the batch
                lambda model, batch, uniform=uniform: run.task.sampled_output(
                    model, batch, lambda n: uniform_of(uniform, batch, run.data, n)
                ),
                run.data.tensors,
            )
            torch.testing.assert_close(found[:, draw], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[:, 0], found[:, 1])


def uniform_of(uniform, batch, data, n):
    """The engine proves its path on two examples first: take the numbers of those it shows."""
    uniform._calls = 0
    where = [int((data.tensors[0] == x).all(dim=1).nonzero()[0]) for x in batch[0]]
    return uniform(n)[where]


def test_sampled_rows_do_not_depend_on_the_split(run, tmp_path):
    whole = run.build(tmp_path / "whole", sampled_fisher=2)
    for index in range(2):
        run.build(tmp_path / "split", sampled_fisher=2, shard=(index, 2))
    banks.open(tmp_path / "split").finalize()
    assert_same(tmp_path / "split", whole.path)
    one, two = (
        rows(run.build(tmp_path / name, sampled_fisher=2, storage="float32", **batches), 0, "sampled_fisher")
        for name, batches in [("exact", {}), ("batches", {"batch_size": 30, "shard_rows": 30})]
    )
    torch.testing.assert_close(one, two)  # the same labels


@pytest.mark.parametrize("storage", codec_names())
def test_sampled_rows_are_stored_as_the_format_says(run, tmp_path, storage):
    exact = run.build(tmp_path / "exact", sampled_fisher=2, storage="float32")
    stored = run.build(tmp_path / "stored", sampled_fisher=2, storage=storage)
    codec = find_codec("int4" if storage == "int8" else storage)
    expected = rows(exact, 1, "sampled_fisher")
    assert torch.equal(rows(stored, 1, "sampled_fisher"), codec.decode(*codec.encode(expected), expected.shape[1]))
    (part,) = stored.stages[0].parts
    shard = part.read(1, "fisher_rows", 0)
    assert shard.nbytes == len(shard) * codec.row_bytes(expected.shape[1])


@pytest.mark.parametrize(("dim", "storage"), [(4096, "int8"), (4097, "int4"), (8193, "int2")])
def test_larger_sketches_have_fewer_bits_a_number(run, tmp_path, dim, storage):
    """Of a model that has more numbers than that; else most of a row are zeros, which int8 packs."""
    assert run.build(tmp_path / "small", sketch=Sketch(dim, seed=5)).storage == "int8"
    wide = nn.Sequential(nn.Linear(6, 1000), nn.ReLU(), nn.Linear(1000, 3))
    states = [{name: value * scale for name, value in wide.state_dict().items()} for scale in (1, 2)]
    run = replace(run, model=wide, trajectory=Trajectory([Checkpoint(s, i + 1, lr=0.1) for i, s in enumerate(states)]))
    bank = run.build(tmp_path / "bank", sketch=Sketch(dim, seed=5))
    assert bank.storage == storage
    assert_same(bank.path, run.build(tmp_path / "named", sketch=Sketch(dim, seed=5), storage=storage).path)
    assert rows(bank, 0).shape == (90, dim)


def test_without_sampled_rows_there_are_none_to_read(built):
    with pytest.raises(ValueError, match="sampled_fisher=1"):
        built.stages[0].iter_rows(0, "sampled_fisher")
    with pytest.raises(ValueError, match="got 'gradients'"):
        built.stages[0].iter_rows(0, "gradients")
    with pytest.raises(IndexError, match="2 checkpoints, got index 2"):
        built.stages[0].iter_rows(2)


# Checkpoints ---------------------------------------------------------------------------------------------------


def test_checkpoints_given_as_dicts_are_in_the_bank(run, built):
    for index, checkpoint in enumerate(run.trajectory.stages[0].checkpoints):
        found = built.checkpoint(0, index)
        assert found.hash() == checkpoint.hash()
        assert found.step == checkpoint.step
        assert all(torch.equal(value, checkpoint.load()[name]) for name, value in found.load().items())
    assert built.final_checkpoint().hash() == run.trajectory.final.hash()
    assert built.checkpoint().hash() == run.trajectory.final.hash()


def test_averaged_parameters_keep_the_true_final_weights(run, tmp_path):
    averaged = run.trajectory.average_parameters()
    bank = run.build(tmp_path / "bank", trajectory=averaged)
    assert bank.final_checkpoint().hash() == run.trajectory.final.hash()
    assert bank.checkpoint(0, 0).hash() == averaged.stages[0].checkpoints[0].hash()


def file_trajectory(folder):
    folder.mkdir()
    for index, state in enumerate(make_states(2)):
        torch.save(state, folder / f"{index}.pt")
    return Trajectory([Checkpoint(folder / f"{index}.pt", 10 * (index + 1), lr=0.1) for index in range(2)])


def test_checkpoint_files_are_referred_to(run, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    trajectory = file_trajectory(home / "run")
    bank = run.build(home / "bank", trajectory=trajectory)
    assert bank.nbytes()["weights"] == 0
    assert bank.final_checkpoint().path == home / "run" / "1.pt"
    home.rename(tmp_path / "moved")  # together, they find each other
    moved = banks.open(tmp_path / "moved" / "bank")
    assert moved.final_checkpoint().hash() == bank.trajectory.final.hash
    torch.save(make_states(1, seed=9)[0], tmp_path / "moved" / "run" / "1.pt")
    with pytest.raises(MismatchError, match="step 20 changed"):
        moved.final_checkpoint()
    (tmp_path / "moved" / "run" / "1.pt").unlink()
    with pytest.raises(MismatchError, match="no file is there"):
        banks.open(moved.path).final_checkpoint()


def test_parameters_are_chosen_by_glob(run, tmp_path):
    bank = run.build(tmp_path / "bank", parameters=["2.*"])
    assert bank.space_spec["names"] == ["2.weight", "2.bias"]
    assert (rows(bank, 0) != 0).sum(dim=1).max() <= 33  # 30 weights and 3 biases, each in one column
