"""How much each training example lowered its own loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from source_proj._errors import extra
from source_proj._io.html import tiles, wrapped
from source_proj.attribution.hits import Hit, Hits, Shown, checked_count, make_hits
from source_proj.attribution.words import id_word, signed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SelfInfluence"]

_ROWS = 5


class SelfInfluence(np.lib.mixins.NDArrayOperatorsMixin):
    """How much each training example lowered its own training loss; counts as the array of its values.

    Args:
        values: ``(N,)`` float32.
        train_ids: N ids.
        unit: unit of the values.
        shown: what else is known of the examples.

    Example:
        >>> influence = SelfInfluence(np.array([0.1, 0.5], dtype=np.float32), ["a", "b"])
        >>> influence.top_k(1), bool(influence.max() == 0.5), (influence > 0.2).tolist()
        ([Hit(id='b', score=0.5)], True, [False, True])
    """

    def __init__(
        self, values: np.ndarray, train_ids: Sequence[Any], unit: str = "own training loss", shown: Shown | None = None
    ) -> None:
        self.values = values
        self.train_ids = list(train_ids)
        self.unit = unit
        self.shown = shown or Shown()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if "out" in options:  # as of influence /= 2
            options["out"] = tuple(map(_plain, options["out"]))
        return getattr(ufunc, method)(*map(_plain, inputs), **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of copies and pickles, before there are values
            raise AttributeError(name)
        return getattr(self.values, name)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __repr__(self) -> str:
        return f"SelfInfluence({len(self)} training examples; +: the example lowered its {self.unit})"

    def __str__(self) -> str:
        """The highest ones, a line each."""
        hits = self._strongest(min(_ROWS, len(self)))
        _, *lines = hits.lines(0, named=False) if len(self) else [""]
        return "\n".join([f"{self!r}. The highest:", *lines])

    def top_k(self, k: int) -> list[Hit]:
        """Return the k examples with the highest values, highest first: mislabelled and rare ones are among them."""
        return self._strongest(k)[0]

    def to_numpy(self) -> np.ndarray:
        """Return the values, ``(N,)`` float32."""
        return self.values

    def to_pandas(self) -> pd.DataFrame:
        """Return train_id and self_influence of each example, in order (needs the ``pandas`` extra)."""
        with extra("pandas"):
            import pandas as pd
        return pd.DataFrame({"train_id": pd.Series(self.train_ids), "self_influence": self.values})

    def _strongest(self, k: int) -> Hits:
        order = np.argsort(-self.values, kind="stable")[: checked_count(k, len(self))][None]
        return make_hits(order, self.values[order], self.train_ids, ["self"], self.unit, shown=self.shown)

    def _repr_html_(self) -> str:
        hits = self._strongest(min(_ROWS, len(self)))
        contents = []
        for rank, hit in enumerate(hits[0]):
            example = hits.train_example(0, rank)
            label = f" (label {example.label})" if example.label else ""
            contents.append((example._repr_html_(), f"{signed(hit.score)}: {id_word(hit.id)}{label}"))
        return wrapped(f"{self!r}. The highest:", tiles(contents))


def _plain(given: Any) -> Any:
    """The array of values, and all else as it is."""
    return given.values if isinstance(given, SelfInfluence) else given
