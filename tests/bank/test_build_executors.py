"""A build on executors: the bits of one process, whoever makes a share and whenever, and however often it is lost."""

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from bank_runs import N, assert_same, make_run
from lossy_executor import LossyExecutor
from preloaded import preloaded

from source_proj import bank as banks
from source_proj._errors import BankError, GradientError, SourceProjError


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Of one process."""
    return make_run().build(tmp_path_factory.mktemp("alone") / "bank").path


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Of one process, with rows for the sampled Fisher matrix."""
    return make_run().build(tmp_path_factory.mktemp("sampled") / "bank", sampled_fisher=1).path


@pytest.fixture(scope="module")
def elsewhere():
    """A pool of one process that works in another directory."""
    with ProcessPoolExecutor(1, preloaded(), initializer=os.chdir, initargs=("/",)) as pool:
        yield pool


@pytest.mark.parametrize("seed", range(4))
def test_any_order_and_lost_workers_change_no_bit(sampled, tmp_path, seed):
    executor = LossyExecutor(seed)
    bank = make_run().build(tmp_path / "shared", sampled_fisher=1, executor=executor)
    assert len(executor.done) == bank.stages[0].parts[0].spec.n_shards
    assert_same(sampled, tmp_path / "shared")
    assert banks.verify(tmp_path / "shared").ok


def test_pools_of_threads_and_of_processes(alone, tmp_path):
    run = make_run()
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, preloaded()) as processes:
        for name, executor in [("threads", threads), ("processes", processes)]:
            run.build(tmp_path / name, executor=executor)
            assert_same(alone, tmp_path / name)


def test_ids_may_be_a_generator_whoever_makes_the_rows(tmp_path):
    run = make_run()
    with ThreadPoolExecutor(2) as threads:
        for name, executor in [("alone", None), ("threads", threads)]:
            run.build(tmp_path / name, ids=(f"example {i}" for i in range(N)), executor=executor)
    assert_same(tmp_path / "alone", tmp_path / "threads")


def test_a_build_that_lost_its_workers_goes_on(alone, tmp_path):
    run = make_run()
    with pytest.raises(SourceProjError, match="did not end a task in 4 attempts"):
        run.build(tmp_path / "shared", executor=LossyExecutor(0, losses=4))
    with pytest.raises(BankError):
        next(banks.open(tmp_path / "shared").stages[0].iter_rows(0))
    run.build(tmp_path / "shared")
    assert_same(alone, tmp_path / "shared")


def test_a_relative_path_is_the_callers_wherever_workers_are(alone, elsewhere, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run().build("shared", executor=elsewhere)
    assert_same(alone, tmp_path / "shared")


def test_workers_that_do_not_reach_the_bank_say_so(elsewhere):
    with pytest.raises(BankError, match=r"finds no bank at memory://.*threads only"):
        make_run().build("memory://executors/bank", executor=elsewhere)


def test_what_a_worker_finds_wrong_is_said_as_here(tmp_path):
    run = make_run()
    run.data.tensors[0][7] = float("nan")
    with pytest.raises(GradientError, match=r"\[7\]"):
        run.build(tmp_path / "bank", executor=LossyExecutor(0))


@pytest.mark.parametrize("share", [{"shard": (0, 2)}, {"takeover": 300.0}])
def test_a_share_is_no_whole(tmp_path, share):
    with pytest.raises(ValueError, match="executor= makes the shares of a build itself, got shard="):
        make_run().build(tmp_path / "bank", executor=LossyExecutor(0), **share)
    assert not (tmp_path / "bank").exists()
