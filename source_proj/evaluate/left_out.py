"""Expected leave-one-out: does the score of one example say what leaving out that one changes?"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from source_proj._io.equality import EqualByValue
from source_proj.evaluate._counterfactual import (
    Retrainings,
    bootstrap_weights,
    bracketed,
    centred_interval,
    checked_scores,
    refuse_constant,
)
from source_proj.evaluate._ranks import Floats, mean_over_queries, pearson, spearman, weighted_pearson
from source_proj.evaluate.calibration import Calibration, calibrate
from source_proj.evaluate.ground_truth import GroundTruth
from source_proj.evaluate.linear_datamodeling import rank_replicates
from source_proj.evaluate.noise import split_half

__all__ = ["LeaveOneOut", "leave_one_out"]


@dataclass(frozen=True, eq=False)
class LeaveOneOut(EqualByValue):
    """Predicted against actual changes of leaving out single examples.

    Attributes:
        value: mean over queries of the rank correlation (Spearman) over the left-out examples.
        interval: its 95 % bootstrap interval over the left-out examples; NaNs when ``bootstrap=0``.
        per_query: rank correlation of each query, shape ``(Q,)``.
        ceiling: the value that a perfect predictor would reach, retraining being noisy; None for one retraining.
        pearson: mean over queries of Pearson's correlation.
        pearson_interval: its 95 % bootstrap interval.
        pearson_per_query: Pearson's correlation of each query, shape ``(Q,)``.
        pearson_ceiling: the same ceiling for Pearson's correlation.
        calibration: slope of the actual on the predicted changes, centred within each query.
        replicates: bootstrap replicates of the value, shape ``(B,)``; :func:`compare` pairs them.
        draws: fingerprint of what the replicates were drawn from.
    """

    value: float
    interval: tuple[float, float]
    per_query: Floats = field(repr=False)
    ceiling: float | None
    pearson: float
    pearson_interval: tuple[float, float]
    pearson_per_query: Floats = field(repr=False)
    pearson_ceiling: float | None
    calibration: Calibration
    replicates: Floats = field(repr=False)
    draws: str = field(repr=False)

    def __str__(self) -> str:
        """Render both correlations, slope and ceiling in one line."""
        text = (
            f"leave-one-out {self.value:.3f}{bracketed(self.interval, '.3f')}, "
            f"Pearson {self.pearson:.3f}{bracketed(self.pearson_interval, '.3f')}, "
            f"slope {self.calibration.slope:.3g}"
        )
        return text if self.ceiling is None else f"{text}, noise ceiling {self.ceiling:.3f}"


def leave_one_out(
    scores: ArrayLike,
    truth: GroundTruth | ArrayLike,
    outcomes: ArrayLike | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> LeaveOneOut:
    """Correlate predicted with actual changes when single examples are left out of training.

    The actual change of query q by example z is the mean measurement of models retrained without z minus that of
    models retrained on everything, both over seeds: the *expected* leave-one-out effect, of which single retrainings
    are noisy samples. The predicted change is ``-score(q, z)``, at fixed 1/N. A retraining that takes the mean loss
    of the N − 1 others also raises their weights: at first order it changes q by

        ``-N/(N-1) score(q, z) + 1/(N-1) Σ_z' score(q, z')``

    (``Scores.predict_removal(…, renormalize=True)``). The second term is the same for every z, so correlations don't
    see the difference, and an exact method's slope is N/(N − 1), hardly above 1. The noise of the models that are
    trained on everything shifts all changes of a query alike, and cancels too.

    Args:
        scores: ``(Q, N)``; positive means that including the example raises the query's measurement.
        truth: a :class:`GroundTruth` made by :meth:`GroundTruth.leave_one_out`; or its masks ``(E + 1, N)`` bool, of
            which the first row keeps all and each other one drops one example.
        outcomes: with masks: measurements ``(E + 1, R, Q)``, or ``(E + 1, Q)`` for one retraining.
        bootstrap: number of resamplings of the left-out examples; 0 for none.
        seed: seed of the resampling.

    Raises:
        TypeError: if masks are not boolean, or come without outcomes.
        ValueError: for masks that are no leave-one-out, fewer than three left-out examples, non-finite values, or a
            query whose predicted or actual changes are all the same.
        MismatchError: if scores and retrainings disagree on examples or queries.
        SourceProjError: if retrainings of the store are missing or damaged.

    Example:
        >>> masks = np.vstack([np.ones(6, bool), ~np.eye(6, dtype=bool)])
        >>> effect = np.array([[3.0, -1.0, 2.0, 0.5, 0.0, 1.0]])
        >>> result = leave_one_out(effect / 2, masks, masks @ effect.T, bootstrap=0)
        >>> round(result.value, 6), round(result.pearson, 6), round(result.calibration.slope, 6)
        (1.0, 1.0, 2.0)
    """
    retrainings = Retrainings.of(truth, outcomes)
    left_out = _left_out(retrainings.masks)
    predicted = -np.asarray(checked_scores(scores, retrainings)[:, left_out], dtype=np.float64)  # (Q, E)
    means = retrainings.mean  # (Q, E + 1)
    actual = np.ascontiguousarray(means[:, 1:] - means[:, :1])
    refuse_constant(np.ptp(predicted, axis=1) == 0, 0, "the scores of all left-out examples are the same")
    refuse_constant(np.ptp(actual, axis=1) == 0, 0, "the outcomes are the same whichever example is left out")
    weights = bootstrap_weights(len(left_out), bootstrap, seed)
    ranked, linear = spearman(predicted, actual), pearson(predicted, actual)
    rank_draws = rank_replicates(predicted, actual, weights)
    pairs = (weighted_pearson(series, other, weights) for series, other in zip(predicted, actual, strict=True))
    linear_draws = mean_over_queries(pairs, len(weights))
    noisy = retrainings.measured.shape[1] > 1
    return LeaveOneOut(
        value=float(ranked.mean()),
        interval=centred_interval(float(ranked.mean()), rank_draws, bound=1.0),
        per_query=ranked,
        ceiling=split_half(retrainings.measured[1:], spearman, seed)[1] if noisy else None,
        pearson=float(linear.mean()),
        pearson_interval=centred_interval(float(linear.mean()), linear_draws, bound=1.0),
        pearson_per_query=linear,
        pearson_ceiling=split_half(retrainings.measured[1:], pearson, seed)[1] if noisy else None,
        calibration=calibrate(predicted, actual, weights),
        replicates=rank_draws,
        draws=retrainings.fingerprint("leave one out", bootstrap, seed),
    )


def _left_out(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Which example each row but the first drops."""
    dropped = (~masks).sum(axis=1)
    wrong = np.flatnonzero(dropped != np.minimum(np.arange(len(masks)), 1))
    if len(wrong):
        raise ValueError(
            f"leave-one-out needs a first subset that keeps all examples and others that drop one; subset {wrong[0]} "
            f"drops {dropped[wrong[0]]}: make the retrainings with GroundTruth.leave_one_out"
        )
    if len(masks) < 4:
        raise ValueError(f"a correlation over left-out examples needs at least 3 of them, got {len(masks) - 1}")
    return np.asarray(np.argmin(masks[1:], axis=1))
