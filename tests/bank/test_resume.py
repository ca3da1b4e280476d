"""Builds that stop and go on, and what they refuse to go on with."""

import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from bank_runs import BATCH, SHARD, SKETCH, N, assert_same, content, make_data, make_run, make_states, rows
from torch.utils.data import TensorDataset

from source_proj import bank as banks
from source_proj._errors import BankError, GradientError, MismatchError
from source_proj.bank.read.part import Part
from source_proj.sketch import Sketch
from source_proj.task import Classification, Regression
from source_proj.trajectory import SGD, Checkpoint, Trajectory


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def built(run, tmp_path_factory):
    torch.set_num_threads(1)
    return run.build(tmp_path_factory.mktemp("built") / "bank")


@pytest.mark.parametrize("shards", range(0, 9, 2))
def test_a_build_goes_on_from_its_last_whole_shard(run, built, tmp_path, monkeypatch, shards):
    commit, count = Part.commit, []

    def stopping(self, checkpoint, shard, values):
        if len(count) == shards:
            raise Stopped
        count.append((checkpoint, shard))
        commit(self, checkpoint, shard, values)

    with monkeypatch.context() as patched:
        patched.setattr(Part, "commit", stopping)
        if shards < 8:
            with pytest.raises(Stopped):
                run.build(tmp_path / "bank")
        else:
            run.build(tmp_path / "bank")
    first = list(count)
    assert len(first) == shards

    def counting(self, checkpoint, shard, values):
        count.append((checkpoint, shard))
        commit(self, checkpoint, shard, values)

    monkeypatch.setattr(Part, "commit", counting)
    run.build(tmp_path / "bank")
    assert sorted(count) == [(checkpoint, shard) for checkpoint in range(2) for shard in range(4)]  # each once
    assert_same(tmp_path / "bank", built.path)


def test_a_finished_bank_is_left_alone(run, tmp_path):
    path = run.build(tmp_path / "bank").path
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert run.build(path).finalized
    banks.open(path).finalize()
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def other_trajectory(**changes):
    states = make_states(2)
    options = {"optimizer": SGD(), "segments": 1, **changes}
    return Trajectory([Checkpoint(state, 10 * (i + 1), lr=0.1) for i, state in enumerate(states)], **options)


OTHER = [
    ({"sketch": Sketch(dim=33, seed=5)}, r"sketch\.dim is 32 there and 33 here"),
    ({"sketch": replace(SKETCH, seed=6)}, r"sketch\.seed is 5 there and 6 here"),
    ({"sketch": replace(SKETCH, kind="sparse")}, r"sketch\.kind is 'tensor' there and 'sparse' here"),
    ({"sketch": replace(SKETCH, kind="rademacher")}, r"sketch\.kind is 'tensor' there and 'rademacher' here"),
    ({"storage": "float16"}, "storage is 'int8' there and 'float16' here"),
    ({"gradients": "general"}, "gradients is 'auto' there and 'general' here"),
    ({"autocast": "bfloat16"}, "autocast is None there and 'bfloat16' here"),
    ({"sampled_fisher": 1}, "sampled_fisher is 0 there and 1 here"),
    ({"task": Classification(label_smoothing=0.1)}, r"task\.label_smoothing is 0\.0 there and 0\.1 here"),
    ({"parameters": ["2.*"]}, r"parameters\.names is \['0\.weight', .* there and \['2\.weight', '2\.bias'\] here"),
    ({"trajectory": other_trajectory(optimizer=SGD(momentum=0.5))}, r"momentum is 0\.0 there and 0\.5 here"),
    ({"trajectory": other_trajectory(segments=2)}, r"segments is \[\[0, 1\]\] there and \[\[0\], \[1\]\] here"),
    ({"trajectory": other_trajectory(start_step=5)}, r"start_step is 0 there and 5 here"),
    ({"batch_size": 12}, "batch_size 8, got 12"),
    ({"shard_rows": 32}, "shard_rows 24, got 32"),
    ({"data": make_data(N - 1), "shard_rows": SHARD}, "with 90 examples, got 89"),
    ({"ids": [*range(N - 1), 7000]}, "id 89 at row 89, got 7000"),
    ({"ids": [str(i) for i in range(N)]}, "id_type 'int64', got 'string'"),
]


@pytest.mark.parametrize(
    ("changes", "named"), OTHER, ids=[str(sorted(changes)) + named[:12] for changes, named in OTHER]
)
def test_other_settings_are_refused_with_both_values(run, built, changes, named):
    before = content(built.path)
    with pytest.raises(MismatchError, match=named):
        run.build(built.path, **changes)
    assert content(built.path).keys() == before.keys()


def changed(row):
    x, y = make_data().tensors
    x[row, 2] += 1
    return TensorDataset(x, y)


@pytest.mark.parametrize("row", [0, 41, N - 1])
def test_other_data_are_refused_at_resume_even_of_a_finished_bank(run, built, row):
    first = row // BATCH * BATCH
    with pytest.raises(MismatchError, match=f"ids {first} to {min(N, first + BATCH) - 1}: .*same order"):
        run.build(built.path, data=changed(row))


