"""Which training examples columns of scores stand for, and what becomes of a stage when some of them are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Protocol

import numpy as np
from torch import Tensor

from source_proj._errors import MismatchError
from source_proj.attribution.features import SketchedQueries
from source_proj.attribution.products import Term

__all__ = ["Population", "Totals", "some_of"]

Totals = Callable[[], np.ndarray]
"""Returns the sums of the scores of all examples of each stage, ``(Q, S)`` float64."""


@dataclass(frozen=True, eq=False)
class Population:
    """The training sets that columns of scores are taken from: all of their examples, some, or groups of them.

    Whoever trains without n of a stage's N examples gives each that stays the weight 1/(N - n), so that a prediction
    needs the stage's size, and the sum of all its scores, whatever columns are left of these.

    Attributes:
        sizes: N_s, the number of examples of each of S stages.
        stages: the stage of each example that columns are about, ``(n,)`` int64.
        totals: the sums of all N_s examples' scores, or what returns them once somebody asks; None where the n examples
            are all of them, in order.
        members: where columns are groups, the places in ``stages`` of each one's examples; None where each column is
            one example.
        sums: where columns are groups, their sums over the examples of each stage, ``(Q, G, S)`` float64.
    """

    sizes: tuple[int, ...]
    stages: np.ndarray
    totals: Totals | np.ndarray | None = None
    members: tuple[np.ndarray, ...] | None = None
    sums: np.ndarray | None = None

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Population:
        """All examples of stages of these sizes, a column each."""
        return cls(tuple(map(int, sizes)), np.repeat(np.arange(len(sizes)), sizes))

    def kind(self, count: int) -> str:
        """What so many columns are of."""
        return "training examples" if self.members is None else f"group{'' if count == 1 else 's'} of training examples"

    def __repr__(self) -> str:
        count = len(self.stages if self.members is None else self.members)
        sizes = ", ".join(map(str, self.sizes))
        return f"Population({count} {self.kind(count)}; stages of {sizes})"

    def __getstate__(self) -> dict[str, object]:
        """Without what would take a whole method or all scores along."""
        return {**self.__dict__, "totals": _left_behind if callable(self.totals) else self.totals}

    def known_totals(self) -> np.ndarray | None:
        """The sums of all examples' scores ``(Q, S)`` float64, where columns are not all of these."""
        return self.totals() if callable(self.totals) else self.totals

    def spans(self) -> list[slice]:
        """The columns of each stage, where they are all examples."""
        ends = np.cumsum(self.sizes).tolist()
        return [slice(end - size, end) for size, end in zip(self.sizes, ends, strict=True)]

    def examples(self, columns: np.ndarray) -> np.ndarray:
        """Places in ``stages`` of the examples that some columns stand for, ``(m,)`` int64.

        Raises:
            ValueError: they share some, which would count twice.
        """
        if self.members is None:
            return columns
        places = np.concatenate([self.members[column] for column in columns] or [np.empty(0, np.int64)])
        shared = len(places) - len(np.unique(places))
        if shared:
            raise ValueError(
                f"these groups share examples ({shared} would count twice): ask it of the scores that were grouped, "
                "or of groups that share none"
            )
        return places

    def counts(self, columns: np.ndarray) -> np.ndarray:
        """How many examples of each stage some columns stand for, ``(S,)`` int64; raises as :meth:`examples`."""
        return np.bincount(self.stages[self.examples(columns)], minlength=len(self.sizes))

    def by_stage(self, columns: np.ndarray) -> list[np.ndarray]:
        """Some columns, each an example, by their stages."""
        return [columns[self.stages[columns] == stage] for stage in range(len(self.sizes))]

    def corner(self, queries: int, columns: int, totals: Totals) -> Population:
        """That of the first queries and columns, ``totals`` being those of all queries."""
        if self.members is not None and self.sums is not None:
            part = replace(self, members=self.members[:columns], sums=self.sums[:queries, :columns])
        elif self.totals is None and len(self.stages[:columns]) == len(self.stages):
            return self  # all examples are there
        else:
            part = replace(self, stages=self.stages[:columns])
        return replace(part, totals=partial(_first, totals, queries))

    def averaged(self, average: Callable[[np.ndarray], np.ndarray]) -> Population:
        """That of means over queries: ``average`` takes ``(Q, …)`` to ``(G, …)``, and is linear."""
        sums = None if self.sums is None else average(self.sums)
        totals = partial(_averaged, self.totals, average) if callable(self.totals) else self.totals
        if isinstance(totals, np.ndarray):
            totals = average(totals)
        return replace(self, sums=sums, totals=totals)


def _first(totals: Totals, queries: int) -> np.ndarray:
    return totals()[:queries]


def _averaged(totals: Totals, average: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return average(totals())


def _left_behind() -> np.ndarray:
    raise ValueError(
        "these scores of some training examples came from another process, and what all examples sum to was left "
        "there: predict there with renormalize=True, or send the scores of all examples"
    )


class Scoring(Protocol):
    """What is asked of an attribution method; see `Attributor`."""

    @property
    def n_rows(self) -> int: ...

    def all_terms(self, features: SketchedQueries) -> list[Term]: ...

    def blocks(self, terms: list[Term], count: int) -> Iterator[tuple[int, int, Tensor]]: ...


def some_of(method: Scoring, features: SketchedQueries, sizes: Sequence[int], stages: np.ndarray) -> Population:
    """The population of some of a method's training examples, given by their stages.

    What all examples sum to takes a pass over the bank, once somebody asks.
    """
    return Population(tuple(sizes), stages, cache(partial(_stage_totals, method, features, sizes)))


def _stage_totals(method: Scoring, features: SketchedQueries, sizes: Sequence[int]) -> np.ndarray:
    """The sums of a method's scores over all examples of each stage, ``(Q, S)`` float64, in one pass over the bank.

    Raises:
        MismatchError: the bank has other rows by now than these sizes.
    """
    if method.n_rows != sum(sizes):
        raise MismatchError(
            f"the bank had {sum(sizes)} examples when these scores were made, and has {method.n_rows} now: ask anew"
        )
    totals, ends = np.zeros((len(features.ids), len(sizes))), np.cumsum(sizes).tolist()
    for start, stop, block in method.blocks(method.all_terms(features), len(features.ids)):
        for stage, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            own = slice(max(start, end - size) - start, max(min(stop, end) - start, 0))
            totals[:, stage] += block[:, own].double().sum(1).numpy()
    return totals
