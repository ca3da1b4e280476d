"""Search among the examples of a data set: which of them hold some words, and have a label."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from source_proj._io.printable import printable
from source_proj.attribution.words import id_word
from source_proj.bank.examples import Examples

__all__ = ["ExampleIndex"]


class ExampleIndex:
    """Texts, labels and ids of examples, read once, when somebody first searches them.

    Args:
        ids: their ids.
        examples: how they are shown; None where only their ids are known.
        stage_sizes: how many examples each stage has.
    """

    def __init__(self, ids: Sequence[Any], examples: Examples | None, stage_sizes: Sequence[int]) -> None:
        self.ids, self.examples = ids, examples
        self._stages = np.repeat(np.arange(len(stage_sizes)), stage_sizes)
        self._reading = threading.Lock()
        self._read: tuple[list[str], np.ndarray, list[str]] | None = None
        self.search = lru_cache(maxsize=32)(self._search)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> list[str]:
        """The labels that occur, in order."""
        return self._contents()[2]

    def _search(self, words: str, label: str, stage: int | None) -> np.ndarray:
        """Positions of the examples that hold all words (of text, label or id, any case), with a label, of a stage."""
        kept = np.arange(len(self)) if stage is None else np.flatnonzero(self._stages == stage)
        if label:
            names = self.labels
            kept = kept[self._contents()[1][kept] == (names.index(label) if label in names else -1)]
        for word in words.casefold().split():
            texts = self._contents()[0]
            kept = np.array([place for place in kept.tolist() if word in texts[place]], dtype=np.int64)
        return kept

    def _contents(self) -> tuple[list[str], np.ndarray, list[str]]:
        with self._reading:
            if self._read is None:
                known = [("", "")] * len(self)
                if self.examples is not None:
                    count = min(len(self), len(self.examples))
                    read = map(self.examples.searched, range(count))
                    known = [(_shown(text), printable(label)) for text, label in read]
                    known += [("", "")] * (len(self) - len(known))
                names = sorted({label for _, label in known} - {""}, key=_in_order)
                place = {name: number for number, name in enumerate(names)}
                codes = np.array([place.get(label, -1) for _, label in known], dtype=np.int32)
                texts = [
                    f"{printable(str(id_word(its_id)))} {label} {text}".casefold()
                    for its_id, (text, label) in zip(self.ids, known, strict=True)
                ]
                self._read = texts, codes, names
            return self._read


def _shown(text: str) -> str:
    """As the page shows it, so that what is seen can be searched."""
    return printable(text, keep="\n")


def _in_order(label: str) -> tuple[int, int, str]:
    """Numbers by size, before words by letter."""
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)
