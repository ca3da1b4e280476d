"""What attribution returns: scores with their ids, sign and unit, and the strongest examples of each query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import ArrayLike
from zarr.codecs import Crc32cCodec, ZstdCodec

from source_proj._errors import extra
from source_proj._io.html import wrapped
from source_proj._io.numbers import plain_numbers
from source_proj._io.outputs import local_path, write_output_folder
from source_proj._io.printable import drawn
from source_proj.attribution.hits import Hits, Shown, checked_count, make_hits
from source_proj.attribution.population import Population
from source_proj.attribution.predicted_change import PredictedChange
from source_proj.attribution.ranking import strongest
from source_proj.attribution.score_files import is_scores_array, scores_facts, write_scores_parquet
from source_proj.attribution.stored_values import StoredValues, sealed_array_facts
from source_proj.attribution.subsets import Subset, TrainingIds
from source_proj.attribution.words import id_of, id_word

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from source_proj.attribution.source.fidelity import Fidelity

__all__ = ["Scores"]

_SHOWN = 3  # queries, and examples of each, in a notebook
_NO_NUMBERS = "cSUMm"  # NumPy's kinds of complex numbers, texts and times


class Scores:
    """Attribution scores of Q queries against N training examples.

    ``values[q, z]`` is the first-order change of the measurement of query q that *including* training example z made,
    in the measurement's own unit: positive means that z raises the measurement. Removing z is predicted to change it
    by ``-values[q, z]``.

    Args:
        values: ``(Q, N)`` scores, numbers of any library; a zarr array is read where it is asked for, and compared with
            what was written there.
        query_ids: Q ids; they may repeat.
        train_ids: N ids, all of them different.
        unit: unit of the measurement, such as "logit margin".
        higher_is_better: whether a rise of the measurement is an improvement; "helpful" follows it.
        stage_sizes: sizes of the training sets of the stages, in order; default: one stage of N examples.
        additive: whether the scores are changes of the measurement (and so may be summed over a subset).
        shown: what else is known of the examples.
        population: of scores that were made of others, which training examples the columns stand for; default: one
            each, of stages of those sizes.

    Raises:
        ValueError: shapes, ids and sizes do not fit, or a training id stands there twice.
        TypeError: a training id is not hashable, or values are no real numbers.
        MismatchError: an array that was written as scores is damaged; its values are compared when they are read.

    Example:
        >>> scores = Scores(np.array([[0.5, -0.25, 0.0]]), ["q"], ["a", "b", "c"], unit="logit margin")
        >>> scores
        Scores(1 query x 3 training examples; +: including the example raised the logit margin)
        >>> scores.top_k(1).ids
        [['a']]
        >>> scores.predict_removal(["a", "b"]).values
        array([-0.25])
    """

    def __init__(
        self,
        values: ArrayLike | zarr.Array[Any],
        query_ids: Sequence[Any],
        train_ids: Sequence[Any],
        *,
        unit: str,
        higher_is_better: bool = True,
        stage_sizes: Sequence[int] | None = None,
        additive: bool = True,
        shown: Shown | None = None,
        population: Population | None = None,
    ) -> None:
        self._values = StoredValues(values) if isinstance(values, zarr.Array) else np.asarray(plain_numbers(values))
        if self._values.shape != (len(query_ids), len(train_ids)):
            raise ValueError(
                f"scores of shape {self._values.shape} do not fit {len(query_ids)} query ids "
                f"and {len(train_ids)} training ids"
            )
        kind = self._values.dtype if isinstance(self._values, np.ndarray) else self._values.array.dtype
        if kind.kind in _NO_NUMBERS:
            raise TypeError(f"scores are real numbers, got {kind}: give floats")
        self.query_ids = [id_of(given) for given in query_ids]  # lists, where they were read from JSON
        self.train_ids = [id_of(given) for given in train_ids]
        self.unit = unit
        self.higher_is_better = higher_is_better
        self.additive = additive
        self.shown = shown or Shown()
        self._ids = TrainingIds(self.train_ids)
        self._population = population or _whole(stage_sizes, len(train_ids))
        self._estimate: Callable[[], Fidelity] | None = None

    def attach_fidelity(self, estimate: Callable[[], Fidelity]) -> None:
        """Say how the fidelity of these scores is estimated, once somebody asks."""
        self._estimate = cache(estimate)

    @property
    def fidelity(self) -> Fidelity | None:
        """What each query's scores are expected to keep of those without a sketch, estimated when first asked.

        None where that is not known: of scores from a file, and of other methods than :class:`Source`.
        """
        return None if self._estimate is None else self._estimate()

    def __getstate__(self) -> dict[str, Any]:
        """Without what would take the whole method along."""
        return {**self.__dict__, "_estimate": None}

    @property
    def population(self) -> Population:
        """Which training examples the columns stand for."""
        return self._population

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """Sizes of the training sets of the stages, in order."""
        return self._population.sizes

    @property
    def shape(self) -> tuple[int, int]:
        """``(Q, N)``."""
        queries, rows = self._values.shape
        return queries, rows

    @property
    def values(self) -> np.ndarray:
        """``(Q, N)``; of scores in a file, all of them are read."""
        return self._values if isinstance(self._values, np.ndarray) else self._values[:]

    def row_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Scores ``(q, N)`` block after block, each with the place of its first query; in memory they are one block."""
        if isinstance(self._values, np.ndarray):
            yield 0, self._values
            return
        for start in range(0, max(len(self), 1), self._values.height):  # of no queries: a block of none
            yield start, self._values[start : start + self._values.height]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return len(self.query_ids)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def head(self, queries: int = 5, examples: int = 8) -> pd.DataFrame:
        """The first queries' scores of the first training examples, as :meth:`to_pandas` has them."""
        return self.corner(queries, examples).to_pandas()

    def plot(self, query: int = 0, ax: Axes | None = None) -> Axes:
        """Draw how one query's scores are spread, examples counted on a log scale (needs the ``plot`` extra)."""
        with extra("plot"):
            import matplotlib.pyplot as plt
        axes: Axes = plt.subplots(figsize=(5, 2.5), layout="constrained")[1] if ax is None else ax
        axes.hist(np.asarray(self._values[query]), bins=60, color="#3a4fb0")
        axes.set_yscale("log")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.locator_params(axis="x", nbins=6)  # more labels run into each other
        axes.set_xlabel(drawn(f"score ({self.unit})"))
        axes.set_ylabel("training examples")
        axes.set_title(drawn(f"query {id_word(self.query_ids[query])}"))
        return axes

    def __repr__(self) -> str:
        queries, rows = self.shape
        meaning = f"including the example raised the {self.unit}" if self.additive else f"similarity ({self.unit})"
        asked = f"{queries} {'query' if queries == 1 else 'queries'}"
        return f"Scores({asked} x {rows} {self._population.kind(rows)}; +: {meaning})"

    def top_k(self, k: int) -> Hits:
        """Return the k highest scores of each query, highest first: the examples that raise its measurement most."""
        return self._strongest(k, highest=True)

    def bottom_k(self, k: int) -> Hits:
        """Return the k lowest scores of each query, lowest first: the examples that lower its measurement most."""
        return self._strongest(k, highest=False)

    def helpful(self, k: int) -> Hits:
        """Return the k examples that improve each query's measurement most, following ``higher_is_better``."""
        return self._strongest(k, highest=self.higher_is_better)

    def harmful(self, k: int) -> Hits:
        """Return the k examples that worsen each query's measurement most, following ``higher_is_better``."""
        return self._strongest(k, highest=not self.higher_is_better)

    def group(self, subset: Subset | Mapping[Any, Subset]) -> Scores:
        """Sum the scores over groups of training examples.

        Args:
            subset: training ids, or a boolean mask ``(N,)``, as a sequence, an array or a tensor; or a mapping from
                group names to such subsets.

        Returns:
            :class:`Scores` with one column per named group; one subset makes one column, "group".

        Raises:
            ValueError: if the scores are no changes of the measurement, and so have no meaningful sum; or a subset
                names no training examples; or the mapping is empty.
            TypeError: if a subset is neither ids nor a mask.
        """
        self._require_additive("group")
        groups = subset if isinstance(subset, Mapping) else {"group": subset}
        if not groups:
            raise ValueError("group got an empty mapping: name at least one group, as in {'name': training ids}")
        columns = [self._ids.positions(members) for members in groups.values()]
        members = tuple(self._population.examples(own) for own in columns)
        sums = self._by_stage(columns)
        totals = self._totals()  # of all scores, which groups do not keep
        return Scores(
            sums.sum(axis=2),
            self.query_ids,
            list(groups),
            unit=self.unit,
            higher_is_better=self.higher_is_better,
            additive=self.additive,
            shown=replace(self.shown, train=None),
            population=replace(self._population, totals=totals, members=members, sums=sums),
        )

    def predict_removal(self, subset: Subset, *, renormalize: bool = False) -> PredictedChange:
        """Predict how each query's measurement changes when a subset is left out of training.

        At fixed 1/N the prediction is ``-Σ_{z in subset} score(q, z)``. A retraining that takes the mean loss over
        the n fewer examples also raises the weight of every remaining one from 1/N to 1/(N-n), at first order
        ``+ n/(N-n) Σ_{z kept} score(q, z)``: ask for it with ``renormalize=True``.

        Args:
            subset: training ids, or a boolean mask ``(N,)`` that marks the removed ones, as a sequence, an array or a
                tensor.
            renormalize: predict the renormalised retraining instead of the one at fixed 1/N.

        Raises:
            ValueError: if the scores are no changes of the measurement, a whole stage would be removed, or the subset
                names no training examples.
            TypeError: if the subset is neither ids nor a mask.
        """
        self._require_additive("predict_removal")
        columns = self._ids.positions(subset)
        counts = self._population.counts(columns)
        sums = self._by_stage([columns])[:, 0]  # (Q, S)
        change = -sums.sum(axis=1)
        if renormalize:
            sizes = self._population.sizes
            for n, size in zip(counts.tolist(), sizes, strict=True):
                if n >= size:
                    raise ValueError(f"all {size} examples of a stage are removed; nothing is left to renormalize to")
            change = change + (self._totals() - sums) @ (counts / (np.array(sizes) - counts))
        return PredictedChange(change, self.unit, "renormalized" if renormalize else "fixed 1/N", int(counts.sum()))

    def to_numpy(self) -> np.ndarray:
        """Return the values, ``(Q, N)`` float32."""
        return self.values

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with queries as rows and training examples as columns (needs the ``pandas`` extra)."""
        with extra("pandas"):
            import pandas as pd
        return pd.DataFrame(
            self.values,
            index=_labels(self.query_ids, "query"),
            columns=_labels(self.train_ids, "train"),
        )

    def to_zarr(self, path: str | Path, *, overwrite: bool = False) -> zarr.Array[Any]:
        """Write the values to a zarr v3 array with ids, sign and unit in its attributes.

        The array appears at its path when it is whole.

        Args:
            path: the array's folder.
            overwrite: replace an array of scores that is there. Anything else is never replaced.

        Raises:
            FileExistsError: something is there already that may not be overwritten.
        """
        facts = scores_facts(
            self.query_ids,
            self.train_ids,
            self.unit,
            higher_is_better=self.higher_is_better,
            additive=self.additive,
        )
        values = np.ascontiguousarray(self.values)

        def fill(folder: Path) -> None:  # a chunk that gets lost reads as NaN, a changed one as an error
            array = zarr.create_array(
                store=str(folder),
                data=values,
                fill_value=np.nan if values.dtype.kind == "f" else None,
                compressors=[ZstdCodec(level=0), Crc32cCodec()],
            )
            array.update_attributes(sealed_array_facts(facts, array))

        path = local_path(path)
        write_output_folder(path, fill, overwrite=overwrite, replaceable=is_scores_array)
        return zarr.open_array(path, mode="r")

    def to_parquet(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a line for each score: query_id, train_id, rank (from 1, the highest first), score (``parquet`` extra).

        Args:
            path: the file, which appears when it is whole.
            overwrite: replace a file that has this name.

        Raises:
            FileExistsError: something is there that may not be overwritten.
        """
        k = len(self.train_ids)
        parts = ((start, *strongest(values, k, highest=True)) for start, values in self.row_blocks())
        write_scores_parquet(local_path(path), parts, self.query_ids, self.train_ids, overwrite=overwrite)

    def corner(self, queries: int, examples: int) -> Scores:
        """The first queries' scores of the first training examples; of scores in a file, only these are read."""
        return Scores(
            np.asarray(self._values[:queries, :examples]),
            self.query_ids[:queries],
            self.train_ids[:examples],
            unit=self.unit,
            higher_is_better=self.higher_is_better,
            additive=self.additive,
            shown=self.shown,
            population=self._population.corner(queries, examples, self._totals),
        )

    def _repr_html_(self) -> str:
        """The most helpful examples of the first queries."""
        first = self.corner(_SHOWN, len(self.train_ids))
        content = first.helpful(min(_SHOWN, len(self.train_ids)))._repr_html_() if 0 not in self.shape else ""
        return wrapped(f"{self!r}. The most helpful for the first queries:", content)

    def _require_additive(self, verb: str) -> None:
        if not self.additive:
            raise ValueError(
                f"{verb} needs scores that are changes of the measurement; these are a similarity ({self.unit})"
            )

    def _strongest(self, k: int, *, highest: bool) -> Hits:
        k = checked_count(k, len(self.train_ids))
        parts = [strongest(values, k, highest=highest) for _, values in self.row_blocks()]
        indices, best = (np.concatenate(part) for part in zip(*parts, strict=True))
        return make_hits(
            indices, best, self.train_ids, self.query_ids, self.unit, self.higher_is_better, self.shown,
            additive=self.additive,
        )  # fmt: skip

    def _totals(self) -> np.ndarray:
        """What all examples of each stage sum to, ``(Q, S)`` float64."""
        known = self._population.known_totals()
        return self._sums(self._population.spans()) if known is None else known

    def _by_stage(self, groups: Sequence[np.ndarray]) -> np.ndarray:
        """Sums over groups of columns, by the stages of their examples, ``(Q, G, S)`` float64."""
        population = self._population
        if population.sums is not None:
            return np.stack([population.sums[:, columns].sum(1) for columns in groups], axis=1)
        sums = self._sums([own for columns in groups for own in population.by_stage(columns)])
        return sums.reshape(len(self), len(groups), len(population.sizes))

    def _sums(self, columns: Sequence[np.ndarray | slice]) -> np.ndarray:
        """Sums over G lots of columns, ``(Q, G)`` float64, in one pass over the scores."""
        parts = [
            np.stack([values[:, own].sum(axis=1, dtype=np.float64) for own in columns], axis=1)
            for _, values in self.row_blocks()
        ]
        return np.concatenate(parts)


def _whole(stage_sizes: Sequence[int] | None, count: int) -> Population:
    sizes = [count] if stage_sizes is None else list(stage_sizes)
    if sum(sizes) != count:
        raise ValueError(f"stages of sizes {sizes} do not make {count} training examples")
    return Population.of_sizes(sizes)


def _labels(ids: Sequence[Any], name: str) -> pd.Index:
    """Ids as labels of pandas, whose own type for strings cannot hold half a surrogate pair."""
    import pandas as pd

    try:
        return pd.Index(ids, name=name, tupleize_cols=False)
    except UnicodeEncodeError:
        return pd.Index(ids, name=name, tupleize_cols=False, dtype=object)
