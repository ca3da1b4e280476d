"""What chance explains: means over few or unequal queries, their errors, and how far beyond these a value lies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Spread", "beyond_chance", "pooled_freedom", "student_cdf", "student_quantile"]

_TINY, _PRECISION = 1e-300, 1e-13
_LARGEST = 1e150  # whose square is a number
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t for 1 to 10 degrees of freedom."""

_NORMAL_FROM = 1e5  # degrees of freedom: from here on tails are the normal ones to 1 % at six standard errors


class Spread(NamedTuple):
    r"""What weights :math:`p_q`, which sum to 1, make of the error of a weighted mean over independent queries.

    Attributes:
        factor: the error's square over the weighted variance :math:`\sum_q p_q (s_q - \bar s)^2`. That of
            :math:`\bar s` is :math:`\sum_q p_q^2` times the variance of a query, of which the weighted variance is
            :math:`1 - \sum_q p_q^2` on average: the more of the weight few queries have, the more their own values
            draw the mean along. NaN for one query.
        freedom: degrees of freedom of the chi-squared distribution that has the first two moments of the weighted
            variance (Satterthwaite 1946, https://doi.org/10.2307/3002019); n - 1 for n equal weights.
    """

    factor: float
    freedom: float

    @classmethod
    def of(cls, weights: np.ndarray) -> Spread:
        """That of weights above 0, ``(n,)``."""
        most = len(weights) - 1
        if not most:
            return cls(np.nan, 0.0)
        p = weights / weights.sum()
        two = float(p @ p)
        left = float(p @ (1 - p))  # 1 - Σ p², without its rounding
        square = float(p**2 @ ((1 - p) ** 2 + np.maximum(two - p**2, 0)))
        return cls(two / left, float(np.clip(left**2 / square, 1, most)))


def pooled_freedom(errors: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Degrees of freedom of the sum of independent means (Welch 1947), ``(N,)``.

    Args:
        errors: the standard errors of G means of each of N, ``(G, N)``.
        freedom: those of each mean's error, ``(G,)``.
    """
    largest = errors.max(0)
    shares = np.divide(errors, largest, out=np.ones_like(errors), where=largest > 0) ** 2
    return np.asarray(shares.sum(0) ** 2 / (shares**2 / freedom[:, None]).sum(0))


def beyond_chance(benefit: np.ndarray, error: np.ndarray, freedom: np.ndarray, false_share: float) -> np.ndarray:
    """Positions of the benefits below 0 by more than their standard errors explain; see :func:`harmful`.

    Args:
        benefit: a mean for each of N examples.
        error: their standard errors ``(N,)``.
        freedom: degrees of freedom of these ``(N,)``.
        false_share: share of those named that may be named by chance.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.where(benefit == 0, 0.0, benefit / error)
    chance = student_cdf(deviation, freedom)  # P(as harmful | no effect)
    order = np.argsort(chance, kind="stable")
    passed = np.flatnonzero(chance[order] <= false_share * np.arange(1, len(order) + 1) / len(order))
    return np.asarray(order[: passed[-1] + 1] if len(passed) else order[:0])


def student_cdf(values: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """P(T ≤ value) of Student's t, to ten digits of the smaller tail, ``(N,)``.

    Example:
        >>> student_cdf(np.array([-1.0, 0.0, 1.0]), np.ones(3)).round(6).tolist()
        [0.25, 0.5, 0.75]
    """
    normal: np.ndarray = torch.special.ndtr(torch.from_numpy(values)).numpy()
    few = freedom < _NORMAL_FROM
    squares, own = np.minimum(np.abs(values[few]), _LARGEST) ** 2, freedom[few]
    tail = _incomplete_beta(own / 2, own / (own + squares), squares / (own + squares)) / 2
    tail[np.isinf(values[few])] = 0
    normal[few] = np.where(values[few] < 0, tail, 1 - tail)
    return normal


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t, to three digits; above ten degrees by its expansion in 1/freedom."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = 1.959964
    # Abramowitz and Stegun, 26.7.5
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _incomplete_beta(a: np.ndarray, x: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Regularised incomplete beta function I_x(a, 1/2), ``rest`` being 1 - x."""
    half = np.full_like(a, 0.5)
    near = x < (a + 1) / (a + 2.5)  # where the fraction converges quickly; elsewhere that of the other end does
    first, second = np.where(near, a, half), np.where(near, half, a)
    at, other = np.where(near, x, rest), np.where(near, rest, x)
    gammas = (torch.lgamma(torch.from_numpy(part)).numpy() for part in (first + second, first, second))
    whole, one, two = gammas
    with np.errstate(divide="ignore"):
        scale = np.exp(whole - one - two + first * np.log(at) + second * np.log(other)) / first
    value = scale * _fraction(first, second, at)
    return np.asarray(np.where(near, value, 1 - value))


def _fraction(a: np.ndarray, b: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The continued fraction of the incomplete beta function, by Lentz (Press et al., Numerical Recipes, 6.4)."""
    c, d = np.ones_like(x), 1 / _away(1 - (a + b) * x / (a + 1))
    value = d.copy()
    for m in range(1, 20_000):  # it takes some √a
        before = value.copy()
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = _away(1 + term / c), 1 / _away(1 + term * d)
            value *= c * d
        if np.all(np.abs(value - before) <= _PRECISION * np.abs(value)):
            break
    return value


def _away(values: np.ndarray) -> np.ndarray:
    """Keep from dividing by zero."""
    return np.where(np.abs(values) < _TINY, _TINY, values)
