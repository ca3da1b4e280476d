"""Calibration: is a predicted change of 1 followed by an actual change of 1?"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from source_proj._io.equality import EqualByValue
from source_proj.evaluate._counterfactual import (
    Retrainings,
    bootstrap_weights,
    percentile_interval,
    subset_predictions,
)
from source_proj.evaluate._ranks import Floats
from source_proj.evaluate.ground_truth import GroundTruth

__all__ = ["Calibration", "calibrate", "calibration"]

_ROUNDING = 1e-12  # of a sum of squares: less than this of it is no variance


@dataclass(frozen=True, eq=False)
class Calibration(EqualByValue):
    """Least-squares slope of measured against predicted outcomes.

    Attributes:
        slope: pooled over queries; 1 when the scores' unit is right, above 1 when they predict too little.
        interval: 95 % bootstrap interval over subsets; NaNs when ``bootstrap=0``.
        per_query: slope of each query, shape ``(Q,)``.
        correlation: Pearson correlation of the pooled, per-query centred pairs.
        replicates: bootstrap replicates of the slope, shape ``(B,)``; NaN where equal predictions alone were drawn.
    """

    slope: float
    interval: tuple[float, float]
    per_query: Floats = field(repr=False)
    correlation: float
    replicates: Floats = field(repr=False)


def calibration(
    scores: ArrayLike,
    truth: GroundTruth | ArrayLike,
    outcomes: ArrayLike | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Slope of the retrained measurements on the summed scores, each centred within its query.

    With predictions p and measurements y of query q on subset j, both centred over j,
    ``slope = Σ_qj p y / Σ_qj p²``. Scores predict at fixed 1/N; retraining on a share f of the examples
    by the mean loss of what is left weighs each of them by 1/(fN), so a first-order exact method shows a
    slope of 1/f (2 for half-subsets) after as many steps. After as many epochs the steps are a share f too:
    directions that have not converged then show 1, and the slope lies between 1 and 1/f.

    Args:
        scores: ``(Q, N)``; positive means that including the example raises the query's measurement.
        truth: a :class:`GroundTruth`; or masks ``(M, N)`` bool, where True marks an example the subset keeps.
        outcomes: with masks: measurements ``(M, R, Q)``, or ``(M, Q)`` for one retraining per subset.
        bootstrap: number of resamplings of subsets; 0 for none.
        seed: seed of the resampling.

    Raises:
        TypeError: if masks are not boolean, or come without outcomes.
        ValueError: for wrong dimensions, non-finite values, or constant predictions or outcomes.
        MismatchError: if the three disagree on subsets, examples or queries.
        SourceProjError: if retrainings of the store are missing or damaged.

    Example:
        >>> from source_proj.evaluate import half_subsets
        >>> masks = half_subsets(40, 25)
        >>> effect = np.linspace(-1, 1, 40)[None, :]
        >>> round(calibration(effect / 2, masks, masks @ effect.T).slope, 6)
        2.0
    """
    retrainings = Retrainings.of(truth, outcomes)
    predicted = subset_predictions(scores, retrainings)
    return calibrate(predicted, retrainings.mean, bootstrap_weights(predicted.shape[1], bootstrap, seed))


def calibrate(predicted: Floats, measured: Floats, weights: Floats) -> Calibration:
    """Slope of ``measured`` on ``predicted``, both ``(Q, M)``, with resamplings ``(B, M)``."""
    predicted = predicted - predicted.mean(axis=1, keepdims=True)  # keeps the bootstrap's differences accurate
    measured = measured - measured.mean(axis=1, keepdims=True)
    cross, square = (predicted * measured).sum(axis=1), (predicted**2).sum(axis=1)
    replicates = _replicates(predicted, measured, weights)
    return Calibration(
        slope=float(cross.sum() / square.sum()),
        interval=percentile_interval(replicates),
        per_query=cross / square,
        correlation=float(cross.sum() / np.sqrt(square.sum() * (measured**2).sum())),
        replicates=replicates,
    )


def _replicates(predicted: Floats, measured: Floats, weights: Floats) -> Floats:
    if len(weights) == 0:
        return np.empty(0)
    count = predicted.shape[1]
    # Weighted moments of every query at once: (B, M) @ (M, Q), centred anew in each resampling.
    cross = weights @ (predicted * measured).T - (weights @ predicted.T) * (weights @ measured.T) / count
    whole = weights @ (predicted**2).T
    square = whole - (weights @ predicted.T) ** 2 / count
    # Where only equal predictions of a query were drawn, rounding is all that is left of both, and no slope.
    told = square > _ROUNDING * whole
    crossed, total = (np.where(told, part, 0.0).sum(axis=1) for part in (cross, square))
    return np.asarray(np.divide(crossed, total, out=np.full(len(total), np.nan), where=total > 0))
