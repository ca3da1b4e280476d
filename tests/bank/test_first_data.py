"""Wrong data, given once by mistake or by another process at the same time, never get into a part of other data."""

import shutil
import uuid

import pytest
import torch
from bank_runs import BATCH, SHARD, N, assert_same, make_data, make_run
from torch.utils.data import TensorDataset

from source_proj import bank as banks
from source_proj._errors import GradientError, MismatchError
from source_proj.bank.build import fill as filling
from source_proj.bank.build.first_data import FirstData
from source_proj.bank.read.part import Part

ROWS = 4 * BATCH


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def run():
    return make_run(checkpoints=3)


@pytest.fixture(scope="module")
def built(run, tmp_path_factory):
    torch.set_num_threads(1)
    return run.build(tmp_path_factory.mktemp("built") / "bank").path


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    if request.param == "folder":
        return tmp_path / "bank"
    pytest.importorskip("obstore")
    return f"memory://{uuid.uuid4().hex}"


def stopped(monkeypatch, commits, call):
    """Make a call that stops when it has committed so many shards."""
    commit, left = Part.commit, [None] * commits

    def stopping(*arguments):
        if not left:
            raise Stopped
        left.pop()
        commit(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Part, "commit", stopping)
        with pytest.raises(Stopped):
            call()


def append(path, run, seed, **changes):
    data = make_data(ROWS, seed=seed)
    return banks.open(path).append(
        run.model, run.task, data, **{"batch_size": BATCH, "shard_rows": BATCH, "progress": False, **changes}
    )


def committed(path, part):
    return [shards for c in range(3) for shards in banks.open(path).parts[part].committed(c)]


def changed(*rows):
    x, y = make_data().tensors
    x[list(rows)] += 1
    return TensorDataset(x, y)


WRONG = [make_data(seed=9), changed(0), changed(SHARD, N - 1)]  # everywhere, in the first batch, in two of later shards


@pytest.mark.parametrize("wrong", range(len(WRONG)))
def test_one_call_with_wrong_data_leaves_a_begun_bank_to_the_right_ones(run, built, place, monkeypatch, wrong):
    stopped(monkeypatch, 2, lambda: run.build(place))
    with pytest.raises(MismatchError, match=r"now, .* at that of step 10\. .*same order"):
        run.build(place, data=WRONG[wrong])
    assert committed(place, 0) == [0, 1]
    assert run.build(place).finalized
    assert banks.open(place).verify().ok
    if not isinstance(place, str):
        assert_same(place, built)


def test_a_worker_that_has_no_shard_yet_compares_those_of_others(run, place):
    run.build(place, shard=(0, 4))
    before = committed(place, 0)
    with pytest.raises(MismatchError, match="same order"):
        run.build(place, shard=(1, 4), data=make_data(seed=9))
    assert committed(place, 0) == before


def test_one_append_of_wrong_data_leaves_a_begun_one_to_its_own(run, place, monkeypatch):
    run.build(place)
    stopped(monkeypatch, 2, lambda: append(place, run, 1))
    with pytest.raises(MismatchError, match=r"begun by another append.*give its own examples first"):
        append(place, run, 2)
    assert append(place, run, 1) == ROWS
    assert append(place, run, 2) == ROWS
    assert banks.open(place).verify().ok


@pytest.mark.parametrize("moment", ["before its first shard", "before it says what it has", "behind its last shard"])
def test_of_two_appends_at_once_each_is_whole_or_refused(run, place, monkeypatch, moment):
    run.build(place)
    say, commit, told = FirstData.say, Part.commit, []

    def other():
        monkeypatch.undo()
        if moment == "before its first shard":
            with pytest.raises(MismatchError, match=r"begun by another append.*wait until it is done"):
                append(place, run, 2)
        else:
            told.append(append(place, run, 2, shard=None if moment.startswith("behind") else (0, 2)))

    def late_say(*arguments):
        other()
        say(*arguments)

    def late_commit(*arguments):
        other()
        commit(*arguments)

    if moment == "before its first shard":
        monkeypatch.setattr(Part, "commit", late_commit)
        assert append(place, run, 1) == ROWS
    else:
        monkeypatch.setattr(FirstData, "say", late_say)
        with pytest.raises(MismatchError, match=r"begun by another append.*wait until it is done"):
            append(place, run, 1)
    for seed in (2, 1):
        append(place, run, seed)
    bank = banks.open(place)
    assert bank.n_rows == N + 2 * ROWS
    assert bank.verify().ok
    assert not bank.verify().leftovers


@pytest.mark.parametrize("committing", [False, True])
def test_what_was_said_of_the_data_gives_way_to_a_shard(run, place, committing):
    """Whoever says it after the first shard was committed sees that shard."""
    run.build(place)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FirstData, "take_back", lambda *_: None)  # as if killed
        patched.setattr(Part, "commit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            append(place, run, 1)
    store = banks.open(place).store
    (said,) = store.leftovers("stage_0/part_1/ids")
    if committing:
        append(place, run, 1, shard=(0, 2))
        assert not store.leftovers("stage_0/part_1/ids")
    elif store.folder is None:  # where nobody can tell who is at work
        with pytest.raises(MismatchError, match="begun by another append"):
            append(place, run, 2)
        store.delete(said)
    assert append(place, run, 1 if committing else 2) == ROWS
    assert not banks.open(place).verify().leftovers


def test_a_call_that_failed_leaves_its_bucket_to_corrected_data(run):
    pytest.importorskip("obstore")
    place = f"memory://{uuid.uuid4().hex}"
    x, y = make_data().tensors
    x[0] = torch.nan
    with pytest.raises(GradientError):
        run.build(place, data=TensorDataset(x, y))
    assert run.build(place).finalized


def test_a_part_that_no_data_fit_is_removed_as_the_error_says(run, built, tmp_path, monkeypatch):
    path = shutil.copytree(built, tmp_path / "bank")
    stopped(monkeypatch, 2, lambda: append(path, run, 1))
    with monkeypatch.context() as patched:
        patched.setattr(filling, "_check_committed", lambda *_: None)
        with pytest.raises(MismatchError):
            append(path, run, 2)
    part = path / "stage_0/part_1"
    for seed in (1, 2):
        with pytest.raises(MismatchError, match=f"remove {part} and append again"):
            append(path, run, seed)
    shutil.rmtree(part)
    assert append(path, run, 2) == ROWS
    assert banks.open(path).verify().ok


OWN = range(900, 900 + ROWS)
NO_REPETITIONS = [
    (None, {"shard_rows": 2 * BATCH}, "was begun with shard_rows 8, got 16"),
    (OWN, {"shard_rows": 2 * BATCH}, "was begun with shard_rows 8, got 16"),
    (OWN, {"batch_size": BATCH // 2}, "was begun with batch_size 8, got 4"),
    (OWN, {"seed": 2}, "the data of stage 'train' differ in 1 of 1 batches of shard 0"),
]


@pytest.mark.parametrize(("given", "changes", "named"), NO_REPETITIONS)
def test_what_is_no_repetition_of_a_finished_append_is_named(run, place, given, changes, named):
    run.build(place)
    append(place, run, 1, ids=given)
    first, last = (900, 899 + ROWS) if given else (N, N + ROWS - 1)
    with pytest.raises(
        MismatchError, match=f"ids {first} to {last} are in stage 'train'.*no repetition.*{named}"
    ) as it:
        append(place, run, **{"seed": 1, "ids": given, **changes})
    assert "give new ids" in str(it.value)
    assert "killed" not in str(it.value)
    assert append(place, run, **{"seed": 1, **changes, "ids": range(500, 500 + ROWS)}) == ROWS
