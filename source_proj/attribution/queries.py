"""Queries: the gradients of their measurements, sketched like the bank's rows."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, MismatchError, named_examples
from source_proj._io.progress import Progress, progress_bar
from source_proj.attribution.features import QueryFeatures, point_key, subject_of
from source_proj.attribution.query_models import LoadedModel, OpenModel, QueryModels
from source_proj.bank import Bank
from source_proj.bank.build.columns import arranged, query_split
from source_proj.bank.build.data import BatchSource, Span, to_device
from source_proj.bank.examples import Examples
from source_proj.gradients import Refuted, nonfinite_examples, require_own_weights, require_takes
from source_proj.task import Answers, Batch, Task, TokenQueries
from source_proj.trajectory import Checkpoint, Scale
from source_proj.trajectory.placement import placement_of

__all__ = ["checked_query_ids", "query_source", "resolve_task", "sketch_queries"]


def resolve_task(bank: Bank, task: Task | None) -> Task:
    """Return the task given, after comparison with the bank's, or the bank's own if it is a built-in one.

    Raises:
        MismatchError: if the task given is not the one that the bank was built with.
    """
    if task is None:
        return Task.from_spec(bank.task_spec)
    task = task.told_by(bank.task_spec)
    if not task.trains_as(bank.task_spec):
        remedy = "leave task= out"
        if "class" in bank.task_spec:  # a task of one's own
            remedy = "give the task that it was built with (its measurement may be another)"
        raise MismatchError(
            f"the bank {bank.path} was built with task {bank.task_spec}, got {task.spec()}; {remedy}, or build another "
            "bank"
        )
    return task


def sketch_queries(
    bank: Bank,
    models: QueryModels,
    task: Task,
    queries: Any,
    *,
    checkpoints: Sequence[Checkpoint] | None = None,
    metrics: Sequence[int] | None = None,
    ids: Sequence[Any] | None = None,
    batch_size: int = 64,
    span: Span | None = None,
    progress: Progress = True,
    answers: Answers | None = None,
    exact: bool = False,
) -> QueryFeatures:
    """Sketch the gradient of every query's measurement at checkpoints of the bank (default: the final weights).

    The model supplies the architecture: what runs is a copy of it, so that any number of threads may ask at once while
    the model itself is in use.

    Args:
        bank: the bank whose sketch, parameters and checkpoints are used.
        models: a module of the architecture that the bank was built with, open for queries.
        task: gives the measurement.
        queries: map-style dataset or DataLoader; its order defines the ids unless ``ids`` are given. A pandas frame, a
            ``datasets.Dataset``, or a ``DatasetDict`` with one split beside ``train`` are taken as they are.
        checkpoints: where to take the gradients: one backward pass over the queries each.
        metrics: which of the bank's metrics to take them in, all from one pass; default: all of them.
        ids: ids of the queries; default 0, 1, 2, …, or "sequence/position" of :class:`TokenQueries`.
        batch_size: queries per pass; a DataLoader brings its own.
        span: the first query and the end of those to sketch; default: all.
        progress: show a progress bar after two seconds; False for none, or a function of (description, done, total).
        answers: what queries without targets are asked about; default: what the model says of them at the final
            weights.
        exact: take the gradients themselves, ``(Q, d)``, and not their sketches.

    Raises:
        MismatchError: if the model's parameters are not the bank's, or a checkpoint changed since the build.
        GradientError: if a query's measurement or its gradient is not finite; names the query ids.
    """
    points = list(checkpoints) if checkpoints is not None else [bank.final_checkpoint()]
    source = query_source(queries, batch_size, bank.notes.columns)
    query_ids = checked_query_ids(queries, ids, source.n)
    wanted = list(range(len(bank.metrics))) if metrics is None else list(metrics)
    features: dict[str, Tensor] = {}
    measurements = None
    asked = _Asked(source, task, span or (0, source.n), answers)
    with models.borrowed() as opened:
        if answers is None:
            with named_examples(query_ids):
                asked.ask(opened, bank, progress)
        subject, task = subject_of(bank, task), task.by_target()
        for number, point in enumerate(points, start=1):
            loaded = opened.at(bank, point, exact=exact)
            place = f"queries, checkpoint {number} of {len(points)}" if len(points) > 1 else "queries"
            with named_examples(query_ids):
                _examine(loaded, models.model, task, asked, final=point is points[-1])
            scales = [None if scale is None else scale.to(_device(loaded)) for scale in bank.metrics.scales(wanted)]
            sketched = partial(_sketched, loaded, task, asked, scales, query_ids, point.step, progress, place)
            try:
                values, rows = sketched()
            except Refuted:  # a later batch showed that earlier rows may be wrong: all again, by the general path
                values, rows = sketched()
            by_metric = zip(wanted, zip(*rows, strict=True), strict=True)
            if point.hash() == bank.trajectory.final.hash:  # which need not be read
                measurements = torch.cat(values)
            features |= {point_key(point, bank.metrics.hash(m)): torch.cat(r) for m, r in by_metric}
    shown = Examples(queries) if bank.examples is None else bank.examples.like(queries)
    start, stop = asked.span
    if asked.span != (0, source.n):
        shown = shown.at(range(start, stop))
    return QueryFeatures(
        features, query_ids[start:stop], bank.sketch.spec(), asked.answers, shown, subject, measurements, source.n
    )


def query_source(queries: Any, batch_size: int, columns: Sequence[str] = ()) -> BatchSource:
    """Queries of any kind, in batches; the numbers of a table in the order of the training set's columns."""
    return BatchSource(_rows(arranged(query_split(queries), columns)), batch_size)


