"""Finding mislabelled examples by self-influence (or any other suspicion)."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from source_proj._errors import MismatchError
from source_proj._io.equality import EqualByValue
from source_proj._io.numbers import plain_numbers
from source_proj.evaluate._ranks import Floats, midranks

__all__ = ["Mislabel", "mislabel"]


@dataclass(frozen=True, eq=False)
class Mislabel(EqualByValue):
    """How well a suspicion score separates mislabelled from correct examples.

    Attributes:
        auc: area under the ROC curve: the chance that a mislabelled example is more suspicious than a
            correct one, ties counting half.
        found: ``(N + 1,)``; ``found[i]`` is the share of mislabelled examples among the i most suspicious
            (the expected share, where equal suspicions leave the order open).
        order: examples from the most to the least suspicious, ``(N,)``.
    """

    auc: float
    found: Floats = field(repr=False)
    order: np.ndarray = field(repr=False)

    def found_at(self, share: float) -> float:
        """Share of the mislabelled examples met when inspecting the most suspicious ``share`` of the set.

        Raises:
            ValueError: if share lies outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        return float(np.interp(share * (len(self.found) - 1), np.arange(len(self.found)), self.found))


def mislabel(self_influence: ArrayLike, is_noisy: ArrayLike) -> Mislabel:
    """Rank examples by self-influence and compare with the known mislabelled ones.

    A mislabelled example is fitted by no other than itself, so its influence on its own loss stands out
    (Koh & Liang 2017, https://arxiv.org/abs/1703.04730, section 5.4).

    Args:
        self_influence: ``(N,)``; larger is more suspicious. Losses or any other suspicion serve too.
        is_noisy: ``(N,)`` bool; True marks a mislabelled example.

    Raises:
        TypeError: if is_noisy is not boolean.
        ValueError: for wrong dimensions, non-finite values, or labels all noisy or all clean.
        MismatchError: if the two differ in length.

    Example:
        >>> result = mislabel([0.9, 0.1, 0.4, 0.2], np.array([True, False, False, True]))
        >>> result.auc, result.found_at(0.25)
        (0.75, 0.5)
    """
    suspicion = np.asarray(plain_numbers(self_influence), dtype=np.float64)
    noisy = np.asarray(plain_numbers(is_noisy))
    if noisy.dtype != np.bool_:
        raise TypeError(f"is_noisy must be boolean, True for a mislabelled example; got dtype {noisy.dtype}")
    if suspicion.ndim != 1 or noisy.ndim != 1:
        raise ValueError(f"self_influence and is_noisy must be vectors, got shapes {suspicion.shape}, {noisy.shape}")
    if len(suspicion) != len(noisy):
        raise MismatchError(f"{len(suspicion)} values of self-influence but {len(noisy)} labels; give one of each")
    bad = np.flatnonzero(~np.isfinite(suspicion))
    if len(bad):
        raise ValueError(f"self_influence is not finite for {len(bad)} examples, the first at index {bad[0]}")
    positives = int(noisy.sum())
    negatives = len(noisy) - positives
    if positives == 0 or negatives == 0:
        raise ValueError(f"need both noisy and clean examples to compare, got {positives} noisy, {negatives} clean")
    rank_sum = midranks(suspicion)[noisy].sum()  # Mann-Whitney U gives the area
    auc = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    order = np.argsort(-suspicion, kind="stable")
    return Mislabel(float(auc), _inspection_curve(suspicion[order], noisy[order]) / positives, order)


def _inspection_curve(ordered: Floats, noisy: np.ndarray) -> Floats:
    """Expected number of noisy examples among the first i, for i = 0..N: linear within tied groups."""
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)) + 1
    knots = np.concatenate([[0], ends])
    counts = np.concatenate([[0], np.cumsum(noisy)])
    return np.asarray(np.interp(np.arange(len(ordered) + 1), knots, counts[knots]))
