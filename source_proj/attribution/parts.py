"""Scores split into parts: over the segments of training, or over the tokens of training documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from source_proj._errors import extra
from source_proj._io.equality import EqualByValue
from source_proj._io.html import escape, table, wrapped
from source_proj._io.printable import printable
from source_proj.attribution.hits import Shown
from source_proj.attribution.population import Population
from source_proj.attribution.scores import Scores
from source_proj.attribution.words import id_word, signed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PartScores"]

_ROWS = 5  # examples shown of a query, in a notebook or a terminal
_QUERIES = 5  # shown in a terminal
_NAMED = 5  # parts of an example that are named in a line
_COLOURS = {True: "11,110,102", False: "190,70,15"}  # of what raised a measurement, and lowered it
_DEEPEST = 0.6  # opacity of the strongest token's colour: its letters must stay readable


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

    def tokens(self, train: int = 0) -> list[str] | None:
        """The tokens of a document in words, one for each of its positions.

        Args:
            train: place of the document.

        Returns:
            None where the parts are segments, or the words are not known: ``bank.examples = Examples(train_set,
            tokenizer=...)`` tells them.
        """
        known = self.shown.train
        if known is None or train >= len(known) or not all(isinstance(part, int) for part in self.parts):
            return None
        return known.tokens(train)

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

    def to_pandas(self, *, tokens: bool = False) -> pd.DataFrame:
        """Return one line for each query, example and part of it: query_id, train_id, part, score.

        Args:
            tokens: add each token in words.

        Raises:
            ValueError: the words of tokens are not known.
        """
        with extra("pandas"):
            import pandas as pd
        examples, parts = np.nonzero(self.present.T)
        queries = range(len(self.query_ids))
        scores = [self.values[parts, query, examples] for query in queries]
        frame = pd.DataFrame(
            {
                "query_id": pd.Series([self.query_ids[query] for query in queries for _ in examples]),
                "train_id": pd.Series([self.train_ids[example] for _ in queries for example in examples]),
                "part": [self.names[part] for _ in queries for part in parts],
                "score": np.concatenate([np.empty(0, self.values.dtype), *scores]),
            }
        )
        return frame.assign(token=self._spelled(examples, parts) * len(self.query_ids)) if tokens else frame

    def _spelled(self, examples: np.ndarray, parts: np.ndarray) -> list[str]:
        """The token of each part of an example, in words."""
        words = {example: self.tokens(example) for example in set(examples.tolist())}
        if any(known is None for known in words.values()):
            raise ValueError(
                "the words of these parts are not known: of by_token's documents, set bank.examples = "
                "sp.Examples(train_set, tokenizer=...) before asking"
            )
        return [str((words[example] or [])[part]) for example, part in zip(examples.tolist(), parts, strict=True)]

    def __str__(self) -> str:
        """The first queries, their most helpful examples, and the strongest parts of these."""
        lines, queries = [repr(self)], range(min(_QUERIES, len(self.query_ids)))
        hits = self.total().helpful(min(_ROWS, len(self.train_ids)))
        for query in queries:
            heading, *entries = hits.lines(query)
            lines += ["", heading]
            for entry, example in zip(entries, hits.indices[query], strict=True):
                lines += [entry, " " * 16 + printable(self._strongest(query, int(example)))]
        more = len(self.query_ids) - len(queries)
        return "\n".join([*lines, *([f"\n… and {more} more {'query' if more == 1 else 'queries'}"] if more else [])])

    def _strongest(self, query: int, example: int) -> str:
        """The strongest parts of an example in a line, with their scores."""
        own, words = np.flatnonzero(self.present[:, example]), self.tokens(example)
        order = own[np.argsort(-np.abs(self.values[own, query, example]), kind="stable")][:_NAMED]
        names = [self._name(part, words) for part in order.tolist()]
        scores = self.values[order, query, example]
        return ", ".join(f"{name} {signed(float(score))}" for name, score in zip(names, scores, strict=True))

    def _name(self, part: int, words: list[str] | None) -> str:
        if not isinstance(self.parts[part], int):
            return f"segment {self.names[part]}"
        return f"token {part}" if words is None else f"“{words[part].replace(chr(10), '↵').strip()}” ({part})"

    def _repr_html_(self) -> str:
        """The first query's strongest examples: a column for each of the first segments, or colours on the tokens."""
        hits = self.total().helpful(min(_ROWS, len(self.train_ids)))[:1]
        by_token = all(isinstance(part, int) for part in self.parts)
        names = () if by_token else self.names[:_ROWS]
        rows = []
        for rank, train_id in enumerate(hits.ids[0]):
            example = int(hits.indices[0, rank])
            shown = self._coloured(example) if by_token else None
            rows.append(
                [
                    escape(id_word(train_id)),
                    hits.train_example(0, rank)._repr_html_() if shown is None else shown,
                    escape(signed(float(hits.scores[0, rank]))),
                    *(escape(signed(float(value))) for value in self.values[: len(names), 0, example]),
                ]
            )
        title = f"{self!r}. Most helpful for query {id_word(self.query_ids[0])}:"
        asked = hits.query_example(0)._repr_html_()
        return wrapped(title, f"<div>{asked}</div>{table(['id', 'training example', 'score', *names], rows)}")

    def _coloured(self, example: int) -> str | None:
        """A document's tokens, each coloured by what it did to the first query; None where the words are not known."""
        words, values = self.tokens(example), self.values[:, 0, example]
        if words is None:
            return None
        largest, spans = float(np.abs(values).max()) or 1.0, []
        end = 1 + max(np.flatnonzero(self.present[:, example]).tolist(), default=-1)  # padding follows
        for word, value in zip(words[:end], values.tolist(), strict=False):
            colour = f"rgba({_COLOURS[value > 0]},{_DEEPEST * abs(value) / largest:.2f})"
            spans.append(f'<span style="background:{colour}" title="{escape(signed(value))}">{escape(word)}</span>')
        apart = "" if any(word != word.strip() for word in words) else " "  # some tokenizers keep no spaces
        return f'<span style="white-space:pre-wrap">{apart.join(spans)}</span>'