def test_other_data_are_refused_by_a_worker_of_another_checkpoint(run, tmp_path):
    run.build(tmp_path / "bank", shard=(0, 8))
    with pytest.raises(MismatchError, match=r"at the checkpoint of step 20.*at that of step 10"):
        run.build(tmp_path / "bank", data=changed(3), shard=(4, 8))  # the same shard at the next checkpoint
    assert banks.open(tmp_path / "bank").parts[0].done(1).tolist() == [False] * 4


class Augmented(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data, self.reads = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads += 1
        x, y = self.data[index]
        return x + self.reads, y


def test_random_augmentation_is_noticed(run, tmp_path):
    with pytest.raises(MismatchError, match="random augmentation"):
        run.build(tmp_path / "bank", data=Augmented(make_data()))


def test_resume_false_begins_nothing_over(run, built, tmp_path):
    with pytest.raises(BankError, match="resume=False begins a new bank: remove it"):
        run.build(built.path, resume=False)
    (tmp_path / "empty").mkdir()
    assert run.build(tmp_path / "empty", resume=False).finalized


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_left_alone(run, tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("no bank")
    with pytest.raises(BankError):
        run.build(tmp_path, resume=resume)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"storage": "int3"}, "storage must be one of int1, int2, int4, int8, float16, float32, got 'int3'"),
        ({"sampled_fisher": -1}, "sampled_fisher must be .* got -1"),
        ({"gradients": "magic"}, "'magic' is unknown"),
        ({"sketch": Sketch(dim=3, kind="identity")}, "identity"),
    ],
)
def test_bad_arguments_are_refused(run, tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        run.build(tmp_path / "bank", **changes)


# Leftovers and full disks --------------------------------------------------------------------------------------


def test_temporary_files_of_killed_builds_do_no_harm(run, built, tmp_path):
    path = tmp_path / "bank"
    run.build(path, shard=(0, 2))
    remains = path / "stage_0/part_0/checkpoint_0/rows/c.1.0.0123.partial"
    remains.write_bytes(b"half a shard")
    bank = banks.open(path)
    assert bank.verify().leftovers == [remains]
    assert bank.nbytes()["temporary"] == 12
    run.build(path)
    assert not remains.exists()
    assert_same(path, built.path)


def test_a_shard_without_mark_is_made_anew(run, built, tmp_path):
    path = tmp_path / "bank"
    run.build(path, shard=(0, 2))
    shard = path / "stage_0/part_0/checkpoint_0/rows/c.1.0"
    assert not shard.exists()
    shard.write_bytes(b"a whole file, but never marked")
    run.build(path)
    assert_same(path, built.path)


@contextmanager
def files_limited_to(nbytes):
    """Larger files cannot be written, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize(("limit", "named"), [(100, "cannot write the bank"), (100_000, "cannot write shard 0")])
def test_a_full_disk_leaves_a_bank_to_go_on_with(run, tmp_path, limit, named):
    # Rows of 24 x 2048 float32 fill 196,608 bytes; the metadata of each array a good kilobyte.
    path, options = tmp_path / "bank", {"sketch": Sketch(dim=2048, seed=5), "storage": "float32"}
    with files_limited_to(limit), pytest.raises(BankError, match=named):
        run.build(path, **options)
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.glob(".bank*"))
    run.build(path, **options)
    run.build(tmp_path / "other", **options)
    assert_same(path, tmp_path / "other")


# Append --------------------------------------------------------------------------------------------------------


def joined(one, other):
    return TensorDataset(*(torch.cat(pair) for pair in zip(one.tensors, other.tensors, strict=True)))


def append(bank, run, data, **changes):
    options = {"batch_size": BATCH, "shard_rows": SHARD, "progress": False, **changes}
    bank.append(options.pop("model", run.model), options.pop("task", run.task), data, **options)


def test_appended_rows_follow_the_others(run, tmp_path):
    bank = run.build(tmp_path / "bank", sampled_fisher=2)
    old = bank.fingerprint
    before = {file: file.stat().st_mtime_ns for file in bank.path.rglob("*") if file.is_file()}
    append(bank, run, make_data(30, seed=1))
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert bank.finalized
    assert bank.fingerprint != old
    assert bank.fingerprint == banks.open(bank.path).fingerprint
    assert (bank.n_rows, bank.stages[0].n, bank.ids) == (120, 120, list(range(120)))
    assert bank.verify().ok
    # The same as a bank of all examples: also the sampled labels, though parts are cut elsewhere into batches.
    whole = run.build(
        tmp_path / "whole", data=joined(run.data, make_data(30, seed=1)), batch_size=30, shard_rows=30, sampled_fisher=2
    )
    for what, stop in (("output", 120), ("sampled_fisher", 240)):
        blocks = list(bank.stages[0].iter_rows(1, what))
        assert [block.start for block in blocks] == [0, *(block.stop for block in blocks)][:-1]
        assert blocks[-1].stop == stop
        one, two = rows(bank, 1, what), rows(whole, 1, what)
        assert (one - two).abs().max() <= 2 * 0.51 / 127 * two.abs().max()


def test_an_append_that_stopped_goes_on(run, tmp_path, monkeypatch):
    path = run.build(tmp_path / "bank").path
    whole = banks.open(run.build(tmp_path / "whole").path)
    append(whole, run, make_data(50, seed=1), ids=range(1000, 1050))
    bank = banks.open(path)
    with monkeypatch.context() as patched:
        commit = Part.commit

        def stopping(self, checkpoint, shard, values):
            if (checkpoint, shard) == (1, 1):
                raise Stopped
            commit(self, checkpoint, shard, values)

        patched.setattr(Part, "commit", stopping)
        with pytest.raises(Stopped):
            append(bank, run, make_data(50, seed=1), ids=range(1000, 1050))
    with pytest.raises(BankError, match=r"shard 1 \(rows 114 to 137\)"):
        banks.open(path).require_finalized()
    assert not bank.finalized
    for changes, named in [
        ({"ids": range(2000, 2050)}, "id 1000 at row 0, got 2000"),
        ({"data": make_data(49, seed=1)}, "begun with 50 examples, got 49"),
        ({"data": make_data(50, seed=2)}, "differ in"),
        ({"batch_size": 12}, "batch_size 8, got 12"),
    ]:
        options = {"ids": range(1000, 1000 + len(changes.get("data", range(50)))), **changes}
        data = options.pop("data", make_data(50, seed=1))
        with pytest.raises(MismatchError, match=named):
            append(bank, run, data, **options)
    append(bank, run, make_data(50, seed=1))  # the ids are known
    assert_same(path, whole.path)
    append(bank, run, make_data(50, seed=1), ids=range(1000, 1050))  # done already
    assert bank.n_rows == 140
    run.build(path)  # the first part is still what it was
    assert banks.open(path).n_rows == 140


def test_workers_append_together(run, tmp_path):
    path = run.build(tmp_path / "bank").path
    whole = run.build(tmp_path / "whole")
    append(whole, run, make_data(50, seed=1))
    workers = [banks.open(path) for _ in range(3)]
    for index, worker in enumerate(workers):
        append(worker, run, make_data(50, seed=1), shard=(index, 3))
        assert not worker.finalized
    workers[0].finalize()
    assert_same(path, whole.path)


def test_append_takes_only_what_fits_the_bank(run, tmp_path):
    unfinished = run.build(tmp_path / "unfinished", shard=(0, 2))
    with pytest.raises(BankError, match="finish it before rows are appended"):
        append(unfinished, run, make_data(5))
    bank = run.build(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"ids \[3\] are in stage 'train' already"):
        append(bank, run, make_data(2), ids=[3, 1000])
    with pytest.raises(MismatchError, match="built with task"):
        append(bank, run, make_data(2), task=Regression())
    for stage in (1, -2, 1.0, None, True):
        with pytest.raises(ValueError, match=rf"stage must be one of the bank's stages \['train'\].* got {stage}"):
            append(bank, run, make_data(2), stage=stage)
    names = run.build(tmp_path / "names", ids=[str(i) for i in range(N)])
    with pytest.raises(ValueError, match="give ids for the new examples"):
        append(names, run, make_data(2))
    append(names, run, make_data(2), ids=["new", "newer"])
    assert names.ids[-2:] == ["new", "newer"]


def test_an_append_that_has_no_room_or_is_unfinished_says_to_append_again(run, tmp_path):
    bank = run.build(tmp_path / "bank", sketch=Sketch(dim=2048, seed=5), storage="float32")
    append(bank, run, make_data(60, seed=1), shard=(0, 2))
    with pytest.raises(BankError, match=r"lacks shard 1 .*: append again, then finalize"):
        bank.finalize()
    with files_limited_to(100_000), pytest.raises(BankError, match=r"cannot write shard .* and append again to go on"):
        append(bank, run, make_data(60, seed=1))
    append(bank, run, make_data(60, seed=1))
    assert bank.n_rows == N + 60


def test_an_append_whose_gradient_is_not_finite_can_be_taken_up(run, tmp_path):
    bank = run.build(tmp_path / "bank")
    data = make_data(3, seed=1)
    data.tensors[0][1] = torch.nan
    with pytest.raises(GradientError, match=r"ids \[91\]"):
        append(bank, run, data)
    assert not bank.finalized
    append(bank, run, make_data(3, seed=1))
    assert bank.n_rows == 93


@pytest.mark.parametrize(("there", "given"), [([str(i) for i in range(N)], [1, 200]), (None, ["a", "1"])])
def test_appended_ids_are_written_as_no_other(run, tmp_path, there, given):
    """1 and "1" would be one name in a table, whatever kind the bank's ids are."""
    bank = run.build(tmp_path / "bank", ids=there)
    with pytest.raises(ValueError, match=r"ids \['1'\] are written as those of others"):
        append(bank, run, make_data(2, seed=1), ids=given)
