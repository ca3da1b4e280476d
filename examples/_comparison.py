"""Compare attribution methods on the same retrainings: every method at its best setting, chosen on other queries."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _data import write_whole
from tqdm import tqdm

from source_proj.evaluate import LDS, Difference, compare, lds, mean_lds

__all__ = ["Candidate", "Row", "evaluate_methods", "write_results"]


@dataclass(frozen=True)
class Candidate:
    """A method at one setting.

    Attributes:
        method: its name; candidates of one name compete.
        setting: its setting, for the table.
        attributor: makes it on a list of banks (of one run, or of several for an ensemble).
        banks: the banks to try it on, one for each pair of training run and sketch seed.
    """

    method: str
    setting: str
    attributor: Callable[[list[Any]], Any]
    banks: Sequence[Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: name.
        setting: what was chosen (for either half of the queries, where the halves chose differently).
        single: LDS of single banks, averaged over them.
        spread: standard deviation of the LDS over banks.
        ensemble: LDS of the method's own ensemble of all banks.
        behind: LDS of the first row minus this one's.
    """

    method: str
    setting: str
    single: LDS
    spread: float
    ensemble: LDS
    behind: Difference


def evaluate_methods(
    candidates: Sequence[Candidate],
    queries: Any,
    masks: np.ndarray,
    outcomes: np.ndarray,
    *,
    columns: slice = slice(None),
) -> list[Row]:
    """LDS of every method, with paired intervals.

    The queries fall into two halves; the scores of each half come from the setting that was best on the other, so no
    query has a say in the setting it is judged by. ``columns`` picks the training examples that the masks cover.
    """
    scores: dict[str, dict[str, list[np.ndarray]]] = {}  # of each bank, by method and setting
    quality: dict[str, dict[str, np.ndarray]] = {}
    known = {(candidate.method, candidate.setting): candidate for candidate in candidates}
    for candidate in tqdm(candidates, "score", unit="setting"):
        found = [np.asarray(candidate.attributor([bank]).score(queries))[:, columns] for bank in candidate.banks]
        scores.setdefault(candidate.method, {})[candidate.setting] = found
        by_bank = [lds(one, masks, outcomes, bootstrap=0).per_query for one in found]
        quality.setdefault(candidate.method, {})[candidate.setting] = np.mean(by_bank, axis=0)
    rows: list[Row] = []
    for method, by_setting in scores.items():
        chosen = _choose(quality[method])
        first, second = (by_setting[setting] for setting in chosen)
        singles = [lds(_mix(even, odd), masks, outcomes) for even, odd in zip(first, second, strict=True)]
        ensembles = {
            setting: np.asarray(known[method, setting].attributor(list(known[method, setting].banks)).score(queries))
            for setting in set(chosen)
        }
        together = lds(_mix(*(ensembles[setting][:, columns] for setting in chosen)), masks, outcomes)
        single, spread = mean_lds(singles), float(np.std([one.value for one in singles]))
        behind = compare(rows[0].single if rows else single, single)
        rows.append(Row(method, " / ".join(dict.fromkeys(chosen)), single, spread, together, behind))
        tqdm.write(f"{method:45s} {single}")
    return rows


def _choose(by_setting: Mapping[str, np.ndarray]) -> list[str]:
    """For even and for odd queries: the setting that is best on the others."""
    return [max(by_setting, key=lambda s: float(by_setting[s][1 - half :: 2].mean())) for half in (0, 1)]


def _mix(even: np.ndarray, odd: np.ndarray) -> np.ndarray:
    mixed = even.copy()
    mixed[1::2] = odd[1::2]
    return mixed


def write_results(rows: Sequence[Row], folder: Path, name: str, title: str, notes: Sequence[str]) -> str:
    """Write ``name.md``, ``name.csv`` and ``name.png``; return the markdown."""
    header = ["method", "setting", "LDS", "95 % interval", "± over banks", "ensemble", "first − this"]
    lines = [f"# {title}", "", *[f"* {note}" for note in notes], "", "| " + " | ".join(header) + " |"]
    lines.append("|" + " --- |" * len(header))
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    markdown = "\n".join(lines) + "\n"
    write_whole(folder / f"{name}.md", markdown.encode())
    write_whole(folder / f"{name}.csv", _csv(rows).encode())
    _figure(rows, folder / f"{name}.png", title)
    return markdown


def _cells(row: Row) -> list[str]:
    low, high = row.single.interval
    difference = row.behind
    return [
        row.method,
        row.setting,
        f"{row.single.value:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{row.spread:.3f}",
        f"{row.ensemble.value:.3f}",
        f"{difference.value:+.3f} ({difference.interval[0]:+.3f} to {difference.interval[1]:+.3f})",
    ]


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["method", "setting", "lds", "low", "high", "spread", "ensemble", "ensemble_low", "ensemble_high",
         "difference", "difference_low", "difference_high", "noise_ceiling"]
    )  # fmt: skip
    for row in rows:
        numbers = [
            row.single.value, *row.single.interval, row.spread, row.ensemble.value, *row.ensemble.interval,
            row.behind.value, *row.behind.interval, row.single.ceiling if row.single.ceiling is not None else np.nan,
        ]  # fmt: skip
        writer.writerow([row.method, row.setting, *(f"{number:.5f}" for number in numbers)])
    return buffer.getvalue()


def _figure(rows: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.4), layout="constrained")
    positions = np.arange(len(rows))[::-1]
    values = np.array([row.single.value for row in rows])
    bounds = np.array([row.single.interval for row in rows])
    axes.barh(positions, values, color=["#1f77b4"] + ["#b8c4d0"] * (len(rows) - 1), height=0.65)
    axes.errorbar(values, positions, xerr=np.abs(bounds.T - values), fmt="none", ecolor="black", capsize=3)
    axes.plot([row.ensemble.value for row in rows], positions, "d", color="#d62728", label="ensemble of all banks")
    if rows[0].single.ceiling is not None:
        axes.axvline(rows[0].single.ceiling, color="gray", linestyle="--", label="noise ceiling")
    axes.set_yticks(positions, [row.method for row in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("LDS (95 % bootstrap interval over subsets)")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    plt.close(figure)
    write_whole(path, buffer.getvalue())
