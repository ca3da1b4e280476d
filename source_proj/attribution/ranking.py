"""The strongest of some scores, in an order that nothing is left open in."""

import numpy as np

__all__ = ["strongest"]


def strongest(values: np.ndarray, k: int, *, highest: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions and scores ``(q, k)`` of the k strongest of each row, best first; of equal scores the first ones.

    That is the order of :class:`source_proj.kernels.scoring.Strongest`, so that what is streamed, and what is taken
    from scores that are there, name the same examples. NaN comes last.

    Args:
        values: ``(q, N)`` scores of any type of real numbers.
        k: 1..N.
        highest: take the highest, or else the lowest.

    Example:
        >>> strongest(np.array([[1, 3, 3, 3, 0]], np.uint8), 2, highest=True)[0]
        array([[1, 2]])
    """
    keys = _keys(values, highest=highest)
    count = keys.shape[1]
    if k < count:
        # A partition leaves open which of equal keys it takes, but not the k-th key: of those as large, the first stay.
        last = np.partition(keys, k - 1, axis=1)[:, k - 1 : k]  # (q, 1)
        none, nones = np.isnan(last), np.isnan(keys)
        below, equal = np.where(none, ~nones, keys < last), np.where(none, nones, keys == last)
        kept = below | (equal & (equal.cumsum(axis=1) <= k - below.sum(axis=1, keepdims=True)))
        indices = np.nonzero(kept)[1].reshape(len(keys), k)
    else:
        indices = np.broadcast_to(np.arange(count), keys.shape)
    order = np.argsort(np.take_along_axis(keys, indices, axis=1), axis=1, kind="stable")
    indices = np.take_along_axis(indices, order, axis=1)
    return indices, np.take_along_axis(values, indices, axis=1)


def _keys(values: np.ndarray, *, highest: bool) -> np.ndarray:
    """Numbers that rise from the strongest to the weakest."""
    if values.dtype.kind == "b":
        values = values.astype(np.int8)
    if not highest:
        return values
    return ~values if values.dtype.kind in "iu" else -values  # ~x falls as x rises, and no integer wraps
