"""What is committed stays: stragglers, repeated appends, exchanged shards."""

import contextlib
import errno
import itertools
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bank_runs import BATCH, SHARD, N, assert_same, content, make_adam_run, make_data, make_run, rows

from source_proj import bank as banks
from source_proj._errors import BankError, MismatchError
from source_proj._io import files
from source_proj.bank.build import append as appending
from source_proj.bank.read.part import Part
from source_proj.bank.store import LocalStore

MARK = "committed/c.0.0.0"


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def built(run, tmp_path_factory):
    torch.set_num_threads(1)
    return run.build(tmp_path_factory.mktemp("built") / "bank").path


def arrays_of(part, checkpoint, shard, seed=0):
    """What another machine might have computed for a shard, of the same data."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, spec in part.data(checkpoint).items():
        shape = (spec.span(shard).stop - spec.span(shard).start, *spec.shape[1:])
        values = draw.integers(-127, 128, shape) if spec.dtype == "int8" else draw.random(shape)
        found[name] = values.astype(spec.dtype)
    return {**found, "batch_hashes": part.read(checkpoint, "batch_hashes", shard)}


# Stragglers ------------------------------------------------------------------------------------------------------


def test_a_straggler_leaves_a_sealed_bank_alone(built, tmp_path):
    path = shutil.copytree(built, tmp_path / "bank")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    part = banks.open(path).parts[0]
    for checkpoint, shard in itertools.product(range(2), range(4)):
        part.commit(checkpoint, shard, arrays_of(part, checkpoint, shard))
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_straggler_with_other_data_is_refused(built, tmp_path):
    part = banks.open(shutil.copytree(built, tmp_path / "bank")).parts[0]
    other = {**arrays_of(part, 0, 0), "batch_hashes": np.zeros((3, 32), np.uint8)}
    with pytest.raises(MismatchError, match="the data of stage 'train' differ in 3 of 3 batches of shard 0"):
        part.commit(0, 0, other)


OPERATIONS = ["put", "put_if_absent", "copy", "delete"]


def dying(monkeypatch, number):
    """Let the n-th change of a store stop its caller before it is made; counts them."""
    count = itertools.count()

    def stopping(real):
        def call(self, *args):
            if next(count) == number:
                raise Stopped
            return real(self, *args)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(LocalStore, name, stopping(getattr(LocalStore, name)))
    return count


@pytest.mark.parametrize("number", range(9))
def test_two_commits_never_mix_wherever_the_first_one_stops(run, built, tmp_path, monkeypatch, number):
    whole = banks.open(built).parts[0]
    run.build(tmp_path / "bank", shard=(7, 8))  # the last shard of the last checkpoint alone
    part = Part(LocalStore(tmp_path / "bank"), 0, 0, banks.open(built).settings)
    sides = [{n: whole.read(0, n, 0) for n in whole.data(0)}, arrays_of(whole, 0, 0)]
    with monkeypatch.context() as patched:
        dying(patched, number)
        with contextlib.suppress(Stopped):
            part.commit(0, 0, sides[1])
    part.commit(0, 0, sides[0])
    read = {n: part.read(0, n, 0) for n in part.data(0)}
    (origin,) = [i for i, side in enumerate(sides) if all(np.array_equal(read[n], side[n]) for n in read)]
    assert origin == (0 if number < 2 else 1)  # whoever was chosen first
    run.build(tmp_path / "bank")
    report = banks.verify(tmp_path / "bank")
    assert report.ok
    assert not report.leftovers


def test_a_mark_is_written_when_its_shard_is_on_the_disk(tmp_path, monkeypatch):
    log = []
    sync_path, link, replace = files._sync_path, files.os.link, Path.replace
    monkeypatch.setattr(files, "_sync_path", lambda path: (sync_path(path), log.append(("sync", Path(path)))))
    monkeypatch.setattr(files.os, "link", lambda a, b: (link(a, b), log.append(("name", Path(b), Path(a)))))
    monkeypatch.setattr(Path, "replace", lambda a, b: (replace(a, b), log.append(("name", Path(b), a))))
    bank = make_run(checkpoints=1, n=10).build(tmp_path / "bank")
    part = bank.parts[0]
    (marked,) = (i for i, event in enumerate(log) if event[:2] == ("name", bank.path / part.key(0, "committed", 0)))
    for name in part.data(0):
        file = bank.path / part.key(0, name, 0)
        named = max(i for i, event in enumerate(log) if event[:2] == ("name", file))
        assert named < marked
        assert ("sync", file.parent) in log[named:marked]
        staged = log[named][2]
        while not any(event == ("sync", staged) for event in log[:named]):  # where its bytes were flushed
            (staged,) = {event[2] for event in log[:named] if event[:2] == ("name", staged)}


# Append ----------------------------------------------------------------------------------------------------------


def append(path, run, data, **changes):
    options = {"batch_size": BATCH, "shard_rows": SHARD, "progress": False, **changes}
    bank = banks.open(path)
    bank.append(run.model, run.task, data, **options)
    return bank


def test_the_same_append_again_does_nothing(run, built, tmp_path):
    path = shutil.copytree(built, tmp_path / "bank")
    fingerprint = append(path, run, make_data(30, seed=1)).fingerprint
    before = content(path)
    again = append(path, run, make_data(30, seed=1))
    assert again.n_rows == N + 30
    assert again.fingerprint == fingerprint
    assert content(path).keys() == before.keys()
    for index, worker in enumerate([(0, 2), (1, 2)]):  # nor do workers that come late
        assert append(path, run, make_data(30, seed=1), shard=worker).n_rows == N + 30, index


@pytest.mark.parametrize("kind", ["counted", "integers", "strings"])
def test_a_script_of_several_appends_can_be_run_again(run, built, tmp_path, kind):
    path = shutil.copytree(built, tmp_path / "bank")
    chunks = [make_data(n, seed=seed) for n, seed in ((30, 1), (30, 2), (7, 3))]

    def script():
        added = []
        for number, data in enumerate(chunks):
            names = range(1000 * (number + 1), 1000 * (number + 1) + len(data))
            ids = {"counted": None, "integers": names, "strings": (f"name {name}" for name in names)}[kind]
            options = {"batch_size": BATCH, "shard_rows": SHARD, "progress": False, "ids": ids}
            added.append(banks.open(path).append(run.model, run.task, data, **options))
        return added

    assert script() == [30, 30, 7]
    fingerprint = banks.open(path).fingerprint
    assert script() == [0, 0, 0]
    assert banks.open(path).fingerprint == fingerprint


def test_a_script_that_stopped_in_its_second_append_can_be_run_again(run, built, tmp_path):
    path = shutil.copytree(built, tmp_path / "bank")
    first, second = make_data(30, seed=1), make_data(30, seed=2)
    append(path, run, first)
    assert not append(path, run, second, shard=(0, 2)).finalized
    assert append(path, run, first).n_rows == N + 60  # neither taken for the second one's data, nor added again
    bank = append(path, run, second)
    assert bank.finalized
    assert bank.n_rows == N + 60
    whole = shutil.copytree(built, tmp_path / "whole")
    append(whole, run, first)
    append(whole, run, second)
    assert_same(path, whole)


def test_a_line_says_that_nothing_was_appended(run, built, tmp_path, capsys):
    path = shutil.copytree(built, tmp_path / "bank")
    append(path, run, make_data(5, seed=1), progress=True)
    assert "nothing appended" not in capsys.readouterr().err
    append(path, run, make_data(5, seed=1), progress=True)
    assert "part_1 already; give ids of their own" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["first", "last", "fewer", "batches"])
def test_other_examples_are_appended_as_others(run, built, tmp_path, change):
    path = shutil.copytree(built, tmp_path / "bank")
    append(path, run, make_data(30, seed=1))
    data, options = make_data(30, seed=1), {}
    if change in ("first", "last"):
        data.tensors[0][0 if change == "first" else -1] += 1
    elif change == "fewer":
        data = torch.utils.data.TensorDataset(*(part[:29] for part in data.tensors))
    else:
        options = {"batch_size": 12}
    assert append(path, run, data, **options).n_rows == N + 30 + len(data)


def test_ids_of_their_own_append_the_same_examples_twice(run, built, tmp_path):
    path = shutil.copytree(built, tmp_path / "bank")
    append(path, run, make_data(30, seed=1))
    bank = append(path, run, make_data(30, seed=1), ids=range(1000, 1030))
    assert bank.n_rows == N + 60
    assert torch.equal(rows(bank, 0)[N : N + 30], rows(bank, 0)[N + 30 :])


@pytest.mark.parametrize("given", ["the same number", "fewer", "own ids"])
@pytest.mark.parametrize("moment", ["before", "while"])
def test_who_comes_second_is_told_that_another_appends(run, built, tmp_path, monkeypatch, given, moment):
    """The other one begins before this append looks, or after it looked and before it writes."""
    path = shutil.copytree(built, tmp_path / "bank")
    ids = [f"name {place}" for place in range(30)] if given == "own ids" else None
    mine, named = make_data(29 if given == "fewer" else 30, seed=2), appending.part_objects

    def late(*arguments):
        monkeypatch.undo()
        append(path, run, make_data(30, seed=1), shard=(0, 2))
        return named(*arguments)

    if moment == "before":
        append(path, run, make_data(30, seed=1), shard=(0, 2))
    else:
        monkeypatch.setattr(appending, "part_objects", late)
    with pytest.raises(MismatchError, match=r"begun by another append.*wait until it is done and append again"):
        append(path, run, mine, ids=ids)
    append(path, run, make_data(30, seed=1))
    assert append(path, run, mine, ids=ids).n_rows == N + 30 + len(mine)


# Exchanged shards ------------------------------------------------------------------------------------------------


def shards(path):
    return sorted(f for f in path.rglob("c.*") if "checkpoint_" in str(f) and "committed" not in str(f))


def read_all(bank):
    for stage in bank.stages:
        for checkpoint in range(stage.n_checkpoints):
            metrics = bank.settings.trajectory.crossed_metrics(0, checkpoint)
            list(stage.iter_encoded(checkpoint))
            for metric in (None, *metrics):
                list(stage.iter_rows(checkpoint, metric=metric))


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    torch.set_num_threads(1)
    return make_adam_run().build(tmp_path_factory.mktemp("crossed") / "bank").path


def test_every_shard_of_another_place_is_refused_by_name(crossed, tmp_path):
    path = shutil.copytree(crossed, tmp_path / "bank")
    of_size = {}
    for file in shards(path):
        of_size.setdefault((file.parent.name.split("_metric")[0], file.stat().st_size), []).append(file)
    unread = ("batch_hashes", "audit")
    swaps = [pair for group in of_size.values() for pair in itertools.pairwise(group)]
    swaps = [(a, b) for a, b in swaps if a.read_bytes() != b.read_bytes() and a.parent.name not in unread]
    assert len(swaps) > 20
    for a, b in swaps:
        kept = a.read_bytes(), b.read_bytes()
        a.write_bytes(kept[1])
        b.write_bytes(kept[0])
        with pytest.raises(BankError, match="not what was committed as shard") as caught:
            read_all(banks.open(path))
        assert str(a) in str(caught.value) or str(b) in str(caught.value)
        a.write_bytes(kept[0])
        b.write_bytes(kept[1])
    read_all(banks.open(path))


def test_what_is_exchanged_under_an_open_bank_is_refused_too(built, tmp_path):
    path = shutil.copytree(built, tmp_path / "bank")
    bank = banks.open(path)
    read_all(bank)
    a, b = (path / f"stage_0/part_0/checkpoint_{c}/rows/c.1.0" for c in range(2))
    kept = a.read_bytes()
    shutil.copy(b, a)
    with pytest.raises(BankError, match=r"checkpoint_0/rows/c\.1\.0 is whole, but not what was committed"):
        read_all(bank)
    a.write_bytes(kept)
    read_all(bank)


def test_a_shard_is_compared_once_while_it_stays(built, monkeypatch):
    from source_proj.bank.read import part as module

    count, real = [], module.content_digest
    monkeypatch.setattr(module, "content_digest", lambda values: (count.append(1), real(values))[1])
    bank = banks.open(built)
    read_all(bank)
    first = len(count)
    assert first == 2 * 4 * 4  # rows, scale, d1 and d2 of four shards at two checkpoints
    read_all(bank)
    assert len(count) == first


# Places that cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "make it writable"),
        (errno.EIO, "mend that"),
    ],
)
def test_whoever_cannot_write_is_told_what_helps(run, built, tmp_path, monkeypatch, number, remedy):
    folder = shutil.copytree(built, tmp_path / "bank")
    bank, refused = banks.open(folder), OSError(number, os.strerror(number))

    def failing(*_):
        raise refused

    monkeypatch.setattr(LocalStore, "put_if_absent", failing)
    monkeypatch.setattr(LocalStore, "put", failing)
    told = rf"{re.escape(str(refused))}.*{remedy}"
    with pytest.raises(BankError, match=rf"cannot append .*{told}.*, then append again"):
        bank.append(run.model, run.task, make_data(5, seed=1), progress=False)
    with pytest.raises(BankError, match=rf"cannot write .*{told}.*, or give another path"):
        run.build(tmp_path / "new")
