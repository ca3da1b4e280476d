"""What every attribution method on a bank shares: checks, queries, streamed products, the strongest examples.

Each method's scores are a sum of terms, each the product of a query operand ``(Q, k)`` and a training operand
``(N, k)``. A method says what its terms are; this base class multiplies them block by block, so that no verb but
``score`` ever holds Q x N numbers, and averages over an ensemble of banks.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._errors import MismatchError
from source_proj._io.progress import Progress
from source_proj.attribution.hits import Hits, Shown, checked_count, make_hits
from source_proj.attribution.operands import Operand, aligned, picked
from source_proj.attribution.queries import QueryFeatures, resolve_task, sketch_queries
from source_proj.attribution.scores import Scores
from source_proj.bank import Bank
from source_proj.kernels.scoring import Strongest
from source_proj.task import Answers, Task
from source_proj.trajectory import Checkpoint

__all__ = ["Attributor", "Queries", "Term", "checked_rows"]

_BLOCK_SCORES = 8 << 20
"""Scores held at once while streaming (32 MiB of float32)."""

_MIN_ROWS = 256

Queries = Any
"""A data set, a DataLoader, inputs alone (a tensor, a tokenizer's output), or what ``sketch(queries)`` returned."""


class Term(NamedTuple):
    """One product of the sum: ``query`` ``(Q, k)`` times the training operand, streamed in order of rows."""

    query: Tensor
    train: Iterator[Operand]


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
        progress: show progress bars for what takes over two seconds; False for none, or a function of (description,
            done, total).

    Raises:
        MismatchError: if the banks' training ids differ, or the task is not the banks' own.
        BankError: if a bank is not finalized.
        ValueError: if rows were captured in training, and the method needs gradients at a checkpoint.
    """

    additive = True
    """Whether scores are changes of the measurement."""

    takes_captured = False
    """Whether rows captured over a segment of training will do, and not only gradients at a checkpoint."""

    def __init__(
        self,
        bank: Bank | Sequence[Bank],
        *,
        model: nn.Module | None = None,
        task: Task | None = None,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        progress: Progress = True,
    ) -> None:
        self.banks = tuple(bank) if isinstance(bank, Sequence) else (bank,)
        if not self.banks:
            raise ValueError("got an empty list of banks; give at least one")
        for member in self.banks:
            member.require_finalized()
            if member.captured and not self.takes_captured:
                raise ValueError(
                    f"{type(self).__name__} needs gradients at a checkpoint, and the rows of {member.path} were "
                    "captured over whole segments of training: take Source or Hydra, or build the bank from checkpoints"
                )
            if member.ids != self.banks[0].ids:
                raise MismatchError(
                    f"the banks {self.banks[0].path} and {member.path} hold different training ids; "
                    "an ensemble averages runs on one training set"
                )
            if member.task_spec != self.banks[0].task_spec:
                raise MismatchError(
                    "the banks of an ensemble measure different things: "
                    f"{self.banks[0].task_spec} and {member.task_spec}"
                )
        self.model = model
        if task is not None:
            resolve_task(self.banks[0], task)
        self._given_task = task
        self.batch_size = batch_size
        self.device = device
        self.progress = progress

    # The verbs ------------------------------------------------------------------------------------------------

    def score(self, queries: Queries) -> Scores:
        """Score every training example for every query.

        Args:
            queries: dataset or DataLoader of queries, or what :meth:`sketch` returned. Inputs without targets are asked
                about what the model itself says of them, where the task can tell (see :class:`Classification`).

        Returns:
            Scores ``(Q, N)``: the change of the query's measurement that including the example made.
        """
        features = self.sketch(queries)
        values = torch.zeros(len(features[0]), self.n_rows)
        for start, stop, block in self._blocks(features):
            values[:, start:stop] = block
        return self._scores(values.numpy(), features[0])

    def score_rows(self, queries: Queries, rows: Sequence[int]) -> np.ndarray:
        """Score a few training examples for every query: whom they helped and harmed, without Q x N numbers.

        Args:
            queries: as for :meth:`score`.
            rows: positions of the training examples, n of them.

        Returns:
            ``(Q, n)`` float32, what :meth:`score` gives at these columns.

        Raises:
            ValueError: there is no training example at one of the positions.
        """
        features = self.sketch(queries)
        wanted, order = checked_rows(rows, self.n_rows)
        values = torch.zeros(len(features[0]), len(wanted))
        terms = self._all_terms(features)
        for start, stop, active in aligned([picked(term.train, wanted) for term in terms], _height(features)):
            values[:, start:stop] = self._block(terms, active).cpu()
        return values[:, order].numpy()

    def top_k(self, queries: Queries, k: int) -> Hits:
        """Return the k highest scores of each query, without ever holding Q x N numbers."""
        return self._strongest(queries, k, highest=True)

    def bottom_k(self, queries: Queries, k: int) -> Hits:
        """Return the k lowest scores of each query, lowest first, without ever holding Q x N numbers."""
        return self._strongest(queries, k, highest=False)

    def helpful(self, queries: Queries, k: int) -> Hits:
        """Return the k examples that improve each query's measurement most, following the task's own sense."""
        return self._strongest(queries, k, highest=self.task.higher_is_better)

    def harmful(self, queries: Queries, k: int) -> Hits:
        """Return the k examples that worsen each query's measurement most, following the task's own sense."""
        return self._strongest(queries, k, highest=not self.task.higher_is_better)

    def sketch(self, queries: Queries) -> list[QueryFeatures]:
        """Compute the queries' features, one entry per bank; every verb takes them in place of the data.

        Raises:
            ValueError: if data are given but no model was.
            MismatchError: if given features belong to other banks.
        """
        if isinstance(queries, QueryFeatures):
            queries = [queries]
        if isinstance(queries, list) and queries and all(isinstance(given, QueryFeatures) for given in queries):
            return self._checked(queries)
        features: list[QueryFeatures] = []
        for bank in self.banks:
            answers = features[0].answers if features else None  # the runs of an ensemble are asked the same
            points, metrics = self._query_points(bank), self._query_metrics(bank)
            features.append(self._sketch(bank, queries, points, metrics, answers))
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

    def _combine(self, products: list[Tensor], operands: list[Operand]) -> Tensor:  # noqa: ARG002
        """Combine all terms' products ``(Q, n)`` of a block: the sum, averaged over the banks.

        Where there is one bank, one term and no weights this must be the product itself: the search for the strongest
        then takes it without making it.
        """
        total = products[0]
        for product in products[1:]:
            total += product
        return total if len(self.banks) == 1 else total.div_(len(self.banks))

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

    # Inside ----------------------------------------------------------------------------------------------------

    def _shown(self, features: QueryFeatures | None = None) -> Shown:
        """What is known of the examples besides their ids."""
        train = self.banks[0].examples
        if train is not None and len(train) != self.n_rows:  # rows were appended since
            train = None
        return Shown(train) if features is None else Shown(train, features.examples, features.answers)

    def _scores(self, values: np.ndarray, features: QueryFeatures) -> Scores:
        return Scores(
            values,
            features.ids,
            self.banks[0].ids,
            unit=self.unit,
            higher_is_better=self.task.higher_is_better,
            stage_sizes=[stage.n for stage in self.banks[0].stages],
            additive=self.additive,
            shown=self._shown(features),
        )

    def _checked(self, features: list[QueryFeatures]) -> list[QueryFeatures]:
        if len(features) != len(self.banks):
            raise MismatchError(f"got features for {len(features)} banks, and this method averages {len(self.banks)}")
        for bank, queried in zip(self.banks, features, strict=True):
            if queried.sketch != bank.sketch.spec():
                raise MismatchError(f"features of sketch {queried.sketch} do not fit the bank's {bank.sketch.spec()}")
        return features

    def _sketch(
        self,
        bank: Bank,
        queries: Any,
        checkpoints: Sequence[Checkpoint],
        metrics: Sequence[int],
        answers: Answers | None = None,
    ) -> QueryFeatures:
        """Differentiate queries given as data, by the model that was given."""
        if self.model is None:
            raise ValueError("scoring queries given as data needs the model: pass model= when constructing")
        return sketch_queries(
            bank,
            self.model,
            self.task,
            queries,
            checkpoints=checkpoints,
            metrics=metrics,
            batch_size=self.batch_size,
            device=self.device,
            progress=self.progress,
            answers=answers,
        )

    def _blocks(self, features: list[QueryFeatures]) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ``(start, stop, scores (Q, stop - start))`` over all rows, in order."""
        terms = self._all_terms(features)
        for start, stop, active in aligned([term.train for term in terms], _height(features)):
            yield start, stop, self._block(terms, active).cpu()

    def _all_terms(self, features: list[QueryFeatures]) -> list[Term]:
        return [term for bank, queried in zip(self.banks, features, strict=True) for term in self._terms(bank, queried)]

    def _block(self, terms: list[Term], active: list[tuple[int, Operand]]) -> Tensor:
        """Scores ``(Q, n)`` of the rows that some terms' operands share."""
        products = [its.codec.multiply(terms[index].query, its.rows, its.scale) for index, its in active]
        return self._combine(products, [operand for _, operand in active])

    def _strongest(self, queries: Queries, k: int, *, highest: bool) -> Hits:
        k = checked_count(k, self.n_rows)
        features = self.sketch(queries)
        terms, count = self._all_terms(features), len(features[0])
        device = terms[0].query.device
        best, done = Strongest(count, k, largest=highest, device=device), 0

        def pass_over(stop: int) -> None:
            """Rows that no term covers score 0; of equal scores only the first k can be among the strongest."""
            if stop > done:
                best.add_scores(torch.zeros(count, min(k, stop - done), device=device), first=done)

        for start, stop, active in aligned([term.train for term in terms], _height(features)):
            pass_over(start)
            index, operand = active[0]
            if len(self.banks) == len(active) == 1 and operand.weights is None:
                operand.codec.search(best, terms[index].query, operand.rows, operand.scale, first=start)
            else:
                best.add_scores(self._block(terms, active), first=start)
            done = stop
        pass_over(self.n_rows)
        values, where = (result.cpu().numpy() for result in best.result())
        return make_hits(
            where, values, self.banks[0].ids, features[0].ids, self.unit, self.task.higher_is_better,
            self._shown(features[0]),
        )  # fmt: skip


def checked_rows(rows: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
    """Positions of training examples ``(m,)`` once each and ascending, and where each of those given stands among them.

    Raises:
        ValueError: one lies outside of 0..n-1.
    """
    given = torch.as_tensor([operator.index(row) for row in rows], dtype=torch.int64)
    outside = given[(given < 0) | (given >= n)].tolist()
    if outside:
        raise ValueError(f"rows are positions among the {n} training examples, 0..{n - 1}, got {outside[:5]}")
    return torch.unique(given, return_inverse=True)


def _height(features: list[QueryFeatures]) -> int:
    """Rows whose scores are held at once."""
    return max(_MIN_ROWS, _BLOCK_SCORES // max(1, len(features[0])))
