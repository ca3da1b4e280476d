"""The linear datamodeling score: do attributed scores rank what retraining really does?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from source_proj._errors import MismatchError
from source_proj._io.equality import EqualByValue
from source_proj.evaluate._counterfactual import (
    Retrainings,
    bootstrap_weights,
    bracketed,
    centred_interval,
    percentile_interval,
    subset_predictions,
)
from source_proj.evaluate._ranks import Floats, RankedSeries, mean_over_queries, spearman, weighted_spearman
from source_proj.evaluate.calibration import Calibration, calibrate
from source_proj.evaluate.ground_truth import GroundTruth
from source_proj.evaluate.noise import noise_ceiling

__all__ = ["LDS", "Difference", "Paired", "compare", "lds", "mean_lds", "rank_replicates"]


@dataclass(frozen=True, eq=False)
class LDS(EqualByValue):
    """Linear datamodeling score of one method.

    Attributes:
        value: mean over queries of the rank correlation.
        interval: 95 % bootstrap interval over subsets, the value ± 1.96 standard deviations of its replicates; with 30
            subsets it covered the truth of drawn problems in 93 %, with 100 in 96 %. NaNs when ``bootstrap=0``.
        per_query: rank correlation of each query, shape ``(Q,)``.
        ceiling: what a perfect predictor would reach, the retrainings being noisy; None for one retraining.
        reliability: share of the outcomes' variance that is not retraining noise; None for one retraining.
        calibration: slope of the outcomes on the predictions, see :func:`calibration`; a rank correlation says
            nothing of the scores' unit.
        replicates: bootstrap replicates of the value, shape ``(B,)``; two results over the same subsets,
            seed and B are paired, which :func:`compare` and :func:`mean_lds` use.
        draws: fingerprint of what the replicates were drawn from.
    """

    value: float
    interval: tuple[float, float]
    per_query: Floats = field(repr=False)
    ceiling: float | None
    reliability: float | None
    calibration: Calibration
    replicates: Floats = field(repr=False)
    draws: str = field(repr=False)

    def __str__(self) -> str:
        """Render value, interval, slope and ceiling in one line."""
        text = f"LDS {self.value:.3f}{bracketed(self.interval, '.3f')}"
        text += f", slope {self.calibration.slope:.3g} (actual on predicted)"
        return text if self.ceiling is None else f"{text}, noise ceiling {self.ceiling:.3f}"


class Paired(Protocol):
    """A result whose bootstrap replicates can be paired with another's: :class:`LDS`, :class:`LeaveOneOut`."""

    @property
    def value(self) -> float:
        """The result."""

    @property
    def replicates(self) -> Floats:
        """Its bootstrap replicates ``(B,)``."""

    @property
    def draws(self) -> str:
        """Fingerprint of what the replicates were drawn from."""


