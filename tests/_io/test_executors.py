"""Results come in the order of tasks, whoever does them, whenever they end and however often workers are lost."""

import multiprocessing
import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lossy_executor import LossyExecutor

from source_proj._errors import SourceProjError
from source_proj._io import executors
from source_proj._io.executors import check_executor, map_in_order


def square(number):
    return number * number


def refuse_three(number):
    if number == 3:
        raise KeyError("three")
    return number


class Awkward(Exception):
    """Cannot be made again of its arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def raise_awkward(number):
    raise Awkward("this", "that")


@given(st.lists(st.integers(), max_size=30), st.integers(0, 2**32), st.integers(1, 2**31))
def test_any_order_of_completion_and_lost_workers_change_nothing(tasks, seed, nbytes):
    executor = LossyExecutor(seed)
    assert list(map_in_order(executor, square, tasks, nbytes=nbytes)) == [task**2 for task in tasks]


def test_what_a_task_raises_is_raised_once_and_the_rest_is_cancelled():
    executor = LossyExecutor(0, losses=0)
    results = map_in_order(executor, refuse_three, range(20))
    with pytest.raises(KeyError, match="three") as caught:
        list(results)
    assert executor.done.count(3) == 1
    assert "refuse_three" in "".join(caught.value.__notes__)
    assert all(future.cancelled() or future.done() for future in executor.futures)


def test_an_error_that_cannot_be_sent_is_told():
    with pytest.raises(SourceProjError, match="Awkward: this and that"):
        list(map_in_order(LossyExecutor(0), raise_awkward, [1]))


def test_workers_that_are_always_lost_end_in_a_clear_error():
    executor = LossyExecutor(0, losses=10**6)
    with pytest.raises(SourceProjError, match=r"LossyExecutor.* did not end a task in 4 attempts .*worker lost"):
        list(map_in_order(executor, square, range(5)))
    assert len({name for _, name in executor.attempts if name.rpartition("-")[0].endswith("-0")}) == 4


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_a_pool_that_was_shut_down_is_named(pool):
    executor = pool(1)
    executor.shutdown()
    with pytest.raises(SourceProjError, match=r"was shut down before.*while it is open"):
        list(map_in_order(executor, abs, [1]))


def test_a_pool_of_processes_that_lost_one_ends_in_a_clear_error():
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pool, pytest.raises(SourceProjError, match=r"takes no task \(BrokenProcessPool.* make another one"):
        list(map_in_order(pool, os._exit, [1]))


class Unreadable:
    """Is sent, and refuses where it is read."""

    def __reduce__(self):
        return refuse_three, (3,)


def test_what_a_process_cannot_read_is_raised_and_leaves_the_pool_alive():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(KeyError, match="three"):
            list(map_in_order(pool, Unreadable(), [1]))
        assert list(map_in_order(pool, square, [2])) == [4]


def test_what_cannot_be_sent_to_processes_is_refused_by_its_name():
    with ProcessPoolExecutor(1) as pool, pytest.raises(TypeError, match=r"cannot be sent .*lambda.*ThreadPoolExecutor"):
        list(map_in_order(pool, lambda number: number, [1]))


def test_few_tasks_are_under_way_where_results_are_large(monkeypatch):
    monkeypatch.setattr(executors, "_HELD_BYTES", 100)
    submitted = []

    class Counting:
        def submit(self, fn, /, *args):
            submitted.append(args)
            future = Future()
            future.set_result(fn(*args))
            return future

    results = map_in_order(Counting(), square, range(100), nbytes=25)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(submitted) <= 4 + 2
    results.close()


def threads_here(_):
    return torch.get_num_threads()


def test_workers_use_as_many_threads_as_the_caller():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        with ThreadPoolExecutor(2, initializer=partial(torch.set_num_threads, 1)) as pool:
            assert set(map_in_order(pool, threads_here, range(4))) == {before + 1}
    finally:
        torch.set_num_threads(before)


def test_without_an_executor_all_is_done_here():
    assert set(map_in_order(None, lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}


@pytest.mark.parametrize("given", [4, "dask", ProcessPoolExecutor, object()])
def test_what_is_no_executor_is_refused(given):
    with pytest.raises(TypeError, match=r"shaped like concurrent\.futures\.Executor"):
        check_executor(given)


def test_a_client_is_refused_with_its_own_remedy():
    class Client:
        def get_executor(self): ...

        def submit(self): ...

    with pytest.raises(TypeError, match=r"give its get_executor\(\)"):
        check_executor(Client())


def test_the_lossy_executor_sends_copies():
    sent = []
    list(map_in_order(LossyExecutor(0), partial(_note, sent), [[1]]))
    assert sent == []


def _note(sent, task):
    sent.append(task)
