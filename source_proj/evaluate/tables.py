"""Results side by side in a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from source_proj.evaluate.left_out import LeaveOneOut
from source_proj.evaluate.linear_datamodeling import LDS
from source_proj.evaluate.mislabelled import Mislabel
from source_proj.evaluate.removal import SubsetRemoval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["table"]

Result = LDS | LeaveOneOut | Mislabel | SubsetRemoval


def table(results: Mapping[str, Result]) -> pd.DataFrame:
    """One row for each result, or for each size of a subset removal (needs the ``pandas`` extra).

    Indexed by name. Columns, those left out that no result has: ``measure`` (what the value is), ``removed``
    (examples), ``value``, ``low`` and ``high`` (95 % bootstrap interval), ``ceiling`` (by retraining's noise) and
    ``slope`` (of actual on predicted outcomes).

    Raises:
        ImportError: if pandas is not installed.
        TypeError: for anything but results of this package.

    Example:
        >>> from source_proj.evaluate import mislabel
        >>> table({"loss": mislabel([3.0, 1.0, 2.0], [True, False, False])}).to_dict("index")
        {'loss': {'measure': 'AUC', 'value': 1.0}}
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError('table needs pandas: pip install "source-proj[pandas]"') from error
    rows = [{"name": name, **row} for name, result in results.items() for row in _rows(name, result)]
    columns = ["name", "measure", "removed", "value", "low", "high", "ceiling", "slope"]
    frame = pd.DataFrame(rows, columns=columns).set_index("name")
    if frame["removed"].notna().all():
        frame["removed"] = frame["removed"].astype(int)
    kept = [name for name in frame.columns if name in ("measure", "value") or frame[name].notna().any()]
    return frame[kept]


def _rows(name: str, result: Result) -> Iterator[dict[str, Any]]:
    if isinstance(result, LDS | LeaveOneOut):
        low, high = result.interval
        measure = "LDS" if isinstance(result, LDS) else "leave-one-out"
        row = {"measure": measure, "value": result.value, "low": low, "high": high, "slope": result.calibration.slope}
        yield row if result.ceiling is None else {**row, "ceiling": result.ceiling}
    elif isinstance(result, Mislabel):
        yield {"measure": "AUC", "value": result.auc}
    elif isinstance(result, SubsetRemoval):
        for size, value, (low, high) in zip(result.sizes, result.fraction, result.interval, strict=True):
            yield {"measure": "fraction flipped", "removed": int(size), "value": value, "low": low, "high": high}
    else:
        raise TypeError(f"{name!r} is no result of lds, leave_one_out, mislabel or subset_removal but {type(result)}")
