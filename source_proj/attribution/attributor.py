"""What every attribution method on a bank shares: checks, queries, streamed products, the strongest examples.

Each method's scores are a sum of terms, each the product of a query operand ``(Q, k)`` and a training operand
``(N, k)``. A method says what its terms are; `products` multiplies them block by block, so that no verb but ``score``
ever holds Q x N numbers, and averages over an ensemble of banks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
import zarr
from torch import Tensor, nn

from source_proj._io.executors import Executor, check_executor
from source_proj._io.progress import Progress
from source_proj.attribution.ensembles import as_banks, require_one_training_set
from source_proj.attribution.features import QueryFeatures, SketchedQueries, checked_features, subject_of
from source_proj.attribution.hits import Hits, Shown, checked_count, make_hits
from source_proj.attribution.hits_file import HitsFile
from source_proj.attribution.operands import Picked, checked_rows
from source_proj.attribution.products import Products, Term, scored_blocks, strongest_rows
from source_proj.attribution.queries import query_source, resolve_task, sketch_queries
from source_proj.attribution.query_models import QueryModels
from source_proj.attribution.score_files import scores_facts
from source_proj.attribution.scores import Scores
from source_proj.attribution.streaming import QueryBlocks, checked_out, queries_per_block, stream_hits, stream_scores
from source_proj.attribution.words import plain_ids
from source_proj.bank import Bank
from source_proj.bank.build.arguments import require_device
from source_proj.sketch import plain_modes
from source_proj.task import Answers, Task
from source_proj.trajectory import Checkpoint, counts
from source_proj.trajectory.placement import unwrapped

__all__ = ["Attributor", "Queries", "Term"]

Queries = Any
"""A data set, a DataLoader, inputs alone (a tensor, a tokenizer's output), or what ``sketch(queries)`` returned."""


class Attributor(ABC):
    """An attribution method on one bank, or averaged over the banks of several training runs.

    Args:
        bank: a finalized bank, or a list of banks of runs on the same training set (an ensemble: final scores are
            averaged over the runs).
        model: a module of the architecture that was trained; needed for queries given as data. Weights come from the
            bank's checkpoints, and the model itself is left as it is.
        task: the task of the bank; needed for custom tasks only.
        batch_size: queries per backward pass.
        device: where products are computed and queries run; default: the CPU, and where the model is.
        executor: computes what reads the whole bank: a pool of processes or threads, Dask's ``client.get_executor()``,
            or anything else shaped like :class:`concurrent.futures.Executor` whose workers see the bank under the same
            path or URL. The results are the bits that this process alone would make.
        progress: show progress bars for what takes over two seconds; False for none, or a function of (description,
            done, total).

    Raises:
        TypeError: if the executor is none.
        MismatchError: if the banks' training ids differ, or the task is not the banks' own.
        BankError: if a bank is not finalized.
        ValueError: if rows are of whole segments, and the method needs gradients at a checkpoint.
    """

    additive = True
    """Whether scores are changes of the measurement."""

    takes_captured = False
    """Whether rows of whole segments of training will do, and not only gradients at a checkpoint."""

    def __init__(
        self,
        bank: Bank | Sequence[Bank],
        *,
        model: nn.Module | None = None,
        task: Task | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        executor: Executor | None = None,
        progress: Progress = True,
    ) -> None:
        check_executor(executor)
        require_device(device)
        self.banks = as_banks(bank)
        for member in self.banks:
            if member.captured and not self.takes_captured:
                raise ValueError(
                    f"{type(self).__name__} needs gradients at a checkpoint, and the rows of {member.path} "
                    "are of whole segments of training: take Source or Hydra, or a bank that was built of checkpoints"
                )
        self._compared: tuple[str, ...] = ()
        self._compare_banks()
        model = unwrapped(model)
        self.model = model
        self._models = None if model is None else QueryModels(model, device)
        if model is not None:
            self.banks[0].notes.warn_of_other_modules(model)
        if task is not None:
            resolve_task(self.banks[0], task)
            self.banks[0].notes.warn_of_other_code(task)
        self._given_task = task
        self.batch_size = counts.checked_count("batch_size", batch_size, 1)
        self.device = device
        self.executor = executor
        self.progress = progress

    # The verbs ------------------------------------------------------------------------------------------------

    @plain_modes()
    def score(self, queries: Queries, out: str | Path | None = None, *, overwrite: bool = False) -> Scores:
        """Score every training example for every query.

        Args:
            queries: dataset or DataLoader of queries, or what :meth:`sketch` returned. Inputs without targets are asked
                about what the model itself says of them, where the task can tell (see :class:`Classification`).
            out: a .zarr folder to stream the scores to, by blocks of queries, which then need not fit into memory. It
                appears when it is whole; asking the same again after a kill goes on from the last whole block.
            overwrite: replace an array of scores that is there.

        Returns:
            Scores ``(Q, N)``: the change of the query's measurement that including the example made; with ``out`` they
            are read from there, where they are asked for.

        Raises:
            ValueError, FileExistsError: ``out`` has another ending, or something is there.
        """
        if out is not None:
            return self._scores(
                *stream_scores(self, queries, checked_out(out, "scores", overwrite=overwrite), overwrite=overwrite)
            )
        features = self.sketch(queries)
        values = torch.zeros(len(features.ids), self.n_rows, dtype=torch.float32, device="cpu")
        for start, stop, block in self.blocks(self.all_terms(features), len(features.ids)):
            values[:, start:stop] = block
        return self._scores(values.numpy(), features.ids, features)

    @plain_modes()
    def score_rows(self, queries: Queries, rows: Sequence[int]) -> np.ndarray:
        """The scores ``(Q, n)`` float32 of the training examples at n positions; raises ValueError where none is."""
        features = self.sketch(queries)
        wanted, order = checked_rows(rows, self.n_rows)
        values = torch.zeros(len(features.ids), len(wanted), dtype=torch.float32, device="cpu")
        terms = [term._replace(train=Picked(term.train, wanted)) for term in self.all_terms(features)]
        for start, stop, block in Products(terms, len(features.ids), len(self.banks)).blocks((0, len(wanted))):
            values[:, start:stop] = block
        return values[:, order].numpy()

    @overload
    def top_k(self, queries: Queries, k: int, out: None = None, *, overwrite: bool = False) -> Hits: ...
    @overload
    def top_k(self, queries: Queries, k: int, out: str | Path, *, overwrite: bool = False) -> HitsFile: ...
    def top_k(
        self, queries: Queries, k: int, out: str | Path | None = None, *, overwrite: bool = False
    ) -> Hits | HitsFile:
        """Return the k highest scores of each query, without ever holding Q x N numbers.

        Args:
            queries: as for :meth:`score`.
            k: training examples of each query.
            out: a .parquet file (a line a score) or .zarr folder to stream them to, as for
                :meth:`score`.
            overwrite: replace hits that are there.

        Returns:
            :class:`Hits`; with ``out`` a :class:`HitsFile`, which reads them from there.
        """
        return self._listed(queries, k, out, highest=True, overwrite=overwrite)

    @overload
    def bottom_k(self, queries: Queries, k: int, out: None = None, *, overwrite: bool = False) -> Hits: ...
    @overload
    def bottom_k(self, queries: Queries, k: int, out: str | Path, *, overwrite: bool = False) -> HitsFile: ...
    def bottom_k(
        self, queries: Queries, k: int, out: str | Path | None = None, *, overwrite: bool = False
    ) -> Hits | HitsFile:
        """Return the k lowest scores of each query, lowest first; arguments as for :meth:`top_k`."""
        return self._listed(queries, k, out, highest=False, overwrite=overwrite)

    @overload
    def helpful(self, queries: Queries, k: int, out: None = None, *, overwrite: bool = False) -> Hits: ...
    @overload
    def helpful(self, queries: Queries, k: int, out: str | Path, *, overwrite: bool = False) -> HitsFile: ...
    def helpful(
        self, queries: Queries, k: int, out: str | Path | None = None, *, overwrite: bool = False
    ) -> Hits | HitsFile:
        """Return the k examples that improve each query most, in the task's own sense; see :meth:`top_k`."""
        return self._listed(queries, k, out, highest=self.higher_is_better, overwrite=overwrite)

    @overload
    def harmful(self, queries: Queries, k: int, out: None = None, *, overwrite: bool = False) -> Hits: ...
    @overload
    def harmful(self, queries: Queries, k: int, out: str | Path, *, overwrite: bool = False) -> HitsFile: ...
    def harmful(
        self, queries: Queries, k: int, out: str | Path | None = None, *, overwrite: bool = False
    ) -> Hits | HitsFile:
        """Return the k examples that worsen each query most, in the task's own sense; see :meth:`top_k`."""
        return self._listed(queries, k, out, highest=not self.higher_is_better, overwrite=overwrite)

    @plain_modes()
    def sketch(self, queries: Queries, ids: Sequence[Any] | None = None) -> SketchedQueries:
        """Compute the queries' features, one entry per bank; every verb takes them in place of the data.

        They can be saved for later, and for other machines: ``features.save(path)``, ``QueryFeatures.load(path)``.

        Args:
            queries: as for :meth:`score`.
            ids: ids of the queries; default 0, 1, 2, …

        Raises:
            ValueError: if data are given but no model was, or ids beside features, which have theirs.
            MismatchError: if given features belong to other banks, or there are more or fewer ids than queries.
        """
        given = self._given(queries)
        if given is None:
            return self._features(queries, ids, None, self.progress)
        if ids is not None:
            raise ValueError("features have their ids from when they were sketched: leave ids out")
        return given

    def query_blocks(self, queries: Queries) -> QueryBlocks:
        """The queries' features, block by block."""
        given = self._given(queries)
        if given is not None:
            plain_ids(given.ids)  # which are written at the end: refused now where they cannot be
        points = [len(self._query_points(bank)) for bank in self.banks]
        metrics = [len(self._query_metrics(bank)) for bank in self.banks]
        width = 4 * self.banks[0].sketch.dim * sum(p * m for p, m in zip(points, metrics, strict=True))
        if given is not None:
            return QueryBlocks(len(given.ids), queries_per_block(1, width), 0, lambda span, _: given.part(*span))
        source = query_source(queries, self.batch_size, self.banks[0].notes.columns)
        size = queries_per_block(source.batch_size, width)
        return QueryBlocks(
            source.n, size, sum(points), lambda span, progress: self._features(queries, None, span, progress)
        )

    def _compare_banks(self) -> None:
        """Refuse an ensemble whose banks differ, now: rows may have been appended to one of them since the last look.

        Raises:
            MismatchError, BankError: as for the class; a single bank may have become unfinished, too.
        """
        prints = tuple(bank.fingerprint for bank in self.banks)
        if prints != self._compared:
            require_one_training_set(self.banks)
            self._compared = prints

    def _given(self, queries: Queries) -> SketchedQueries | None:
        """Features that were given in place of data; every verb that is asked something comes by here first."""
        self._compare_banks()
        if isinstance(queries, QueryFeatures):
            queries = [queries]
        if isinstance(queries, list) and queries and all(isinstance(given, QueryFeatures) for given in queries):
            subjects = [subject_of(bank, self.task) for bank in self.banks]
            return checked_features(queries, [self._sketch_spec(bank) for bank in self.banks], subjects)
        return None

    def _features(
        self, queries: Queries, ids: Sequence[Any] | None, span: tuple[int, int] | None, progress: Progress
    ) -> SketchedQueries:
        """Sketch queries given as data, or a span of them."""
        features = SketchedQueries()
        for bank in self.banks:
            answers = features[0].answers if features else None  # the runs of an ensemble are asked the same
            points, metrics = self._query_points(bank), self._query_metrics(bank)
            features.append(self._sketch(bank, queries, points, metrics, ids, span, answers, progress))
        return features

    # What a method says ----------------------------------------------------------------------------------------

    @abstractmethod
    def _terms(self, bank: Bank, features: QueryFeatures) -> list[Term]:
        """Return the terms of a bank's scores."""

    def _query_points(self, bank: Bank) -> list[Checkpoint]:
        """Return the checkpoints at which queries are differentiated."""
        return [bank.final_checkpoint()]

    def _query_metrics(self, bank: Bank) -> list[int]:
        """Return the metrics of the bank that queries are needed in: by default, all of them."""
        return list(range(len(bank.metrics)))

    def _query(self, bank: Bank, features: QueryFeatures, metric: int = 0) -> Tensor:
        """Return the sketched query gradients ``(Q, k)``, the mean over the checkpoints where they are taken."""
        points, digest = self._query_points(bank), bank.metrics.hash(metric)
        total = features.at(points[0], digest)
        if len(points) == 1:
            return total
        total = total.clone()
        for point in points[1:]:
            total += features.at(point, digest)
        return total.div_(len(points))

    # Facts -----------------------------------------------------------------------------------------------------

    @property
    def n_rows(self) -> int:
        """N, the number of training examples of all stages."""
        return self.banks[0].n_rows

    @property
    def task(self) -> Task:
        """The task that was given, or else the bank's own."""
        return resolve_task(self.banks[0], self._given_task)

    @property
    def unit(self) -> str:
        """Unit of the scores: the measurement's own."""
        return self.task.unit

    @property
    def higher_is_better(self) -> bool:
        """Whether high scores are of examples that helped: whether a rise of the measurement is an improvement."""
        return self.task.higher_is_better

    # Inside ----------------------------------------------------------------------------------------------------

    def shown(self, features: SketchedQueries | None = None) -> Shown:
        """What is known of the examples besides their ids."""
        train = self.banks[0].examples
        unlike = None
        if train is not None and len(train) != self.n_rows:  # rows were appended since
            unlike, train = (len(train), self.n_rows), None
        if features is None:
            return Shown(train, unlike=unlike)
        measured = features.measurements if self.additive else None
        return Shown(train, features[0].examples, features[0].answers, measured, unlike)

    def facts_of(self, query_ids: Sequence[Any]) -> dict[str, Any]:
        """What is written with scores and hits."""
        return scores_facts(
            query_ids, self.banks[0].ids, self.unit, higher_is_better=self.higher_is_better, additive=self.additive
        )

    def _scores(
        self, values: np.ndarray | zarr.Array[Any], query_ids: Sequence[Any], features: SketchedQueries | None = None
    ) -> Scores:
        return Scores(
            values, query_ids, self.banks[0].ids, unit=self.unit, higher_is_better=self.higher_is_better,
            stage_sizes=[stage.n for stage in self.banks[0].stages], additive=self.additive,
            shown=self.shown(features),
        )  # fmt: skip

    def _sketch_spec(self, bank: Bank) -> dict[str, Any]:
        """What features of queries to a bank must be of."""
        return bank.sketch.spec()

    def _sketch(
        self,
        bank: Bank,
        queries: Any,
        checkpoints: Sequence[Checkpoint],
        metrics: Sequence[int],
        ids: Sequence[Any] | None = None,
        span: tuple[int, int] | None = None,
        answers: Answers | None = None,
        progress: Progress | None = None,
    ) -> QueryFeatures:
        """Differentiate queries given as data, by the model that was given."""
        if self._models is None:
            raise ValueError("scoring queries given as data needs the model: pass model= when constructing")
        return sketch_queries(
            bank, self._models, self.task, queries, checkpoints=checkpoints, metrics=metrics, ids=ids,
            batch_size=self.batch_size, span=span, progress=self.progress if progress is None else progress,
            answers=answers,
        )  # fmt: skip

    def blocks(self, terms: list[Term], count: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ``(start, stop, scores (Q, stop - start))`` of Q = count queries over all rows, in order."""
        return scored_blocks(Products(terms, count, len(self.banks)), self.banks[0], self.executor)

    def all_terms(self, features: SketchedQueries) -> list[Term]:
        """The terms of all banks' scores."""
        self._compare_banks()
        return [term for bank, queried in zip(self.banks, features, strict=True) for term in self._terms(bank, queried)]

    @plain_modes()
    def _listed(
        self, queries: Queries, k: int, out: str | Path | None, *, highest: bool, overwrite: bool
    ) -> Hits | HitsFile:
        """The k highest or lowest scores of each query, streamed where ``out`` says so."""
        if out is not None:
            path = checked_out(out, "hits", overwrite=overwrite)
            stream_hits(self, queries, k, path, highest=highest, overwrite=overwrite)
            return HitsFile(path)
        k = checked_count(k, self.n_rows)
        features = self.sketch(queries)
        values, where = self.strongest_of(self.all_terms(features), len(features.ids), k, highest=highest)
        return make_hits(
            where, values, self.banks[0].ids, features.ids, self.unit, self.higher_is_better,
            self.shown(features), additive=self.additive,
        )  # fmt: skip

    def strongest_of(self, terms: list[Term], count: int, k: int, *, highest: bool) -> tuple[np.ndarray, np.ndarray]:
        """The k strongest scores of Q = count queries, and their rows, ``(Q, k)`` float32 and int64."""
        products = Products(terms, count, len(self.banks))
        return strongest_rows(products, self.banks[0], k, self.executor, highest=highest)
