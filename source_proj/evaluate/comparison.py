"""Compare attribution methods on the same retrainings, each at its best setting, chosen on other queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from source_proj._io.numbers import plain_numbers
from source_proj._io.progress import Bar, Progress, progress_bar
from source_proj.evaluate.calibration import Calibration, calibration
from source_proj.evaluate.linear_datamodeling import LDS, Difference, compare, lds, mean_lds

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Candidate", "Comparison", "MethodResult", "compare_methods"]

Matrix = NDArray[Any]


@dataclass(frozen=True)
class Candidate:
    """A method at one setting.

    Attributes:
        method: its name; candidates of one name compete for the best setting.
        setting: its setting, for the table.
        scores: computes the scores ``(Q, N)`` of each training run, in order.
        ensemble: computes the scores of all runs together, where that is not their mean (TRAK).
        calibrated: whether the scores claim to be changes of the measurement.
    """

    method: str
    setting: str
    scores: Callable[[], Sequence[ArrayLike]]
    ensemble: Callable[[], ArrayLike] | None = None
    calibrated: bool = True


@dataclass(frozen=True)
class MethodResult:
    """What came out for one method.

    Attributes:
        method: name.
        setting: what was chosen; two settings where the halves of the queries chose differently.
        single: LDS of one run's scores, mean over the runs.
        spread: standard deviation of the LDS over the runs.
        multiple: LDS of all runs' scores together; None for one run.
        slope: calibration of the scores of all runs; None for similarities.
        single_behind: LDS of the first method minus this one's, single runs.
        multiple_behind: the same for all runs together.
        scores: the scores of all runs together, ``(Q, N)``.
    """

    method: str
    setting: str
    single: LDS
    spread: float
    multiple: LDS | None
    slope: Calibration | None
    single_behind: Difference
    multiple_behind: Difference | None
    scores: Matrix = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """The outcome, in the order in which the methods were given; differences are to the first."""

    results: tuple[MethodResult, ...]

    def __getitem__(self, method: str) -> MethodResult:
        """Return the result of a method."""
        for result in self.results:
            if result.method == method:
                return result
        raise KeyError(f"no method {method!r}; there are {[result.method for result in self.results]}")

    def behind(self, method: str) -> pd.DataFrame:
        """By how much a method is ahead of each, paired (needs the ``pandas`` extra).

        Columns: method, runs ("single" or "multiple"), and diff, diff_low, diff_high: the LDS of ``method`` minus that
        one's, with its 95 % interval by bootstrap over subsets.

        Raises:
            KeyError: there is no such method.
        """
        pd, reference = _pandas("behind"), self[method]
        pairs = [
            (result.method, runs, compare(first, own))
            for result in self.results
            for runs, first, own in (
                ("single", reference.single, result.single),
                ("multiple", reference.multiple, result.multiple),
            )
            if first is not None and own is not None
        ]
        rows = [(name, runs, behind.value, *behind.interval) for name, runs, behind in pairs]
        return pd.DataFrame(rows, columns=["method", "runs", "diff", "diff_low", "diff_high"])

    def table(self) -> pd.DataFrame:
        """One row for each method and number of runs (needs the ``pandas`` extra).

        Columns: method, runs ("single" or "multiple"), setting, lds, low, high (95 % bootstrap over subsets), spread
        (over runs), ceiling, slope, slope_low, slope_high, and diff, diff_low, diff_high (the first method's LDS minus
        this one's, paired).
        """
        pd = _pandas("table")
        rows = []
        for result in self.results:
            rows.append(_row(result, "single", result.single, result.single_behind))
            if result.multiple is not None and result.multiple_behind is not None:
                rows.append(_row(result, "multiple", result.multiple, result.multiple_behind))
        return pd.DataFrame(rows)


def compare_methods(
    candidates: Sequence[Candidate], masks: ArrayLike, outcomes: ArrayLike, *, progress: Progress = True
) -> Comparison:
    """LDS of every method, single and over several runs, with paired intervals.

    The queries fall into two halves; the scores of each half come from the setting that was best on the other one (by
    the mean LDS of single runs), so that no query has a say in the setting it is judged by, and every method is seen
    at its best. A search for the best setting takes two queries at least.

    Args:
        candidates: methods and settings; the first one's method is what the others are compared with.
        masks: ``(M, N)`` bool; True marks an example that a subset keeps.
        outcomes: measurements ``(M, R, Q)``.
        progress: show a progress bar.

    Raises:
        ValueError, MismatchError: see :func:`lds`; ValueError also for no candidates, two of one name and setting, one
            query where a method has several settings, and a candidate that computes no scores, or scores that are not
            finite.

    Example:
        >>> from source_proj.evaluate import half_subsets
        >>> masks, rng = half_subsets(40, 25), np.random.default_rng(0)
        >>> effect, noise = rng.normal(size=(2, 6, 40))
        >>> right = Candidate("right", "", lambda: [effect, effect])
        >>> wrong = Candidate("wrong", "", lambda: [noise, noise])
        >>> comparison = compare_methods([right, wrong], masks, (masks @ effect.T)[:, None], progress=False)
        >>> round(comparison["right"].single.value, 6), comparison["wrong"].single_behind.significant
        (1.0, True)
        >>> bool((comparison.behind("wrong")["diff"] <= 0).all())
        True
    """
    names = [(candidate.method, candidate.setting) for candidate in candidates]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"candidates need different pairs of method and setting, at least one; got {names}")
    by_method: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_method.setdefault(candidate.method, []).append(candidate)
    kept, measured = np.asarray(plain_numbers(masks)), np.asarray(plain_numbers(outcomes))
    searched = [method for method, own in by_method.items() if len(own) > 1]
    if searched and measured.shape[-1:] == (1,):
        raise ValueError(
            f"the best setting of {searched[0]!r} is chosen on other queries than those it is judged by, and there is "
            "one query: give at least two, or one setting"
        )
    results: list[MethodResult] = []
    with progress_bar(progress, "score", len(candidates), "settings") as bar:
        for own in by_method.values():
            results.append(_judge(own, kept, measured, results[0] if results else None, bar))
    return Comparison(tuple(results))


def _judge(
    own: Sequence[Candidate], masks: Matrix, outcomes: Matrix, first: MethodResult | None, bar: Bar
) -> MethodResult:
    runs: dict[str, list[Matrix]] = {}
    quality: dict[str, Matrix] = {}
    for candidate in own:
        bar.describe(f"score, {candidate.method}, {candidate.setting}"[:60])
        runs[candidate.setting] = [_finite(candidate, run) for run in candidate.scores()]
        if len(runs[candidate.setting]) != len(runs[own[0].setting]) or not runs[candidate.setting]:
            raise ValueError(
                f"{_named(candidate)} has scores of {len(runs[candidate.setting])} runs: give those of each run, at "
                "least one, and as many as of its other settings"
            )
        per_run = [lds(run, masks, outcomes, bootstrap=0).per_query for run in runs[candidate.setting]]
        quality[candidate.setting] = np.mean(per_run, axis=0)
        bar.update()
    chosen = _choose(quality)
    even, odd = (runs[setting] for setting in chosen)
    singles = [lds(_mix(a, b), masks, outcomes) for a, b in zip(even, odd, strict=True)]
    single = mean_lds(singles)
    combined = {setting: _together(own, setting, runs[setting]) for setting in dict.fromkeys(chosen)}
    scores = _mix(*(combined[setting] for setting in chosen))
    multiple = lds(scores, masks, outcomes) if len(singles) > 1 else None
    together_first = first.multiple if first is not None else multiple
    return MethodResult(
        method=own[0].method,
        setting=" / ".join(dict.fromkeys(chosen)),
        single=single,
        spread=float(np.std([run.value for run in singles])),
        multiple=multiple,
        slope=calibration(scores, masks, outcomes) if own[0].calibrated else None,
        single_behind=compare(first.single if first is not None else single, single),
        multiple_behind=compare(together_first, multiple) if together_first and multiple else None,
        scores=scores,
    )


def _choose(quality: Mapping[str, Matrix]) -> tuple[str, str]:
    """For even and for odd queries: the setting that is best on the others; the only one, where there is no other."""
    if len(quality) == 1:
        (only,) = quality
        return only, only
    even, odd = (max(quality, key=lambda s: float(quality[s][other::2].mean())) for other in (1, 0))
    return even, odd


def _named(candidate: Candidate) -> str:
    return f"the candidate {candidate.method!r}, {candidate.setting!r}"


def _finite(candidate: Candidate, scores: ArrayLike) -> Matrix:
    """A candidate's scores in float32.

    Raises:
        ValueError: some are not finite, and their LDS would be neither better nor worse than another.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(plain_numbers(scores), dtype=np.float32)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{_named(candidate)} has {len(bad)} scores that are not finite in float32, the first at (query, "
            f"example) = {tuple(bad[0].tolist())}: leave the candidate out, or mend them"
        )
    return values


def _mix(even: Matrix, odd: Matrix) -> Matrix:
    mixed = even.copy()
    mixed[1::2] = odd[1::2]
    return mixed


def _together(own: Sequence[Candidate], setting: str, runs: Sequence[Matrix]) -> Matrix:
    (candidate,) = (candidate for candidate in own if candidate.setting == setting)
    if candidate.ensemble is None or len(runs) == 1:
        return np.asarray(np.mean(runs, axis=0))
    return _finite(candidate, candidate.ensemble())


def _pandas(wanted: str) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(f'{wanted} needs pandas: pip install "source-proj[pandas]"') from error
    return pd


def _row(judged: MethodResult, runs: str, result: LDS, behind: Difference) -> dict[str, Any]:
    nothing = (float("nan"), float("nan"))
    return {
        "method": judged.method,
        "runs": runs,
        "setting": judged.setting,
        "lds": result.value,
        "low": result.interval[0],
        "high": result.interval[1],
        "spread": judged.spread,
        "ceiling": float("nan") if result.ceiling is None else result.ceiling,
        "slope": float("nan") if judged.slope is None else judged.slope.slope,
        "slope_low": (judged.slope.interval if judged.slope else nothing)[0],
        "slope_high": (judged.slope.interval if judged.slope else nothing)[1],
        "diff": behind.value,
        "diff_low": behind.interval[0],
        "diff_high": behind.interval[1],
    }
