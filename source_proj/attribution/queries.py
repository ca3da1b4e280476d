"""Queries: the gradients of their measurements, sketched like the bank's rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, MismatchError, named_examples
from source_proj._io.progress import Progress, progress_bar
from source_proj.bank import Bank
from source_proj.bank.build.columns import query_split
from source_proj.bank.build.data import BatchSource, Span, to_device
from source_proj.bank.examples import Examples
from source_proj.gradients import (
    GradientEngine,
    ParameterSpace,
    Refuted,
    gradient_engine,
    nonfinite_examples,
    private_copy,
    require_own_weights,
)
from source_proj.task import Answers, Batch, Task, TokenQueries
from source_proj.trajectory import Checkpoint

__all__ = ["QueryFeatures", "point_key", "resolve_task", "sketch_queries"]


@dataclass(frozen=True)
class QueryFeatures:
    """Sketched measurement gradients of Q queries: compute them once, ask many methods.

    Attributes:
        rows: by :func:`point_key`, R∇m(q) at these weights (R P^½ ∇m(q) in a metric P), each ``(Q, k)`` float32.
        ids: Q query ids.
        sketch: the sketch's description; a bank's must equal it.
        answers: what the model said of the queries, where it was asked about that and not about their targets.
        examples: how the queries are shown; None where only their features are known.
    """

    rows: dict[str, Tensor]
    ids: list[Any]
    sketch: dict[str, Any]
    answers: Answers | None = None
    examples: Examples | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, places: Sequence[int]) -> "QueryFeatures":
        """Those of the queries at some places."""
        return replace(
            self,
            rows={key: rows[list(places)] for key, rows in self.rows.items()},
            ids=[self.ids[place] for place in places],
            answers=None if self.answers is None else self.answers.at(places),
            examples=None if self.examples is None else self.examples.at(places),
        )

    def at(self, checkpoint: Checkpoint, metric: str | None = None) -> Tensor:
        """Return the rows ``(Q, k)`` taken at a checkpoint, in the metric of a hash.

        Raises:
            MismatchError: if these features were not computed at that checkpoint, or not in that metric.
        """
        rows = self.rows.get(point_key(checkpoint, metric))
        if rows is None:
            known = [" in metric ".join(part[:12] for part in key.split(":")) for key in self.rows]
            wanted = " in metric ".join(part[:12] for part in point_key(checkpoint, metric).split(":"))
            raise MismatchError(
                f"these query features were taken at weights {known}, and are needed at "
                f"{wanted} (step {checkpoint.step}); compute them with the method's own sketch(queries)"
            )
        return rows


def point_key(checkpoint: Checkpoint, metric: str | None) -> str:
    """Name of a point where queries are differentiated: the weights' hash, and the metric's where there is one."""
    return checkpoint.hash() if metric is None else f"{checkpoint.hash()}:{metric}"


def resolve_task(bank: Bank, task: Task | None) -> Task:
    """Return the task given, after comparison with the bank's, or the bank's own if it is a built-in one.

    Raises:
        MismatchError: if the task given is not the one that the bank was built with.
    """
    if task is None:
        return Task.from_spec(bank.task_spec)
    task = task.told_by(bank.task_spec)
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
    metrics: Sequence[int] | None = None,
    ids: Sequence[Any] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: Progress = True,
    answers: Answers | None = None,
) -> QueryFeatures:
    """Sketch the gradient of every query's measurement at checkpoints of the bank (default: the final weights).

    The model supplies the architecture: what runs is a copy of it, so that any number of threads may ask at once while
    the model itself is in use.

    Args:
        bank: the bank whose sketch, parameters and checkpoints are used.
        model: a module of the architecture that the bank was built with.
        task: gives the measurement.
        queries: map-style dataset or DataLoader; its order defines the ids unless ``ids`` are given. A pandas frame, a
            ``datasets.Dataset``, or a ``DatasetDict`` with one split beside ``train`` are taken as they are.
        checkpoints: where to take the gradients: one backward pass over the queries each.
        metrics: which of the bank's metrics to take them in, all from one pass; default: all of them.
        ids: ids of the queries; default 0, 1, 2, …, or "sequence/position" of :class:`TokenQueries`.
        batch_size: queries per pass; a DataLoader brings its own.
        device: where the model runs; default: where its parameters are.
        progress: show a progress bar after two seconds; False for none, or a function of (description, done, total).
        answers: what queries without targets are asked about; default: what the model says of them at the final
            weights.

    Raises:
        MismatchError: if the model's parameters are not the bank's, or a checkpoint changed since the build.
        GradientError: if a query's measurement or its gradient is not finite; names the query ids.
    """
    space = ParameterSpace.from_spec(bank.space_spec)
    points = list(checkpoints) if checkpoints is not None else [bank.final_checkpoint()]
    source = BatchSource(_rows(query_split(queries)), batch_size)
    count = source.n
    if ids is None and isinstance(queries, TokenQueries):
        ids = queries.ids
    query_ids = list(ids) if ids is not None else list(range(count))
    if len(query_ids) != count:
        raise MismatchError(f"got {len(query_ids)} query ids for {count} queries; give one id per query")
    wanted = list(range(len(bank.metrics))) if metrics is None else list(metrics)
    features: dict[str, Tensor] = {}
    space.parameters(model)  # refuses another model
    own = private_copy(model, device)
    where = next(own.parameters()).device
    asked = _Asked(source, task, answers)
    if answers is None:
        with named_examples(query_ids):
            asked.ask(bank, own, where, progress)
    task = task.by_target()
    for number, point in enumerate(points, start=1):
        point.load_into(own)
        engine = gradient_engine(own, space, bank.sketch, method=bank.gradients, autocast=bank.autocast)
        if point is points[0] or point is points[-1]:
            _, _, batch = next(asked.load([(0, min(count, source.batch_size))]))
            batch = to_device(batch, where)
            with named_examples(query_ids):
                if point is points[-1]:
                    task.examine(own, batch)
                if point is points[0]:
                    require_own_weights(task.measurement, own, model, batch)
        scales = [None if scale is None else scale.to(where) for scale in bank.metrics.scales(wanted)]
        place = f"queries, checkpoint {number} of {len(points)}" if len(points) > 1 else "queries"
        sketched = partial(_sketched, engine, task, asked, scales, query_ids, point.step, where, progress, place)
        engine.begin(bank.sketch.seed, point.step)
        try:
            rows = sketched()
        except Refuted:  # a later batch showed that earlier rows may be wrong: all again, by the general path
            rows = sketched()
        by_metric = zip(wanted, zip(*rows, strict=True), strict=True)
        features |= {point_key(point, bank.metrics.hash(m)): torch.cat(r) for m, r in by_metric}
    shown = Examples(queries) if bank.examples is None else bank.examples.like(queries)
    return QueryFeatures(features, query_ids, bank.sketch.spec(), asked.answers, shown)


class _Asked:
    """Queries in batches, with the model's own answers as their targets where the task asks for these."""

    def __init__(self, source: BatchSource, task: Task, answers: Answers | None) -> None:
        self._source, self._task, self.answers = source, task, answers
        self.n = source.n

    def ask(self, bank: Bank, model: nn.Module, device: torch.device, progress: Progress) -> None:
        """Let a model answer at the bank's final weights, if the task asks for answers."""
        whole = [(0, self.n)]
        _, _, first = next(self._source.load([(0, 1)]))
        if not self._task.asks_for_answers(first):
            return
        bank.final_checkpoint().load_into(model)
        parts = []
        with progress_bar(progress, "the model's own answers", self.n, "queries") as bar:
            for start, stop, batch in self._source.load(whole):
                parts.append(self._task.answers(model, to_device(batch, device)))
                bar.update(stop - start)
        self.answers = Answers.joined(parts)

    def load(self, spans: Sequence[Span]) -> Iterator[tuple[int, int, Batch]]:
        """As :meth:`BatchSource.load`."""
        for start, stop, batch in self._source.load(spans):
            if self.answers is None:
                yield start, stop, batch
            else:
                yield start, stop, self._task.answered(batch, self.answers.values[start:stop])


