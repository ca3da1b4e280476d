"""What leaving out training examples is predicted to change."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from source_proj._io.equality import EqualByValue
from source_proj._io.html import facts
from source_proj.attribution.words import signed

__all__ = ["PredictedChange"]


@dataclass(frozen=True, repr=False, eq=False)
class PredictedChange(EqualByValue):
    """The predicted change of each query's measurement when a subset is removed from training.

    Attributes:
        values: change of each query's measurement, ``(Q,)`` float64, in ``unit``.
        unit: unit of the measurement.
        normalization: which retraining this predicts: ``"fixed 1/N"`` (the removed examples' gradients vanish, all
            other weights stay) or ``"renormalized"`` (the mean is taken over the fewer examples that stay).
        n_removed: number of removed examples.
    """

    values: np.ndarray
    unit: str
    normalization: str
    n_removed: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        shown = ", ".join(signed(float(value)) for value in self.values[:3]) + ", …" * (len(self.values) > 3)
        return f"PredictedChange({shown} {self.unit} without {self.n_removed} training examples, {self.normalization})"

    def _repr_html_(self) -> str:
        title = f"Without {self.n_removed} training examples ({self.normalization}), change of the {self.unit}"
        values = [(f"query at place {place}", signed(float(value))) for place, value in enumerate(self.values[:10])]
        more = len(self.values) - len(values)
        return facts(title, [*values, *([("", f"… and {more} more")] if more else [])])
