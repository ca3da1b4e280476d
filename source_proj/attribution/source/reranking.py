"""The verbs that list the strongest training examples, with scores that may be corrected by whole gradients."""

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from source_proj.attribution.attributor import Attributor, Queries
from source_proj.attribution.features import QueryFeatures, SketchedQueries
from source_proj.attribution.full_gradients import TrainingGradients, training_parts
from source_proj.attribution.hits import Hits, Reranked, checked_count, make_hits
from source_proj.attribution.hits_file import HitsFile
from source_proj.attribution.queries import sketch_queries
from source_proj.attribution.query_models import QueryModels
from source_proj.attribution.source.fitted_segments import FittedSegments
from source_proj.attribution.source.rerank import SketchedQuery, segment_corrections
from source_proj.bank import Bank
from source_proj.gradients import ParameterSpace
from source_proj.sketch import plain_modes

__all__ = ["Reranking"]


class _Ordered(NamedTuple):
    """The k strongest by corrected scores: values and places ``(Q, k)``, and the recall of the bank's own ``(Q,)``."""

    values: np.ndarray
    places: np.ndarray
    recall: np.ndarray


def _wanted(k: int, rerank: int) -> int:
    """How many of M candidates are of the wanted end."""
    return max(k, (rerank + 1) // 2)


def _ordered(corrected: np.ndarray, places: np.ndarray, k: int, highest: bool) -> _Ordered:
    """Order candidates ``(Q, m)``, which come in the bank's order; of equal scores the lower place is the stronger."""
    order = np.lexsort((places, -corrected if highest else corrected), axis=1)[:, :k]
    values, chosen = (np.take_along_axis(array, order, axis=1) for array in (corrected, places))
    return _Ordered(values, chosen, (order < k).mean(axis=1))


class Reranking(Attributor):
    """What :class:`Source` lists, and in which order."""

    memory: int

    @abstractmethod
    def _of(self, bank: Bank) -> FittedSegments:
        """The bank's fitted segments."""

    @abstractmethod
    def _moved(self, fitted: FittedSegments, features: QueryFeatures) -> list[Tensor]:
        """Queries as the segments' training gradients meet them."""

    @overload
    def top_k(
        self,
        queries: Queries,
        k: int,
        out: None = ...,
        *,
        overwrite: bool = ...,
        rerank: int | None = ...,
        train: Any = ...,
    ) -> Hits: ...
    @overload
    def top_k(self, queries: Queries, k: int, out: str | Path, *, overwrite: bool = ...) -> HitsFile: ...
    def top_k(
        self, queries: Queries, k: int, out: str | Path | None = None, *, overwrite: bool = False,
        rerank: int | None = None, train: Any = None,
    ) -> Hits | HitsFile:  # fmt: skip
        """Return the k highest scores of each query, without ever holding Q x N numbers.

        **Reranking.** With ``rerank=M`` the bank's scores choose M training examples of each query, whose gradients are
        then made anew and whole: half of M (at least k) are the highest, and are ordered by their corrected scores; the
        others are the lowest, which carry as much of the query. `source_proj.attribution.source.rerank` says how scores
        are corrected.

        Cost: two backward passes for each of the chosen examples and each checkpoint of their stage (examples that
        several queries share count once in a block of queries), one for each query and checkpoint where queries are
        differentiated, and memory for two whole gradients a query of a block, which fit into half of ``memory``.
        ``hits.reranked`` says how many passes there were, and the recall of the bank's own list.

        Args:
            queries: as for :meth:`score`; data, and not features, where scores are reranked.
            k: training examples of each query.
            out: as for :meth:`Attributor.top_k`; not with ``rerank``.
            overwrite: replace hits that are there.
            rerank: M, from k to the number of training examples; None: the bank's scores as they are.
            train: what the bank was built from, of several stages a mapping from their names; default: the data set
                that the bank knows (``bank.examples``). Read where scores are reranked.

        Raises:
            ValueError: k or M is out of range, or what reranking needs is missing; says what to pass.
            MismatchError: ``train`` is not what the bank was built from.
        """
        return self._ordered_anew(queries, k, out, True, overwrite, rerank, train)

    @overload
    def bottom_k(
        self,
        queries: Queries,
        k: int,
        out: None = ...,
        *,
        overwrite: bool = ...,
        rerank: int | None = ...,
        train: Any = ...,
    ) -> Hits: ...
    @overload
    def bottom_k(self, queries: Queries, k: int, out: str | Path, *, overwrite: bool = ...) -> HitsFile: ...
    def bottom_k(
        self, queries: Queries, k: int, out: str | Path | None = None, *, overwrite: bool = False,
        rerank: int | None = None, train: Any = None,
    ) -> Hits | HitsFile:  # fmt: skip
        """Return the k lowest scores of each query, lowest first; arguments as for :meth:`top_k`."""
        return self._ordered_anew(queries, k, out, False, overwrite, rerank, train)

    @overload
    def helpful(
        self,
        queries: Queries,
        k: int,
        out: None = ...,
        *,
        overwrite: bool = ...,
        rerank: int | None = ...,
        train: Any = ...,
    ) -> Hits: ...
    @overload
    def helpful(self, queries: Queries, k: int, out: str | Path, *, overwrite: bool = ...) -> HitsFile: ...
    def helpful(
        self, queries: Queries, k: int, out: str | Path | None = None, *, overwrite: bool = False,
        rerank: int | None = None, train: Any = None,
    ) -> Hits | HitsFile:  # fmt: skip
        """Return the k examples that improve each query most, in the task's own sense; see :meth:`top_k`."""
        return self._ordered_anew(queries, k, out, self.task.higher_is_better, overwrite, rerank, train)

    @overload
    def harmful(
        self,
        queries: Queries,
        k: int,
        out: None = ...,
        *,
        overwrite: bool = ...,
        rerank: int | None = ...,
        train: Any = ...,
    ) -> Hits: ...
    @overload
    def harmful(self, queries: Queries, k: int, out: str | Path, *, overwrite: bool = ...) -> HitsFile: ...
    def harmful(
        self, queries: Queries, k: int, out: str | Path | None = None, *, overwrite: bool = False,
        rerank: int | None = None, train: Any = None,
    ) -> Hits | HitsFile:  # fmt: skip
        """Return the k examples that worsen each query most, in the task's own sense; see :meth:`top_k`."""
        return self._ordered_anew(queries, k, out, not self.task.higher_is_better, overwrite, rerank, train)

    @plain_modes()
    def _ordered_anew(
        self,
        queries: Queries,
        k: int,
        out: str | Path | None,
        highest: bool,
        overwrite: bool,
        rerank: int | None,
        train: Any,
    ) -> Hits | HitsFile:
        if rerank is None:
            if train is not None:
                raise ValueError("train= is read where scores are reranked: give rerank= too, or leave train= out")
            return self._listed(queries, k, out, highest=highest, overwrite=overwrite)
        if out is not None:
            raise ValueError(f"reranked hits are not streamed to out={str(out)!r}: leave out= or rerank= out")
        k, models = checked_count(k, self.n_rows), self._require_rerankable(queries, rerank, k)
        parts = training_parts(self.banks[0], train)
        features = self.sketch(queries)
        values, places = self._chosen(features, k, rerank, highest)
        corrected = torch.from_numpy(values).double()
        gradients = [
            TrainingGradients(bank, models, self.task, parts, self.batch_size, self.progress) for bank in self.banks
        ]
        for bank, queried, read in zip(self.banks, features, gradients, strict=True):
            for start, stop in self._query_spans(bank, len(features.ids)):
                part = queried.only(range(start, stop))
                corrected[start:stop] += self._corrections(
                    bank, part, queries, (start, stop), torch.from_numpy(places[start:stop]), models, read
                ) / len(self.banks)
        wanted = _wanted(k, rerank)
        hits = _ordered(corrected[:, :wanted].float().numpy(), places[:, :wanted], k, highest)
        count = sum(read.count for read in gradients)
        return replace(
            make_hits(
                hits.places, hits.values, self.banks[0].ids, features.ids, self.unit, self.task.higher_is_better,
                self.shown(features),
            ),
            reranked=Reranked(rerank, count, hits.recall),
        )  # fmt: skip

    def _require_rerankable(self, queries: Queries, rerank: int, k: int) -> QueryModels:
        """The models to differentiate, where scores can be reranked."""
        if not k <= checked_count(rerank, self.n_rows, "rerank"):
            raise ValueError(f"rerank={rerank} is fewer than the k={k} examples wanted of each query: give at least k")
        captured = [bank.path for bank in self.banks if bank.captured]
        if captured:
            raise ValueError(
                f"the rows of {captured[0]} are of whole segments of training, where no one gradient is theirs: leave "
                "rerank= out, or take a bank that was built of checkpoints"
            )
        if self._models is None:
            raise ValueError(
                "rerank= differentiates examples anew, which needs the model: pass model= when constructing"
            )
        if self._given(queries) is not None:
            raise ValueError("rerank= needs whole gradients of the queries: give them as data, not as features")
        return self._models

    def _chosen(self, features: SketchedQueries, k: int, rerank: int, highest: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places ``(Q, M)`` of the strongest by the bank, those of the wanted end first and in order."""
        count, terms, wanted = len(features.ids), self.all_terms(features), _wanted(k, rerank)
        values, places = self.strongest_of(terms, count, wanted, highest=highest)
        if rerank > wanted:
            others = self.strongest_of(terms, count, rerank - wanted, highest=not highest)
            values, places = (np.concatenate(pair, axis=1) for pair in zip((values, places), others, strict=True))
        return values, places

    def _query_spans(self, bank: Bank, count: int) -> list[tuple[int, int]]:
        """Blocks of queries whose whole gradients, in every metric and combined, fit into half of the memory."""
        width = 4 * ParameterSpace.from_spec(bank.space_spec).size * (1 + len(bank.metrics))
        size = max(1, self.memory // (2 * width))
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def _corrections(
        self,
        bank: Bank,
        features: QueryFeatures,
        queries: Queries,
        span: tuple[int, int],
        places: Tensor,
        models: QueryModels,
        gradients: TrainingGradients,
    ) -> Tensor:
        """What is to be added to one run's scores of a block of queries, ``(Q, M)`` float64."""
        fitted = self._of(bank)
        metrics = sorted({segment.metric for segment in fitted.segments})
        whole = self._whole_queries(bank, models, queries, span, features, metrics)
        total = torch.zeros(places.shape, dtype=torch.float64, device="cpu")
        for segment, moved in zip(fitted.segments, self._moved(fitted, features), strict=True):
            rows = self._query(bank, features, segment.metric)
            queried = SketchedQuery(rows, moved, whole[segment.metric])
            total += segment_corrections(fitted, segment, queried, places, gradients)
        return total

    def _whole_queries(
        self,
        bank: Bank,
        models: QueryModels,
        queries: Queries,
        span: tuple[int, int],
        features: QueryFeatures,
        metrics: list[int],
    ) -> dict[int, Tensor]:
        """q̃ ``(Q, d)`` by metric, the mean over the checkpoints where queries are differentiated."""
        points, totals = self._query_points(bank), dict[int, Tensor]()
        for point in points:
            made = sketch_queries(
                bank, models, self.task, queries, checkpoints=[point], metrics=metrics, span=span,
                batch_size=self.batch_size, progress=self.progress, answers=features.answers, exact=True,
            )  # fmt: skip
            for metric in metrics:
                rows = made.at(point, bank.metrics.hash(metric)) / len(points)
                totals[metric] = totals[metric] + rows if metric in totals else rows
        return totals
