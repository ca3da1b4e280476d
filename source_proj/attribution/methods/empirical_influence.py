"""Empirical influence: what retraining on random subsets itself says of every example, without any gradient."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from source_proj._errors import MismatchError
from source_proj._io.numbers import plain_numbers
from source_proj.attribution.scores import Scores

__all__ = ["empirical_influence"]


def empirical_influence(
    masks: ArrayLike,
    outcomes: ArrayLike,
    *,
    unit: str = "measurement",
    higher_is_better: bool = True,
    train_ids: Sequence[Any] | None = None,
    query_ids: Sequence[Any] | None = None,
) -> Scores:
    """Mean outcome of the models that were trained with an example, minus that of the models trained without it.

        score(q, z) = mean{m_j(q): z in subset j} - mean{m_j(q): z not in subset j}

    (Feldman and Zhang, "What Neural Networks Memorize and Why", https://arxiv.org/abs/2008.03703; called Downsampling
    in https://arxiv.org/abs/2405.12186, appendix B.4.) Its noise falls only with the number of subsets,
    so that it takes hundreds to thousands of retrainings. Judge it by other retrainings than those it is made of.

    Args:
        masks: ``(M, N)`` bool; True marks an example that the subset holds.
        outcomes: measurements ``(M, R, Q)``, averaged over R retrainings per subset, or ``(M, Q)``.
        unit: unit of the measurement, such as "logit margin".
        higher_is_better: whether a rise of the measurement is an improvement.
        train_ids: N ids; default 0, 1, 2, …
        query_ids: Q ids; default 0, 1, 2, …

    Returns:
        Scores ``(Q, N)`` float32: changes of the measurement; positive where having the example raised it.

    Raises:
        TypeError: if masks are not boolean.
        ValueError: for wrong dimensions, outcomes that are not finite, or an example that all subsets hold, or none.
        MismatchError: if masks and outcomes differ in the number of subsets, or ids do not fit them.

    Example:
        >>> masks = np.array([[True, False], [False, True], [True, True], [False, False]])
        >>> outcomes = masks @ np.array([[2.0], [-1.0]])  # the first example adds 2 to the only query, the second -1
        >>> empirical_influence(masks, outcomes, unit="logit margin").to_numpy()
        array([[ 2., -1.]], dtype=float32)
    """
    kept, measured = _checked(masks, outcomes)
    count = kept.sum(axis=0)  # (N,) subsets that hold each example
    examples = list(range(kept.shape[1]) if train_ids is None else train_ids)
    queries = list(range(measured.shape[1]) if query_ids is None else query_ids)
    if (len(queries), len(examples)) != (measured.shape[1], kept.shape[1]):
        raise MismatchError(
            f"got {len(queries)} query ids and {len(examples)} training ids for outcomes of {measured.shape[1]} "
            f"queries and masks of {kept.shape[1]} examples; give one id each"
        )
    for what, lonely in (("no subset holds", count == 0), ("every subset holds", count == len(kept))):
        if lonely.any():
            ids = [examples[i] for i in np.flatnonzero(lonely).tolist()]
            raise ValueError(
                f"{what} {len(ids)} of the training examples, the first of them {ids[:5]}, so that there is nothing "
                f"to compare: add subsets to these {len(kept)}, or leave the examples out"
            )
    held = measured.T @ kept  # (Q, N) sums over the subsets that hold the example
    rest = measured.sum(axis=0)[:, None] - held
    values = (held / count - rest / (len(kept) - count)).astype(np.float32)
    return Scores(values, queries, examples, unit=unit, higher_is_better=higher_is_better)


def _checked(masks: ArrayLike, outcomes: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return masks ``(M, N)`` of ones and zeros, and outcomes ``(M, Q)`` averaged over retrainings."""
    kept, measured = np.asarray(plain_numbers(masks)), np.asarray(plain_numbers(outcomes), dtype=np.float64)
    if kept.dtype != np.bool_:
        raise TypeError(f"masks must be boolean, True for an example that the subset holds; got dtype {kept.dtype}")
    if kept.ndim != 2 or kept.size == 0:
        raise ValueError(f"masks must have shape (subsets, examples), got shape {kept.shape}")
    if measured.ndim not in (2, 3) or measured.size == 0:
        raise ValueError(
            "outcomes must have shape (subsets, retrainings, queries) or (subsets, queries), "
            f"got shape {measured.shape}"
        )
    if len(kept) != len(measured):
        raise MismatchError(
            f"masks describe {len(kept)} subsets but outcomes {len(measured)}; give one row of outcomes per subset"
        )
    bad = np.argwhere(~np.isfinite(measured))
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise ValueError(f"outcomes hold {len(bad)} values that are not finite, the first at {where}; retrain those")
    return kept.astype(np.float64), measured.mean(axis=1) if measured.ndim == 3 else measured
