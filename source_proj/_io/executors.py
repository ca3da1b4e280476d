"""Work on an executor that the user brings: results in the order of the tasks, whoever does them and whenever."""

import pickle
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from source_proj._errors import SourceProjError

__all__ = ["Executor", "check_executor", "map_in_order"]

_ATTEMPTS = 4  # of a task whose worker is lost
_HELD_BYTES = 1 << 30  # of results that may wait for an earlier one
_IN_FLIGHT = range(2, 257)

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(Protocol):
    """Anything shaped like :class:`concurrent.futures.Executor`.

    A pool of processes or threads, Dask's ``client.get_executor()``, submitit's executor.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Return what has ``result()``, which waits, and ``cancel()``."""


@dataclass(frozen=True)
class _Failed:
    """What a task raised itself: it would again, so that only a task without any outcome is tried anew."""

    error: Exception


def check_executor(executor: Any) -> None:
    """Refuse what takes no tasks.

    Raises:
        TypeError: it is no executor.
    """
    if executor is None:
        return
    if hasattr(executor, "get_executor"):
        raise TypeError(f"executor must be shaped like concurrent.futures.Executor, got {executor!r}: give "
                        "its get_executor()")  # fmt: skip
    if isinstance(executor, type) or not callable(getattr(executor, "submit", None)):
        raise TypeError(
            f"executor must be shaped like concurrent.futures.Executor, such as ProcessPoolExecutor(4) or Dask's "
            f"client.get_executor(), got {executor!r}"
        )


def map_in_order(
    executor: Executor | None, function: Callable[[Task], Result], tasks: Iterable[Task], *, nbytes: int = 0
) -> Iterator[Result]:
    """Yield ``function(task)`` of each task, in their order; without an executor one after the other, here.

    So many tasks are under way that the results which wait for an earlier one stay below 1 GB, and at least two. A task
    whose worker was lost is given to the executor again, up to four times in all; what a task itself raises is raised
    here, and not tried again. Sums of many numbers depend on how many threads share them: a worker's torch is set to as
    many as this process has, and left so.

    Args:
        executor: does the tasks; None for this process.
        function: what is done, the same wherever and how often it is; picklable if the executor has other processes.
        tasks: its arguments.
        nbytes: bytes of a result.

    Raises:
        SourceProjError: workers are lost again and again, or the executor takes no more tasks.
        TypeError: the function cannot be sent to processes.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(2) as executor:
        ...     list(map_in_order(executor, abs, [-1, 2, -3]))
        [1, 2, 3]
    """
    if executor is None:
        yield from map(function, tasks)
        return
    most = min(max(_HELD_BYTES // max(1, nbytes), _IN_FLIGHT[0]), _IN_FLIGHT[-1])
    call, threads = uuid.uuid4().hex, torch.get_num_threads()
    if isinstance(executor, ProcessPoolExecutor):
        function = _Packed(function)
    waiting: deque[_Submitted] = deque()
    try:
        for number, task in enumerate(tasks):
            name = f"{call}-{number}"
            waiting.append(_Submitted(executor, partial(_run, function, task, threads), name))
            if len(waiting) == most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for submitted in waiting:
            submitted.future.cancel()


class _Packed:
    """A function that is read where its errors are caught: a process that cannot read a task dies, and its pool too.

    Raises:
        TypeError: it cannot be sent.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        try:
            self._content = pickle.dumps(function)
        except Exception as error:
            raise TypeError(
                f"what processes are to do cannot be sent to them ({type(error).__name__}: {error}): models, tasks and "
                "data must be made of classes and functions of a module, without lambdas; or give a "
                "ThreadPoolExecutor, or Dask"
            ) from error

    def __call__(self, task: Any) -> Any:
        return pickle.loads(self._content)(task)


class _Submitted:
    """A task with the executor.

    Args:
        executor: does it.
        work: the task; takes the name of an attempt, which some engines tell tasks apart by.
        name: another one for every task.

    Attributes:
        future: the last attempt.
    """

    def __init__(self, executor: Executor, work: Callable[[str], Any], name: str) -> None:
        self._executor, self._work, self._name = executor, work, name
        self.future = self._submit(0)

    def result(self) -> Any:
        """What the task returned; raises what it raised, or SourceProjError if no worker brings it to an end."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                outcome = self.future.result()
                break
            except Exception as error:
                if attempt == _ATTEMPTS:
                    raise self._lost(f"did not end a task in {attempt} attempts", error) from error
                self.future = self._submit(attempt)
        if isinstance(outcome, _Failed):
            raise outcome.error
        return outcome

    def _submit(self, attempt: int) -> Any:
        try:
            return self._executor.submit(self._work, f"{self._name}-{attempt}")
        except Exception as error:
            if any(word in str(error) for word in ("shutdown", "closed")):  # pools say the one, Dask's client the other
                raise SourceProjError(
                    f"the executor {self._executor!r} was shut down before ({error}): ask while it is open, inside its "
                    "with block, or give another one by executor="
                ) from error
            raise self._lost("takes no task", error) from error

    def _lost(self, what: str, error: Exception) -> SourceProjError:
        return SourceProjError(
            f"the executor {self._executor!r} {what} ({type(error).__name__}: {error}). A pool that lost a process is "
            "of no more use: make another one, with more memory for each worker, or take an engine that replaces "
            "workers, such as Dask"
        )


def _run(function: Callable[[Task], Result], task: Task, threads: int, attempt: str) -> Result | _Failed:  # noqa: ARG001
    """Do a task, wherever this is."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    try:
        return function(task)
    except Exception as error:
        return _Failed(_portable(error))


def _portable(error: Exception) -> Exception:
    """An error as another process can read it, with where it came from."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # its constructor takes something else
        error = SourceProjError(f"{type(error).__name__}: {error}")
    error.add_note(f"raised by a worker:\n{trace}")
    return error
