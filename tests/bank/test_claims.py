"""Claims: shards of workers that died or fell silent go to others, and the bits stay those of one worker."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from bank_runs import assert_same, make_run

from source_proj import bank as banks
from source_proj._errors import BankError
from source_proj.bank.build import claims as module
from source_proj.bank.build.claims import Claims, heartbeats
from source_proj.bank.build.row_encoder import RowEncoder
from source_proj.bank.store import LocalStore

LONG = 1000.0


class Died(BaseException):
    pass


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    torch.set_num_threads(1)
    return run.build(tmp_path_factory.mktemp("whole") / "bank").path


@pytest.fixture
def begun(run, tmp_path):
    """A bank without rows."""
    return run.build(tmp_path / "bank", shard=(8, 9))


def claims_of(bank, takeover=LONG):
    """Another process's claims: it sees none of this one's numbers."""
    return Claims(bank.store, takeover, (0, 1))


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until it is told to pass."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_alone_and_together_the_bits_are_the_same(run, whole, tmp_path):
    assert_same(run.build(tmp_path / "alone", takeover=LONG).path, whole)
    workers = [
        threading.Thread(target=lambda i=i: run.build(tmp_path / "three", shard=(i, 3), takeover=LONG))
        for i in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert banks.open(tmp_path / "three").finalized
    assert_same(tmp_path / "three", whole)
    assert not banks.verify(tmp_path / "three").leftovers


def test_one_of_many_makes_all_if_the_others_never_come(run, whole, tmp_path):
    assert_same(run.build(tmp_path / "bank", shard=(2, 5), takeover=LONG).path, whole)


def test_every_shard_is_made_once(run, tmp_path, monkeypatch):
    made, real = [], RowEncoder.begin

    def begin(self, *place):
        made.append(place)
        time.sleep(0.01)
        real(self, *place)

    monkeypatch.setattr(RowEncoder, "begin", begin)
    workers = [threading.Thread(target=lambda: run.build(tmp_path / "bank", takeover=LONG)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(made) == [(0, checkpoint, shard) for checkpoint in range(2) for shard in range(4)]


def test_a_claimed_shard_is_left_to_its_owner_until_it_is_silent(begun, clock):
    part = begun.parts[0]
    with claims_of(begun) as first, claims_of(begun) as second:
        assert list(first.take(part, 0, [1, 2])) == [1, 2]
        assert list(second.take(part, 0, [0, 1, 2, 3])) == [0, 3]
        clock(LONG - 1)
        assert list(second.take(part, 0, [1])) == []
        first.beat(8)  # a sign of life, late
        clock(2)
        assert list(second.take(part, 0, [1])) == []
        clock(LONG + 1)
        assert list(second.take(part, 0, [1])) == [1]
        with claims_of(begun) as third:  # it looks for the first time, and has seen nobody silent
            assert list(third.take(part, 0, [0, 1, 2, 3])) == []


def test_of_many_who_take_over_one_is_first(begun, clock):
    part = begun.parts[0]
    with claims_of(begun) as silent:
        assert list(silent.take(part, 0, [1])) == [1]
        others = [claims_of(begun) for _ in range(6)]
        for other in others:
            other.__enter__()
            assert list(other.take(part, 0, [1])) == []
        clock(LONG + 1)
        barrier, taken = threading.Barrier(len(others)), []

        def take(other):
            other.beat(0)
            barrier.wait()
            taken.extend(other.take(part, 0, [1]))

        threads = [threading.Thread(target=take, args=(other,)) for other in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert taken == [1]


def test_who_ends_gives_its_claims_back(begun):
    part = begun.parts[0]
    with claims_of(begun) as first:
        assert list(first.take(part, 0, [1])) == [1]
    with claims_of(begun) as second:
        assert list(second.take(part, 0, [1])) == [1]


def test_a_process_that_is_gone_is_not_waited_for(begun):
    part = begun.parts[0]
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with claims_of(begun) as first, claims_of(begun) as second:
        assert list(first.take(part, 0, [1])) == [1]
        owner = begun.store.get(f"claims/{part.name}/checkpoint_0/1/0.partial").decode()
        key = f"claims/workers/{owner}.partial"
        content = json.loads(begun.store.get(key))
        begun.store.put({key: json.dumps({**content, "pid": child.pid}).encode()})
        ended = os.path.exists("/proc/self/ns/pid")  # elsewhere it falls silent
        assert list(second.take(part, 0, [1])) == ([1] if ended else [])
        begun.store.put({key: json.dumps({**content, "pid": child.pid, "machine": "another"}).encode()})
        with claims_of(begun) as third:
            assert list(third.take(part, 0, [1])) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"nobody"])
def test_claims_and_heartbeats_of_strangers_are_void(begun, content):
    part = begun.parts[0]
    claim = f"claims/{part.name}/checkpoint_0/1/0.partial"
    for objects in ({claim: content}, {claim: b"stranger", "claims/workers/stranger.partial": content}):
        begun.store.put(objects)
        with claims_of(begun) as claims:
            assert list(claims.take(part, 0, [1])) == [1]
        assert heartbeats(begun.store) == []
        for key in begun.store.leftovers("claims"):
            begun.store.delete(key)


def test_a_committed_shard_is_not_claimed_and_leaves_no_claim(run, whole, tmp_path):
    bank = banks.open(shutil.copytree(whole, tmp_path / "bank"))
    with claims_of(bank) as claims:
        assert list(claims.take(bank.parts[0], 0, range(4))) == []
    assert list(bank.store.leftovers()) == []


@pytest.mark.parametrize("number", [1, 4, 7])
def test_a_worker_that_fails_leaves_the_rest_to_others(run, whole, tmp_path, monkeypatch, number):
    count, real = [0], RowEncoder.__call__

    def failing(self, place, batch):
        count[0] += 1
        if count[0] == number:
            raise Died
        return real(self, place, batch)

    with monkeypatch.context() as patched:
        patched.setattr(RowEncoder, "__call__", failing)
        with pytest.raises(Died):
            run.build(tmp_path / "bank", takeover=LONG)
    assert heartbeats(LocalStore(tmp_path / "bank")) == []
    assert_same(run.build(tmp_path / "bank", shard=(1, 2), takeover=LONG).path, whole)


def test_a_full_disk_is_named(begun, monkeypatch):
    with claims_of(begun) as claims:

        def full(self, contents):
            raise OSError("No space left on device")

        monkeypatch.setattr(LocalStore, "put_if_absent", full)
        with pytest.raises(BankError, match=r"cannot claim shards of the bank .*No space left"):
            list(claims.take(begun.parts[0], 0, [1]))


def test_folders_that_a_killed_worker_left_empty_are_removed(run, whole, tmp_path):
    """Plain zarr would warn of them; one that holds something stays."""
    bank = run.build(tmp_path / "bank")
    (tmp_path / "bank" / "claims" / "stage_0" / "part_0" / "3").mkdir(parents=True)
    bank.finalize()
    assert not (tmp_path / "bank" / "claims").exists()
    assert_same(tmp_path / "bank", whole)
    kept = tmp_path / "bank" / "claims" / "stage_0" / "note"
    (kept.parent / "empty").mkdir(parents=True)
    kept.write_text("a stranger's")
    bank.finalize()
    assert [path.name for path in (tmp_path / "bank" / "claims").rglob("*")] == ["stage_0", "note"]


@pytest.mark.parametrize("takeover", [0, -1, float("inf"), float("nan"), True, "300"])
def test_a_takeover_that_is_no_time_is_refused(run, tmp_path, takeover):
    with pytest.raises(ValueError, match="takeover must be a positive number of seconds"):
        run.build(tmp_path / "bank", takeover=takeover)
    assert not (tmp_path / "bank").exists()
