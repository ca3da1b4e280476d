"""The learning-rate schedules of transformers, and which of them agrees with the rates that a run left behind.

A Trainer writes neither the name of its schedule nor its warm-up into a checkpoint, but it leaves rates: those that it
logged, and the next one in each ``scheduler.pt``. All schedules are compared with these, under every length of warm-up;
where the ones that agree give one and the same integral, the rates in between are known.

Formulas: ``transformers.optimization`` (https://github.com/huggingface/transformers/blob/main/src/transformers/
optimization.py), with :math:`w` warm-up steps of :math:`T`; the first are at :math:`η t/w` under all but "constant".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

__all__ = ["NAMES", "Fit", "agreeing", "learning_rates", "same_integral"]

_Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
# A logged rate is a float64 printed whole; what differs is the order of a handful of operations.
_RELATIVE = 1e-9
_INVERSE_SQRT_TIMESCALE, _POLYNOMIAL_END = 10_000, 1e-7  # transformers' defaults


@dataclass(frozen=True)
class Fit:
    """Schedules of one name that agree with all known rates: warm-ups from ``lowest`` to ``highest`` steps."""

    name: str
    lowest: int
    highest: int

    def __str__(self) -> str:
        warmup = str(self.lowest) if self.lowest == self.highest else f"{self.lowest} to {self.highest}"
        return f"{self.name!r} with {warmup} warm-up steps"


def learning_rates(name: str, updates: Any, warmup: Any, total: int, base: float) -> _Array:
    """Learning rate of updates (from 0) of a run of ``total`` updates; updates and warm-ups may be arrays.

    Args:
        name: one of :data:`NAMES`, with transformers' default for every other setting.
        updates: numbers of updates.
        warmup: warm-up steps w.
        total: steps T that the schedule was made for.
        base: peak learning rate η.

    Raises:
        ValueError: no such schedule.

    Example:
        >>> learning_rates("linear", np.arange(6), 2, 6, 1.0).tolist()
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
        >>> learning_rates("cosine", np.array([0, 3]), 0, 6, 1.0).round(6).tolist()
        [1.0, 0.5]
    """
    if name not in _DECAYS:
        raise ValueError(f"schedule {name!r} is none of {', '.join(NAMES)}: give a function of the update's number")
    t, w = np.broadcast_arrays(np.asarray(updates, dtype=np.float64), np.asarray(warmup, dtype=np.float64))
    progress = (t - w) / np.maximum(1.0, total - w)
    with np.errstate(invalid="ignore", divide="ignore"):  # of the branch that is not taken
        factor = _DECAYS[name](t, w, progress, base)
    if name != "constant":
        factor = np.where(t < w, t / np.maximum(1.0, w), factor)
    return base * factor


def _linear(_t: _Array, _w: _Array, progress: _Array, _base: float) -> _Array:
    return np.maximum(0.0, 1.0 - progress)


def _cosine(_t: _Array, _w: _Array, progress: _Array, _base: float) -> _Array:
    return np.maximum(0.0, 0.5 * (1.0 + np.cos(np.pi * progress)))


def _polynomial(_t: _Array, _w: _Array, progress: _Array, base: float) -> _Array:
    end = _POLYNOMIAL_END / base if base > 0 else 0.0
    return np.where(progress > 1, end, (1.0 - end) * (1.0 - progress) + end)


def _inverse_sqrt(t: _Array, w: _Array, _progress: _Array, _base: float) -> _Array:
    timescale = np.where(w > 0, w, _INVERSE_SQRT_TIMESCALE)
    return 1.0 / np.sqrt((t + timescale - w) / timescale)


def _constant(t: _Array, _w: _Array, _progress: _Array, _base: float) -> _Array:
    return np.ones_like(t)


_DECAYS: dict[str, Callable[[_Array, _Array, _Array, float], _Array]] = {
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "constant": _constant,
    "constant_with_warmup": _constant,
}
NAMES = tuple(_DECAYS)
"""Schedules by transformers' names, ``lr_scheduler_type``."""


def agreeing(
    known: Mapping[int, float], total: int, base: float, names: Sequence[str] = NAMES, warmup: int | None = None
) -> list[Fit]:
    """Schedules that give every known rate.

    Args:
        known: update's number → learning rate.
        total: steps that the schedule was made for.
        base: peak learning rate.
        names: schedules that come into question.
        warmup: warm-up steps, if they are known; else all from 0 to ``total`` come into question.

    Example:
        >>> [str(fit) for fit in agreeing({3: 0.75, 5: 0.25}, 6, 1.0)]
        ["'linear' with 2 warm-up steps"]
    """
    fits = []
    for name in names:
        warmups = np.arange(total + 1) if warmup is None else np.array([warmup])
        if name == "constant":
            warmups = warmups[:1]  # it knows none
        for update, rate in known.items():
            given = learning_rates(name, update, warmups, total, base)
            warmups = warmups[np.abs(given - rate) <= _RELATIVE * base]
        if len(warmups):
            fits.append(Fit(name, int(warmups[0]), int(warmups[-1])))
    return fits


def same_integral(fits: Sequence[Fit], updates: range, total: int, base: float) -> bool:
    """Whether all these schedules give one learning rate summed over the updates, to a millionth."""
    at = np.arange(updates.start, updates.stop)
    sums = [
        float(learning_rates(fit.name, at, warmup, total, base).sum())
        for fit in fits
        for warmup in {fit.lowest, fit.highest}  # the rates before the decay fall as the warm-up grows
    ]
    return max(sums) - min(sums) <= 1e-6 * max(sums)
