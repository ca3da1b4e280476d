"""Search among the examples of a data set: which of them hold some words, and have a label."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from source_proj._io.printable import SPELLING, printable
from source_proj.attribution.words import id_word
from source_proj.bank.examples import Examples

__all__ = ["ExampleIndex", "Found"]

_BLOCK = 2048  # examples that are read at a time
_PATIENCE = 1.0  # seconds that a search waits for the entries that it was asked for


class Found(NamedTuple):
    """What a search has found so far.

    Attributes:
        places: of the examples, in order; those that are still to come follow behind them.
        read: the share of all examples that was looked at.
    """

    places: Sequence[int]
    read: float


@dataclass
class _Search:
    """Places that were found, and up to which example was looked."""

    places: list[int] = field(default_factory=list)
    read: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class ExampleIndex:
    """Texts, labels and ids of examples, read once, in the background; a search need not wait for all of them.

    Args:
        ids: their ids.
        examples: how they are shown; None where only their ids are known.
        stage_sizes: how many examples each stage has.
    """

    def __init__(self, ids: Sequence[Any], examples: Examples | None, stage_sizes: Sequence[int]) -> None:
        self.ids, self.examples = ids, examples
        self._ends = np.cumsum(stage_sizes)
        self._texts: list[str] = []
        self._codes: list[int] = []  # as long as the texts whenever the condition's lock is free
        self._names: dict[str, int] = {}
        self._error: Exception | None = None
        self._more = threading.Condition()
        self._reader: threading.Thread | None = None
        self._begun = lru_cache(maxsize=32)(lambda *_: _Search())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> list[str]:
        """The labels that occur, in order; waits until all examples were read."""
        self.begin()
        with self._more:
            self._more.wait_for(lambda: self._read == len(self))
            return sorted(self._names.keys() - {""}, key=_in_order)

    def begin(self) -> None:
        """Start to read, if nobody did."""
        with self._more:
            if self._reader is None:
                self._reader = threading.Thread(target=self._read_all, daemon=True)
                self._reader.start()

    def search(self, words: str, label: str, stage: int | None, wanted: int) -> Found:
        """The examples that hold all words (of text, label or id, any case), with a label, of a stage.

        Args:
            words: separated by spaces.
            label: empty for any.
            stage: None for any.
            wanted: places that are waited for, a second at most.
        """
        span = range(len(self)) if stage is None else self._of_stage(stage)
        if not words.strip() and not label:
            return Found(span, 1.0)
        self.begin()
        search, until = self._begun(words.casefold(), label, stage), time.monotonic() + _PATIENCE
        with search.lock:
            search.read = max(search.read, span.start)
            while True:
                read = min(self._read, span.stop)
                self._go_on(search, words.casefold().split(), label, read)
                left = until - time.monotonic()
                if read == span.stop or len(search.places) >= wanted or left <= 0:
                    looked = 1.0 if read == span.stop else self._read / len(self)
                    return Found(tuple(search.places), looked)
                with self._more:
                    self._more.wait_for(lambda: min(self._read, span.stop) > search.read, left)

    @property
    def _read(self) -> int:
        """Examples that were read; raises what their data set raised."""
        if self._error is not None:
            raise self._error
        return len(self._codes)

    def _of_stage(self, stage: int) -> range:
        if not 0 <= stage < len(self._ends):
            return range(0)
        return range(int(self._ends[stage - 1]) if stage else 0, int(self._ends[stage]))

    def _go_on(self, search: _Search, words: Sequence[str], label: str, stop: int) -> None:
        """Look at those that were read since."""
        texts, places = self._texts, range(search.read, stop)
        kept: Sequence[int] = places
        if label:
            code = self._names.get(label, -1)
            kept = [place for place in kept if self._codes[place] == code]
        for word in words:
            kept = [place for place in kept if word in texts[place]]
        search.places += kept
        search.read = max(search.read, stop)

    def _read_all(self) -> None:
        try:
            known: Iterator[tuple[str, str]] = iter(()) if self.examples is None else self.examples.searched()
            for start in range(0, len(self), _BLOCK):
                stop = min(len(self), start + _BLOCK)
                read = [(_shown(text), printable(label)) for text, label in islice(known, stop - start)]
                read += [("", "")] * (stop - start - len(read))
                self._add(self.ids[start:stop], read)
        except Exception as error:  # of the user's data set; whoever searches is told
            with self._more:
                self._error = error
                self._more.notify_all()

    def _add(self, ids: Sequence[Any], read: Sequence[tuple[str, str]]) -> None:
        texts = [
            f"{printable(str(id_word(its_id)))} {label} {text}".casefold()
            for its_id, (text, label) in zip(ids, read, strict=True)
        ]
        with self._more:
            self._texts += texts
            self._codes += [self._names.setdefault(label, len(self._names)) for _, label in read]
            self._more.notify_all()


def _shown(text: str) -> str:
    """As the page shows it, so that what is seen can be searched."""
    return printable(text, keep=SPELLING)


def _in_order(label: str) -> tuple[int, int, str]:
    """Numbers by size, before words by letter."""
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)
