"""Scores split into parts: over the segments of training, or over the tokens of training documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from source_proj._errors import extra
from source_proj._io.equality import EqualByValue
from source_proj._io.html import escape, table, wrapped
from source_proj.attribution.hits import Shown
from source_proj.attribution.population import Population
from source_proj.attribution.scores import Scores
from source_proj.attribution.words import id_word, signed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PartScores"]

_ROWS = 5  # examples shown in a notebook


@dataclass(frozen=True, eq=False)
class PartScores(EqualByValue):
    """The parts of each score: by segment of training (who mattered when), or by token (which words mattered).

    Attributes:
        values: ``(P, Q, N)`` float32; their sum over the parts is the score. What an example has no part in (segments
            of other stages, tokens that do not count) is 0.
        parts: what the P parts are: segments, or positions of tokens.
        query_ids: Q ids.
        train_ids: N ids.
        unit: unit of the measurement.
        higher_is_better: whether a rise of the measurement is an improvement.
        present: ``(P, N)`` bool, which parts an example has.
        shown: what else is known of the examples.
        population: which training examples the N columns are, of which stages; None: all of one stage.
    """

    values: np.ndarray
    parts: tuple[Any, ...]
    query_ids: list[Any]
    train_ids: list[Any]
    unit: str
    higher_is_better: bool
    present: np.ndarray
    shown: Shown = field(default=Shown(), repr=False, compare=False)
    population: Population | None = field(default=None, repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The parts in words."""
        return tuple(str(getattr(part, "name", part)) for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(P, Q, N)``."""
        return self.values.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        parts, queries, rows = self.shape
        counted = f"{parts} {'part' if parts == 1 else 'parts'} x {queries} {'query' if queries == 1 else 'queries'}"
        return f"PartScores({counted} x {rows} training examples, in the {self.unit})"

    def total(self) -> Scores:
        """Sum over the parts: the scores ``(Q, N)``."""
        return Scores(
            self.values.sum(axis=0),
            self.query_ids,
            self.train_ids,
            unit=self.unit,
            higher_is_better=self.higher_is_better,
            shown=self.shown,
            population=self.population,
        )

    def to_numpy(self) -> np.ndarray:
        """Return the values, ``(P, Q, N)`` float32."""
        return self.values

    def to_pandas(self) -> pd.DataFrame:
        """Return one line for each query, example and part of it: query_id, train_id, part, score."""
        with extra("pandas"):
            import pandas as pd
        examples, parts = np.nonzero(self.present.T)
        queries = range(len(self.query_ids))
        scores = [self.values[parts, query, examples] for query in queries]
        return pd.DataFrame(
            {
                "query_id": pd.Series([self.query_ids[query] for query in queries for _ in examples]),
                "train_id": pd.Series([self.train_ids[example] for _ in queries for example in examples]),
                "part": [self.names[part] for _ in queries for part in parts],
                "score": np.concatenate([np.empty(0, self.values.dtype), *scores]),
            }
        )

    def _repr_html_(self) -> str:
        """The first query's strongest examples, a column for each of the first parts."""
        hits = self.total().helpful(min(_ROWS, len(self.train_ids)))[:1]
        names = self.names[:_ROWS]
        rows = [
            [
                escape(id_word(train_id)),
                hits.train_example(0, rank)._repr_html_(),
                escape(signed(float(hits.scores[0, rank]))),
                *(escape(signed(float(value))) for value in self.values[: len(names), 0, hits.indices[0, rank]]),
            ]
            for rank, train_id in enumerate(hits.ids[0])
        ]
        title = f"{self!r}. Most helpful for query {id_word(self.query_ids[0])}:"
        return wrapped(title, table(["id", "training example", "score", *names], rows))
