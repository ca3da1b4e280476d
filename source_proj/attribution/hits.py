"""The strongest training examples of each query."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from torch import Tensor

from source_proj._errors import extra
from source_proj._io.equality import EqualByValue
from source_proj._io.html import tiles, wrapped
from source_proj._io.printable import drawn, printable
from source_proj.attribution.ranking import strongest
from source_proj.attribution.words import explained, id_word, measured, signed, toward
from source_proj.bank.examples import Example, Examples
from source_proj.task import Answers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Hit", "Hits", "Reranked", "Shown", "checked_count", "make_hits"]

_QUERIES = 5  # shown in a notebook or a terminal
_ENTRIES = 5
_BARE = (
    "training examples are named by their ids: to see them, set bank.examples = sp.Examples(train_set) before asking "
    "(on the command line --data MODULE:FUNCTION)"
)
_UNLIKE = (
    "training examples are named by their ids, as bank.examples are {} and the bank has {} (appended ones count): set "
    "bank.examples = sp.Examples(train_set) of as many before asking"
)


class Hit(NamedTuple):
    """A training example's id, and its score for a query."""

    id: Any
    score: float


@dataclass(frozen=True)
class Shown:
    """What is known of examples besides their ids.

    Attributes:
        train: how training examples are shown; None where the data set is not known.
        queries: how queries are shown; likewise.
        answers: what the model said of the queries, where it was asked about that.
        measurements: the queries' measurements ``(Q,)`` at the final weights, where they are known.
        unlike: how many training examples there were to be shown, and how many the bank has, where these differ and
            none is shown.
    """

    train: Examples | None = None
    queries: Examples | None = None
    answers: Answers | None = None
    measurements: Tensor | None = None
    unlike: tuple[int, int] | None = None

    def at(self, places: Sequence[int]) -> Shown:
        """The same of the queries at some places."""
        return Shown(
            self.train,
            None if self.queries is None else self.queries.at(places),
            None if self.answers is None else self.answers.at(places),
            None if self.measurements is None else self.measurements[list(places)],
            self.unlike,
        )

    def query(self, place: int, query_id: Any, unit: str) -> Example:
        """A query with what is known of it: what the model said, where it was asked about that, else its measurement.

        Args:
            place: of the query.
            query_id: its id.
            unit: of its measurement.
        """
        queries = self.queries
        known = queries is not None and place < len(queries)
        example = queries.show(place, query_id) if queries is not None and known else Example(query_id)
        if self.answers is not None:
            said = self.answers[place]
            return example.with_answer(said, str(said.value) if queries is None else queries.said(said.value))
        if self.measurements is None:
            return example
        return replace(example, measured=measured(float(self.measurements[place]), unit))