@dataclass(frozen=True, eq=False)
class Difference(EqualByValue):
    """Value of one method minus that of another, on the same retrainings.

    Attributes:
        value: the difference.
        interval: its 95 % paired bootstrap interval, likewise; excludes 0 when the difference is beyond chance. NaNs
            when ``bootstrap=0``.
    """

    value: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        """Render value and interval in one line."""
        return f"{self.value:+.3f}{bracketed(self.interval, '+.3f')}"

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero; False without a bootstrap, which knows no interval."""
        return self.interval[0] > 0 or self.interval[1] < 0


def lds(
    scores: ArrayLike,
    truth: GroundTruth | ArrayLike,
    outcomes: ArrayLike | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> LDS:
    """Linear datamodeling score: rank correlation of predicted and measured outcomes over retrained subsets.

    For every query, ``Σ_{z in subset} score(q, z)`` is correlated (Spearman) over the M subsets with the
    measurement averaged over R retrainings on that subset; the value is the mean over queries
    (Park et al. 2023, https://arxiv.org/abs/2303.14186, definition 2.2). The bootstrap resamples subsets.

    Args:
        scores: ``(Q, N)``; positive means that including the example raises the query's measurement.
        truth: a :class:`GroundTruth`; or masks ``(M, N)`` bool, where True marks an example the subset keeps.
        outcomes: with masks: measurements ``(M, R, Q)``, or ``(M, Q)`` for one retraining per subset.
        bootstrap: number of resamplings; 0 for none (a point estimate, e.g. in a grid search).
        seed: seed of the resampling.

    Returns:
        The score with its interval, per-query values, noise ceiling and calibration.

    Raises:
        TypeError: if masks are not boolean, or come without outcomes.
        ValueError: for wrong dimensions, non-finite values, fewer than three subsets, or a query whose
            predictions or outcomes are constant.
        MismatchError: if the three disagree on subsets, examples or queries.
        SourceProjError: if retrainings of the store are missing or damaged.

    Example:
        >>> from source_proj.evaluate import half_subsets
        >>> masks = half_subsets(40, 25)
        >>> effect = np.linspace(-1, 1, 40)[None, :]
        >>> lds(effect, masks, masks @ effect.T, bootstrap=0).value
        1.0
    """
    retrainings = Retrainings.of(truth, outcomes)
    predicted, measured = subset_predictions(scores, retrainings), retrainings.mean
    per_query = spearman(predicted, measured)
    value = float(per_query.mean())
    weights = bootstrap_weights(len(retrainings.masks), bootstrap, seed)
    replicates = rank_replicates(predicted, measured, weights)
    reliability = ceiling = None
    if retrainings.measured.shape[1] > 1:
        reliability, ceiling = noise_ceiling(retrainings.measured)
    return LDS(
        value=value,
        interval=centred_interval(value, replicates, bound=1.0),
        per_query=per_query,
        ceiling=ceiling,
        reliability=reliability,
        calibration=calibrate(predicted, measured, weights),
        replicates=replicates,
        draws=retrainings.fingerprint("lds", bootstrap, seed),
    )


def compare(first: Paired, second: Paired) -> Difference:
    """Difference ``first − second`` of two LDS or two leave-one-out results, with its paired bootstrap interval.

    Raises:
        MismatchError: if the two were not computed on the same retrainings with the same bootstrap and seed.

    Example:
        >>> from source_proj.evaluate import half_subsets
        >>> masks, rng = half_subsets(40, 25), np.random.default_rng(0)
        >>> effect, unrelated = rng.normal(size=(2, 3, 40))
        >>> outcomes = masks @ effect.T
        >>> compare(lds(effect, masks, outcomes), lds(unrelated, masks, outcomes)).significant
        True
    """
    _require_paired([first, second])
    value = first.value - second.value
    return Difference(value, centred_interval(value, first.replicates - second.replicates, bound=2.0))


def mean_lds(results: Sequence[LDS]) -> LDS:
    """Mean LDS (and calibration) of one method over training runs or sketch seeds, with a paired bootstrap interval.

    The interval covers the choice of subsets, not the choice of runs.

    Raises:
        ValueError: for no results.
        MismatchError: if they were not computed on the same retrainings with the same bootstrap and seed.
    """
    results = list(results)
    if not results:
        raise ValueError("mean_lds needs at least one result, got none")
    _require_paired(results)
    replicates = np.mean([result.replicates for result in results], axis=0)
    value = float(np.mean([result.value for result in results]))
    slopes = [result.calibration for result in results]
    slope_replicates = np.mean([slope.replicates for slope in slopes], axis=0)
    return LDS(
        value=value,
        interval=centred_interval(value, replicates, bound=1.0),
        per_query=np.mean([result.per_query for result in results], axis=0),
        ceiling=results[0].ceiling,
        reliability=results[0].reliability,
        calibration=Calibration(
            slope=float(np.mean([slope.slope for slope in slopes])),
            interval=percentile_interval(slope_replicates),
            per_query=np.mean([slope.per_query for slope in slopes], axis=0),
            correlation=float(np.mean([slope.correlation for slope in slopes])),
            replicates=slope_replicates,
        ),
        replicates=replicates,
        draws=results[0].draws,
    )


def rank_replicates(predicted: Floats, measured: Floats, weights: Floats) -> Floats:
    """Rank correlation, mean over queries, of ``(Q, M)`` with ``(Q, M)`` in every resampling: ``(B,)``."""
    if len(weights) == 0:
        return np.empty(0)
    left, right = RankedSeries.of(predicted), RankedSeries.of(measured)
    by_query = (weighted_spearman(left[query], right[query], weights) for query in range(len(predicted)))
    return mean_over_queries(by_query, len(weights))


def _require_paired(results: Sequence[Paired]) -> None:
    if len({result.draws for result in results}) > 1:
        raise MismatchError(
            "these results are not paired (draws "
            + ", ".join(result.draws[:8] for result in results)
            + "); compute them on the same masks and outcomes, with the same bootstrap and seed"
        )
