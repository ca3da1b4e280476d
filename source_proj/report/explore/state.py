"""What the page asks for: lists of examples, the strongest of each, and their parts, as plain values."""

import json
import tempfile
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Subset

from source_proj._io.printable import SPELLING, csv_cell, printable
from source_proj.attribution.attributor import Attributor, Queries
from source_proj.attribution.features import SketchedQueries
from source_proj.attribution.source import Source
from source_proj.attribution.words import explained, id_word, plain_id, signed
from source_proj.bank.examples import Example
from source_proj.curate import Cleaning
from source_proj.report.explore.index import ExampleIndex

__all__ = ["PAGE", "Explorer", "Kind", "Sense"]

Kind = Literal["queries", "train"]
Sense = Literal["helpful", "harmful"]

PAGE = 24
"""Entries of a list of the strongest that are shown at a time."""

_SPAN = 200  # examples that a list is given at a time


class Explorer:
    """A method, its queries' features and how examples are shown: all that the page can ask, and nothing that writes.

    Args:
        method: the attribution method.
        queries: data, or the features that ``method.sketch`` returned.
        title: heading of the page.
        file: the training set's file, of which a cleaned copy can be had.
        documents: the training set as the model reads it, for the parts of single tokens; None for none.

    Raises:
        ValueError: as ``method.sketch``.
    """

    def __init__(
        self,
        method: Attributor,
        queries: Queries,
        *,
        title: str = "Which training examples made the model say this?",
        file: Path | None = None,
        documents: Any = None,
    ) -> None:
        self.method, self.title, self.file = method, title, file
        self._documents = documents
        self._features = method.sketch(queries)
        self._asked = method.shown(self._features)
        bank, first = method.banks[0], self._features[0]
        self._stages = [stage.name for stage in bank.stages]
        self._index: dict[str, ExampleIndex] = {
            "queries": ExampleIndex(first.ids, first.examples, [len(first)]),
            "train": ExampleIndex(bank.ids, self._asked.train, [stage.n for stage in bank.stages]),
        }
        self._engine = threading.Lock()  # one pass over the bank at a time, so that memory does not grow with readers
        self._strongest = lru_cache(maxsize=64)(self._computed_strongest)
        self._column = lru_cache(maxsize=256)(self._computed_column)

    def facts(self) -> dict[str, Any]:
        """What the page says above its lists."""
        method = self.method
        segments = [segment.name for segment in method.segments] if isinstance(method, Source) else []
        return {
            "title": printable(self.title),
            "unit": method.unit,
            "unit_in_words": explained(method.unit),
            "higher_is_better": method.higher_is_better,
            "method": type(method).__name__,
            "queries": len(self._index["queries"]),
            "train": len(self._index["train"]),
            "stages": [printable(name) for name in self._stages],
            "segments": [printable(name) for name in segments],
            "tokens": self._documents is not None,
            "cleans": self.file is not None and len(self._stages) == 1,
        }

    def labels(self, kind: Kind) -> list[str]:
        """The labels of a kind's examples; reads them all when first asked, which the page does not wait for."""
        return self._index[kind].labels

    def listed(
        self, kind: Kind, words: str = "", label: str = "", stage: int | None = None, start: int = 0, count: int = 50
    ) -> dict[str, Any]:
        """The examples of a kind that hold words, have a label and are of a stage: how many, and some of them.

        While they are read for the first time, those found so far, and the share of all that was looked at ("read").

        Raises:
            ValueError: start or count is out of range.
        """
        if start < 0 or not 0 <= count <= _SPAN:
            raise ValueError(f"start must be at least 0 and count 0..{_SPAN}, got {start} and {count}")
        found = self._index[kind].search(words, label, stage, start + count)
        examples = [self.example(kind, place) for place in found.places[start : start + count]]
        for index in self._index.values():  # the first list is there: what is searched next is read meanwhile
            index.begin()
        return {"total": len(found.places), "read": found.read, "examples": examples}

    def example(self, kind: Kind, place: int) -> dict[str, Any]:
        """One example as the page shows it.

        Raises:
            IndexError: there is none at this place.
        """
        index = self._index[kind]
        if not 0 <= place < len(index):
            raise IndexError(f"there is no example {place} among {len(index)}")
        known, its_id = index.examples, index.ids[place]
        if kind == "queries":
            return _told(self._asked.query(place, its_id, self.method.unit), place)
        return _told(Example(its_id) if known is None or place >= len(known) else known.show(place, its_id), place)

    def strongest(self, kind: Kind, place: int, sense: Sense, page: int = 0) -> dict[str, Any]:
        """A page of the training examples that mattered most to a query, or of the queries that one mattered most to.

        Raises:
            IndexError: there is no such example, or no such page.
        """
        self.example(kind, place)
        other: Kind = "train" if kind == "queries" else "queries"
        if not 0 <= page * PAGE < len(self._index[other]):
            raise IndexError(f"there is no page {page} of {len(self._index[other])} examples")
        pages = 1 << page.bit_length()  # so that going on does not search anew for each page
        places, scores, parts = (self._strongest if kind == "queries" else self._column)(place, sense, pages)
        shown = slice(page * PAGE, (page + 1) * PAGE)
        entries = []
        for its_place, score, own in zip(places[shown], scores[shown], parts[shown], strict=True):
            if score == 0 or (score > 0) != (self.method.higher_is_better == (sense == "helpful")):
                break
            told = {"score": float(score), "signed": signed(float(score), minus="−"), "parts": own.tolist()}
            entries.append({"example": self.example(other, int(its_place)), **told})
        more = len(entries) == PAGE and (page + 1) * PAGE < len(self._index[other])
        return {"hits": entries, "more": more}

    def tokens(self, query: int, place: int) -> list[dict[str, Any]]:
        """What each token of a training example did to a query: its text, its score, and that relative to the largest.

        Raises:
            ValueError: tokens have no scores here.
            IndexError: there is no such query or example.
        """
        if self._documents is None or not isinstance(self.method, Source):
            raise ValueError("single tokens have scores only in a language model's bank that was built from a text")
        self.example("queries", query)
        self.example("train", place)
        stage = int(np.searchsorted(np.cumsum([s.n for s in self.method.banks[0].stages]), place, side="right"))
        with self._engine:
            parts = self.method.by_token(self._only(query), Subset(self._documents, [place]), stage=stage)
        values = parts.values[:, 0, 0]
        largest = float(np.abs(values).max()) or 1.0
        words = parts.tokens() or list(map(str, self._documents[place]["input_ids"].tolist()))
        return [
            {
                "text": printable(word, keep=SPELLING),
                "score": float(value),
                "share": float(value) / largest,
            }
            for word, value in zip(words, values, strict=False)
        ]

    def cleaned(self, places: Iterable[int]) -> tuple[str, bytes]:
        """Name and content of the training set's file without some examples; see :meth:`Cleaning.write`.

        Raises:
            ValueError: the file is not known, or is of several stages; or there is no such example.
            MismatchError: the file has another number of records.
        """
        if self.file is None or len(self._stages) > 1:
            raise ValueError("the training set's file is not known: give --file, or export the ids")
        ids, chosen = self._index["train"].ids, list(dict.fromkeys(places))
        if any(not 0 <= place < len(ids) for place in chosen):
            raise ValueError(f"examples are named by their places, 0..{len(ids) - 1}, got {chosen[:5]}")
        reasons = ["chosen by hand"] * len(chosen)
        cleaning = Cleaning("by hand", [ids[place] for place in chosen], reasons, {}, list(ids))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / f"cleaned{self.file.suffix}"
            cleaning.write(self.file, out)
            return out.name, out.read_bytes()

    def _only(self, query: int) -> SketchedQueries:
        return self._features.part(query, query + 1)

    def _computed_strongest(self, query: int, sense: Sense, pages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places, scores ``(k,)`` and parts ``(k, L)`` of a query's strongest training examples."""
        features, k = self._only(query), min(pages * PAGE, self.method.n_rows)
        with self._engine:
            hits = (self.method.helpful if sense == "helpful" else self.method.harmful)(features, k)
            places, scores = hits.indices[0], hits.scores[0]
            return places, scores, self._parts(features, places.tolist())[:, 0].T

    def _computed_column(self, place: int, sense: Sense, pages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places, scores ``(Q,)`` and parts ``(Q, L)`` of all queries for a training example, the strongest first."""
        with self._engine:
            scores = self.method.score_rows(self._features, [place])[:, 0]
            highest = self.method.higher_is_better == (sense == "helpful")
            order = np.argsort(-scores if highest else scores, kind="stable")[: pages * PAGE]
            return order, scores[order], self._parts(self._features, [place])[:, order, 0].T

    def _parts(self, features: SketchedQueries, rows: Sequence[int]) -> np.ndarray:
        """Parts by segment ``(L, Q, n)``; of a method without segments, none."""
        if isinstance(self.method, Source):
            return self.method.by_segment(features, rows).values
        return np.zeros((0, len(features.ids), len(rows)), dtype=np.float32)


def _told(example: Example, place: int) -> dict[str, Any]:
    """An example as JSON, its strange characters as escapes; what is not known of it is left out."""
    word = printable(str(id_word(example.id)))
    told = {
        "text": None if example.text is None else printable(example.text, keep=SPELLING),
        "image": example.image,
        "row": [[printable(name), value] for name, value in example.row] or None,
        "file": None if example.file is None else printable(example.file),
        "label": printable(example.label) or None,
        "pixelated": example.pixelated or None,
        "verdict": printable(example.verdict) or None,
    }
    known = {name: value for name, value in told.items() if value is not None}
    own = plain_id(example.id)
    written = json.dumps(own)  # for files: a browser's own numbers are exact to 2**53 alone
    return {"place": place, "id": own, "json": written, "word": word, "cell": csv_cell(word), **known}