class _Columns:
    """Columns of equal length, such as a tokenizer's output, as a data set of dicts."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self._columns = columns
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) != 1:
            raise MismatchError(f"the columns of the queries have different lengths, {sizes}: one entry a query each")
        self._size = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self._columns.items()}


def _rows(queries: Any) -> Any:
    """Queries as a data set; a mapping of tensors is one, column by column."""
    if isinstance(queries, Mapping) and queries and all(isinstance(column, Tensor) for column in queries.values()):
        return _Columns(queries)
    return queries


def _sketched(
    engine: GradientEngine,
    task: Task,
    source: _Asked,
    scales: Sequence[Tensor | None],
    ids: Sequence[Any],
    step: int,
    device: torch.device,
    progress: Progress,
    place: str,
) -> list[list[Tensor]]:
    """For each batch of queries, the rows ``(B, k)`` of their measurements in each metric.

    Raises:
        GradientError: a measurement or its gradient is not finite; names the ids.
        Refuted: the rows so far are to be made again.
    """
    rows: list[list[Tensor]] = []
    with progress_bar(progress, place, source.n, "queries") as bar:
        for start, stop, batch in source.load([(0, source.n)]):
            with named_examples(ids[start:stop]):
                placed = to_device(batch, device)
                values, made = engine.sketch_scaled(task.measurement, placed, scales, "measurement", stop - start)
            for what, numbers in [("measurement", [values[:, None]]), ("measurement's gradient", made)]:
                bad = sorted({i for rows_of_batch in numbers for i in nonfinite_examples(rows_of_batch)})
                if bad:
                    raise GradientError(
                        f"the {what} is not finite for queries {[ids[start + i] for i in bad]} at step {step}; look at "
                        "their inputs and targets, or at the weights of that checkpoint"
                    )
            rows.append([row.cpu() for row in made])
            bar.update(stop - start)
    return rows