@dataclass(frozen=True, eq=False)
class Reranked(EqualByValue):
    """How hits were ordered by scores that whole gradients corrected.

    Attributes:
        candidates: M, the training examples whose whole gradients were made for each query.
        passes: backward passes of training examples that this took.
        recall: of each query, the share of its examples that are also among the bank's own, ``(Q,)`` float64.
    """

    candidates: int
    passes: int
    recall: np.ndarray

    def at(self, queries: slice) -> Reranked:
        """The same of some of the queries."""
        return replace(self, recall=self.recall[queries])

    def facts(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {"candidates": self.candidates, "passes": self.passes, "recall": self.recall.tolist()}

    def __str__(self) -> str:
        return (
            f"reranked among {self.candidates} by whole gradients ({self.passes} backward passes); recall of the "
            f"bank's own list {self.recall.mean():.2f}"
        )


@dataclass(frozen=True, eq=False)
class Hits(EqualByValue):
    """The strongest training examples of each query, best first.

    ``hits[q]`` lists the :class:`Hit` s of the query at place q, a slice takes several queries, and iteration yields
    ``(query id, hits)``.

    Attributes:
        ids: ids of the examples, Q lists of k entries.
        scores: their scores, ``(Q, k)`` float32.
        indices: their positions in the training set, ``(Q, k)`` int64.
        query_ids: ids of the queries, Q entries.
        unit: unit of the scores.
        higher_is_better: whether a rise of the measurement is an improvement; "helpful" follows it.
        shown: what else is known of the examples.
        reranked: how scores were corrected; None where they are the bank's.
        additive: whether scores are changes of the measurement, and no similarities.
    """

    ids: list[list[Any]]
    scores: np.ndarray
    indices: np.ndarray
    query_ids: list[Any]
    unit: str
    higher_is_better: bool = True
    shown: Shown = field(default=Shown(), repr=False, compare=False)
    reranked: Reranked | None = field(default=None, repr=False, compare=False)
    additive: bool = True

    def __iter__(self) -> Iterator[tuple[Any, list[Hit]]]:
        """Yield ``(query id, [(training id, score), ...])`` for each query."""
        for place, query_id in enumerate(self.query_ids):
            yield query_id, self[place]

    def __len__(self) -> int:
        return len(self.query_ids)

    @overload
    def __getitem__(self, query: int) -> list[Hit]: ...
    @overload
    def __getitem__(self, query: slice) -> Hits: ...
    def __getitem__(self, query: int | slice) -> list[Hit] | Hits:
        if isinstance(query, slice):
            return replace(
                self,
                ids=self.ids[query],
                scores=self.scores[query],
                indices=self.indices[query],
                query_ids=self.query_ids[query],
                shown=self.shown.at(range(len(self))[query]),
                reranked=None if self.reranked is None else self.reranked.at(query),
            )
        return [Hit(i, float(s)) for i, s in zip(self.ids[query], self.scores[query], strict=True)]

    @property
    def k(self) -> int:
        """Training examples of each query."""
        return int(self.scores.shape[1])

    def helpful(self, k: int | None = None) -> Hits:
        """Return, of these examples, the k (default: all) that improved each query's measurement most, in order."""
        return self._ordered(k, highest=self.higher_is_better)

    def harmful(self, k: int | None = None) -> Hits:
        """Return, of these examples, the k (default: all) that worsened each query's measurement most, in order."""
        return self._ordered(k, highest=not self.higher_is_better)

    def with_examples(self, train: Examples | None = None, queries: Examples | None = None) -> Hits:
        """The same with examples to show beside the scores, in notebooks and lines of text.

        Args:
            train: how training examples are shown, such as ``Examples(train_set, picture=(8, 8))``.
            queries: how queries are shown; default: as before, else not.
        """
        known = self.shown
        return replace(self, shown=replace(known, train=train or known.train, queries=queries or known.queries))

    def train_example(self, query: int, rank: int) -> Example:
        """The training example at a rank (from 0) of a query, with what is known of it."""
        train, index = self.shown.train, int(self.indices[query, rank])
        train_id = self.ids[query][rank]
        return Example(train_id) if train is None or index >= len(train) else train.show(index, train_id)

    def query_example(self, query: int) -> Example:
        """The query at a place, with what is known of it: see :meth:`Shown.query`."""
        return self.shown.query(query, self.query_ids[query], self.unit)

    def to_pandas(self, *, examples: bool = False) -> pd.DataFrame:
        """Return one line for each query and example: query_id, train_id, rank (from 1), score (``pandas`` extra).

        Args:
            examples: add what is known of the examples: whether each was "helpful" or "harmful", label and text (or
                numbers, or file) of both, what the model said of the query, and what was measured of it.
        """
        with extra("pandas"):
            import pandas as pd
        count = len(self)
        frame = pd.DataFrame(
            {
                "query_id": pd.Series([query_id for query_id in self.query_ids for _ in range(self.k)]),
                "train_id": pd.Series([train_id for ids in self.ids for train_id in ids]),
                "rank": np.tile(np.arange(1, self.k + 1), count),
                "score": self.scores.reshape(-1),
            }
        )
        return frame.assign(**self._told()) if examples else frame

    def _told(self) -> dict[str, list[Any]]:
        """Columns of what is known of queries and examples, those of nothing left out."""
        values = self.shown.measurements
        columns: dict[str, list[Any]] = defaultdict(list)
        read: dict[int, Example] = {}  # each once: of pictures that is work
        for query in range(len(self)):
            asked = self.query_example(query)
            for rank, hit in enumerate(self[query]):
                place = int(self.indices[query, rank])
                example = read[place] = read.get(place) or self.train_example(query, rank)
                columns["toward"].append(toward(hit.score, self.higher_is_better))
                columns["query_label"].append(asked.label)
                columns["query"].append(asked.words)
                columns["predicted"].append(asked.prediction or "")
                columns["measurement"].append("" if values is None else float(values[query]))
                columns["train_label"].append(example.label)
                columns["train"].append(example.words)
        return {name: column for name, column in columns.items() if any(entry != "" for entry in column)}

    def plot(self, query: int = 0, ax: Axes | None = None) -> Axes:
        """Draw the scores of one query's examples, by default the first one's, as bars (needs the ``plot`` extra)."""
        with extra("plot"):
            import matplotlib.pyplot as plt
        axes: Axes = plt.subplots(figsize=(5, 0.9 + 0.28 * self.k), layout="constrained")[1] if ax is None else ax
        values = self.scores[query]
        helps = (values > 0) == self.higher_is_better
        axes.barh(np.arange(self.k), values, color=np.where(helps, "#0b6e66", "#a83c0c"))
        names = [drawn(self._label(self.train_example(query, rank))) for rank in range(self.k)]
        axes.set_yticks(np.arange(self.k), names)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(drawn(f"score ({self.unit})"))
        axes.set_title(drawn(f"query {id_word(self.query_ids[query])}"))
        return axes

    def __repr__(self) -> str:
        queries = f"{len(self)} {'query' if len(self) == 1 else 'queries'}"
        meaning = f"including the example raised the {self.unit}" if self.additive else f"similarity ({self.unit})"
        return f"Hits({queries} x {self.k} training examples; +: {meaning})"

    def __str__(self) -> str:
        """The first queries and their examples, a line each."""
        lines = [explained(self.unit), *([] if self.reranked is None else [str(self.reranked)])]
        for query in range(min(len(self), _QUERIES)):
            lines += ["", *self.lines(query)]
        more = len(self) - _QUERIES
        if more > 0:
            lines += ["", f"… and {more} more {'query' if more == 1 else 'queries'}: to_pandas() has all"]
        lines += self.closing
        return "\n".join(lines)

    @property
    def closing(self) -> list[str]:
        """What to say below the lists where nothing is known of the training examples but their ids."""
        if not len(self) or self.shown.train is not None:
            return []
        return ["", _BARE if self.shown.unlike is None else _UNLIKE.format(*self.shown.unlike)]

    def lines(self, query: int, *, named: bool = True) -> Iterator[str]:
        """A query and its examples in words, a line each; made harmless for terminals.

        Args:
            query: place of the query.
            named: say of each example whether it is helpful or harmful.
        """
        asked = self.query_example(query)
        yield printable(f"query {_described(asked)}")
        for rank, hit in enumerate(self[query]):
            towards = toward(hit.score, self.higher_is_better)
            example = _described(self.train_example(query, rank))
            yield printable(f"{rank + 1:>4}  {signed(hit.score):>8}  {f'{towards:<8}  ' if named else ''}{example}")

    def _repr_html_(self) -> str:
        rows = []
        for query in range(min(len(self), _QUERIES)):
            asked = self.query_example(query)
            said = f", {asked.verdict}" if asked.verdict else ""
            contents = [(asked._repr_html_(), f"query {self._label(asked)}{said}")]
            for rank, hit in enumerate(self[query][:_ENTRIES]):
                example = self.train_example(query, rank)
                contents.append((example._repr_html_(), f"{signed(hit.score)}: {self._label(example)}"))
            rows.append(tiles(contents))
        left = f" The first {_QUERIES} queries:" if len(self) > _QUERIES else ""
        return wrapped(f"{self!r}.{left}", "".join(rows))

    def _label(self, example: Example) -> str:
        return printable(str(id_word(example.id))) + (f" (label {printable(example.label)})" if example.label else "")

    def _ordered(self, k: int | None, *, highest: bool) -> Hits:
        count = self.k if k is None else checked_count(k, self.k)
        order, scores = strongest(self.scores, count, highest=highest)
        return replace(
            self,
            ids=[[ids[place] for place in row] for ids, row in zip(self.ids, order, strict=True)],
            scores=scores,
            indices=np.take_along_axis(self.indices, order, axis=1),
        )


def _described(example: Example) -> str:
    """An example in one line: id, label, what the model said, and its text (first if that goes on), numbers or file."""
    said = [example.line, example.verdict] if example.continues else [example.verdict, example.line]
    parts = [str(id_word(example.id)), f"label {example.label}" if example.label else "", *said]
    return "  ".join(part for part in parts if part)


def checked_count(count: Any, most: int, name: str = "k") -> int:
    """Return how many training examples are wanted, as an int.

    Args:
        count: what the user gave; integers of NumPy and torch do.
        most: how many can be had.
        name: the user's name for it.

    Raises:
        TypeError: it is no integer.
        ValueError: it lies outside of 1..most.
    """
    try:
        wanted = operator.index(count)
    except TypeError:
        raise TypeError(f"{name} must be an integer, the number of training examples wanted, got {count!r}") from None
    if isinstance(count, bool) or not 1 <= wanted <= most:
        raise ValueError(f"{name} must lie in 1..{most} (training examples that can be taken), got {count!r}")
    return wanted


def make_hits(
    indices: np.ndarray,
    scores: np.ndarray,
    train_ids: Sequence[Any],
    query_ids: Sequence[Any],
    unit: str,
    higher_is_better: bool = True,
    shown: Shown | None = None,
    *,
    additive: bool = True,
) -> Hits:
    """Attach ids and unit to the positions ``(Q, k)`` and scores ``(Q, k)`` of the strongest examples."""
    ids = [[train_ids[i] for i in row] for row in indices]
    where, known = indices.astype(np.int64), shown or Shown()
    return Hits(ids, scores, where, list(query_ids), unit, higher_is_better, known, additive=additive)
