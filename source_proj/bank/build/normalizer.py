"""What a batch's loss is divided by where that is no number of examples: counted over the training set."""

import math
from collections.abc import Sequence

from source_proj._errors import named_examples
from source_proj.bank.build.data import BatchSource
from source_proj.gradients.batches import require_examples
from source_proj.task import Task
from source_proj.task.base import per_example

__all__ = ["with_normalizer"]


def with_normalizer(task: Task, sources: Sequence[BatchSource], stages: Sequence[str]) -> Task:
    """The task, told the mean share of each stage's examples where it needs that: one reading of the data, no model.

    Args:
        task: see :meth:`source_proj.task.Task.share`.
        sources: the stages' training sets.
        stages: their names.

    Raises:
        ValueError: no example of a stage has a share, so that no loss was defined, or a share is not one number each.
    """
    if not task.needs_normalizer:
        return task
    means = []
    for source, name in zip(sources, stages, strict=True):
        shares = []
        for start, stop, batch in source.load([(0, source.n)]):
            require_examples(batch, range(start, stop))
            with named_examples(range(start, stop)):
                shares += per_example(task.share(batch), "share", stop - start).tolist()
        means.append(math.fsum(shares) / source.n)
        if not means[-1] > 0:
            raise ValueError(
                f"the loss of {task!r} is divided by a mean over the examples of stage {name!r} that is {means[-1]}: "
                "none of its labels counts"
            )
    return task.normalized(means)