def checked_query_ids(queries: Any, ids: Sequence[Any] | None, count: int) -> list[Any]:
    """Ids of the queries: those given, those of tokens, or else their places.

    Raises:
        MismatchError: there are more or fewer ids than queries.
    """
    if ids is None and isinstance(queries, TokenQueries):
        ids = queries.ids
    query_ids = list(ids) if ids is not None else list(range(count))
    if len(query_ids) != count:
        raise MismatchError(f"got {len(query_ids)} ids for {count} examples; give one id each")
    return query_ids


def _examine(loaded: LoadedModel, original: nn.Module, task: Task, asked: "_Asked", *, final: bool) -> None:
    """Look at the first batch of queries: once for a copy, and the task at every set of them."""
    if loaded.checked and not final:
        return
    _, _, batch = next(asked.load(first=True))
    batch = to_device(batch, _device(loaded))
    if final:
        task.examine(loaded.module, batch)
    if not loaded.checked:
        loaded.engine.placement.forget()
        require_own_weights(task.measurement, loaded.module, original, batch)
        loaded.checked = True


def _device(loaded: LoadedModel) -> torch.device:
    return placement_of(loaded.module).device


class _Asked:
    """Queries in batches, with the model's own answers as their targets where the task asks for these."""

    def __init__(self, source: BatchSource, task: Task, span: Span, answers: Answers | None) -> None:
        self._source, self._task, self.span, self.answers = source, task, span, answers
        self.n = span[1] - span[0]

    def ask(self, opened: OpenModel, bank: Bank, progress: Progress) -> None:
        """Let a model answer at the bank's final weights, if the task asks for answers."""
        start, _ = self.span
        _, _, first = next(self._source.load([(start, start + 1)]))
        if not self._task.asks_for_answers(first):
            return
        loaded = opened.at(bank, bank.final_checkpoint())
        parts = []
        with progress_bar(progress, "the model's own answers", self.n, "queries") as bar:
            for low, high, batch in self._source.load([self.span]):
                batch = to_device(batch, _device(loaded))
                loaded.engine.placement.forget()
                try:
                    parts.append(self._task.answers(loaded.module, batch))
                except (RuntimeError, IndexError):
                    require_takes(self._task.answers, loaded.module, batch)
                    raise
                bar.update(high - low)
        self.answers = Answers.joined(parts)

    def load(self, *, first: bool = False) -> Iterator[tuple[int, int, Batch]]:
        """All batches, or only the first, as :meth:`BatchSource.load` gives them."""
        begin, end = self.span
        for start, stop, batch in self._source.load(
            [(begin, min(end, begin + self._source.batch_size) if first else end)]
        ):
            if self.answers is None:
                yield start, stop, batch
            else:
                yield start, stop, self._task.answered(batch, self.answers.values[start - begin : stop - begin])


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
    loaded: LoadedModel,
    task: Task,
    source: _Asked,
    scales: Sequence[Scale | None],
    ids: Sequence[Any],
    step: int,
    progress: Progress,
    place: str,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """For each batch of queries, their measurements ``(B,)``, and the rows ``(B, k)`` of these in each metric.

    Raises:
        GradientError: a measurement or its gradient is not finite, or has no graph; names the ids.
        Refuted: the rows so far are to be made again.
    """
    measured: list[Tensor] = []
    rows: list[list[Tensor]] = []
    with progress_bar(progress, place, source.n, "queries") as bar:
        for start, stop, batch in source.load():
            with named_examples(ids[start:stop]):
                placed = to_device(batch, _device(loaded))
                try:
                    values, made = loaded.engine.sketch_scaled(
                        task.measurement, placed, scales, "measurement", stop - start
                    )
                except (RuntimeError, IndexError):
                    require_takes(task.measurement, loaded.module, placed)
                    raise
            for what, numbers in [("measurement", [values[:, None]]), ("measurement's gradient", made)]:
                bad = sorted({i for rows_of_batch in numbers for i in nonfinite_examples(rows_of_batch)})
                if bad:
                    raise GradientError(
                        f"the {what} is not finite for queries {[ids[start + i] for i in bad]} at step {step}; look at "
                        "their inputs and targets, or at the weights of that checkpoint"
                    )
            measured.append(values.float().cpu())
            rows.append([row.cpu() for row in made])
            bar.update(stop - start)
    silent = bool(rows) and not any(bool(row.any()) for of_batch in rows for row in of_batch)
    if silent and loaded.engine.is_detached(task.measurement, placed):  # else zeros are right: no label counts, say
        raise GradientError(
            f"no query up to {ids[stop - 1]!r} has a gradient at step {step}: the measurement of task {task.name!r} is "
            "detached from the model's parameters, and all scores would be 0; look for detach(), no_grad(), argmax or "
            "a comparison in it"
        )
    return measured, rows
