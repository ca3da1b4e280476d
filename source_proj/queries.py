"""Queries: the gradients of their measurements, sketched like the bank's rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from source_proj.bank import Bank, batches, dataset_size, placed
from source_proj.errors import GradientError, MismatchError
from source_proj.gradients import ParameterSpace, gradient_engine, nonfinite_examples
from source_proj.task import Task
from source_proj.trajectory import Checkpoint

__all__ = ["QueryFeatures", "resolve_task", "sketch_queries"]


@dataclass(frozen=True)
class QueryFeatures:
    """Sketched measurement gradients of Q queries: compute them once, ask many methods.

    Attributes:
        rows: by checkpoint hash, R∇m(q) at these weights, each ``(Q, k)`` float32.
        ids: Q query ids.
        sketch: the sketch's description; a bank's must equal it.
    """

    rows: dict[str, Tensor]
    ids: list[Any]
    sketch: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, checkpoint: Checkpoint) -> Tensor:
        """Return the rows ``(Q, k)`` taken at a checkpoint.

        Raises:
            MismatchError: if these features were not computed at that checkpoint.
        """
        rows = self.rows.get(checkpoint.hash())
        if rows is None:
            raise MismatchError(
                f"these query features were taken at weights {[key[:12] for key in self.rows]}, and are needed at "
                f"{checkpoint.hash()[:12]} (step {checkpoint.step}); compute them with the method's own sketch(queries)"
            )
        return rows


def resolve_task(bank: Bank, task: Task | None) -> Task:
    """Return the task given, after comparison with the bank's, or the bank's own if it is a built-in one.

    Raises:
        MismatchError: if the task given is not the one that the bank was built with.
    """
    if task is None:
        return Task.from_spec(bank.task_spec)
    if task.spec() != bank.task_spec:
        raise MismatchError(
            f"the bank {bank.path} was built with task {bank.task_spec}, got {task.spec()}; "
            "leave task= out, or build another bank"
        )
    return task


def sketch_queries(
    bank: Bank,
    model: nn.Module,
    task: Task,
    queries: Any,
    *,
    checkpoints: Sequence[Checkpoint] | None = None,
    ids: Sequence[Any] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> QueryFeatures:
    """Sketch the gradient of every query's measurement at checkpoints of the bank (default: the final weights).

    The model lends only its code: its own weights, buffers and mode come back unchanged.

    Args:
        bank: the bank whose sketch, parameters and checkpoints are used.
        model: a module of the architecture that the bank was built with.
        task: gives the measurement.
        queries: map-style dataset or DataLoader; its order defines the ids unless ``ids`` are given.
        checkpoints: where to take the gradients: one backward pass over the queries each.
        ids: ids of the queries; default 0, 1, 2, …
        batch_size: queries a pass; a DataLoader brings its own.
        device: where the model runs; default: where its parameters are.
        progress: show a progress bar after two seconds.

    Raises:
        MismatchError: if the model's parameters are not the bank's, or a checkpoint changed since the build.
        GradientError: if a query's gradient is not finite; names the query ids.
    """
    space = ParameterSpace.from_spec(bank.space_spec)
    points = list(checkpoints) if checkpoints is not None else [bank.final_checkpoint()]
    count = dataset_size(queries)
    query_ids = list(ids) if ids is not None else list(range(count))
    if len(query_ids) != count:
        raise MismatchError(f"got {len(query_ids)} query ids for {count} queries; give one id a query")
    features = {}
    for point in points:
        with placed(model, device) as where, point.applied_to(model):
            engine = gradient_engine(model, space, bank.sketch, method=bank.gradients, autocast=bank.autocast)
            rows = []
            for start, batch in batches(queries, batch_size, device=where, progress=progress):
                _, row = engine.sketch(task.measurement, batch)
                bad = nonfinite_examples(row)
                if bad:
                    raise GradientError(
                        f"the measurement's gradient is not finite for queries {[query_ids[start + i] for i in bad]} "
                        f"at step {point.step}; look at their inputs, or at the weights of that checkpoint"
                    )
                rows.append(row.cpu())
        features[point.hash()] = torch.cat(rows)
    return QueryFeatures(features, query_ids, bank.sketch.spec())
