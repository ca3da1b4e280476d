"""An executor that does tasks in any order, on copies that were pickled, and loses some of its workers."""

import pickle
import random
from concurrent.futures import Future

__all__ = ["LossyExecutor"]


class LossyExecutor:
    """Does what it was given when somebody waits, in random order.

    Args:
        seed: of the order and the losses.
        losses: how often a task may be lost.
    """

    def __init__(self, seed: int, losses: int = 3) -> None:
        self._draw, self._losses = random.Random(seed), losses
        self.attempts: list[tuple[object, str]] = []
        self.done: list[object] = []
        self.futures: list[_Waiting] = []
        self._lost: dict[str, int] = {}

    def submit(self, fn, /, *args):
        future = _Waiting(self)
        future.work = pickle.dumps((fn, args))
        self.futures.append(future)
        (name,) = args
        future.name = name.rpartition("-")[0]
        self.attempts.append((fn, name))
        return future

    def work(self) -> None:
        """Do one of the tasks, or lose it."""
        future = self._draw.choice([future for future in self.futures if not future.done()])
        lost = self._lost.get(future.name, 0)
        if lost < self._losses and (self._losses > 3 or self._draw.random() < 0.4):
            self._lost[future.name] = lost + 1
            future.set_exception(ConnectionError("worker lost"))
            return
        fn, args = pickle.loads(future.work)
        result = fn(*args)
        self.done.append(fn.args[1])
        future.set_result(pickle.loads(pickle.dumps(result)))


class _Waiting(Future):
    def __init__(self, executor: LossyExecutor) -> None:
        super().__init__()
        self._executor = executor

    def result(self, timeout=None):
        while not self.done():
            self._executor.work()
        return super().result(timeout)
