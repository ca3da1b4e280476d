"""Figures of evaluations (they need the ``plot`` extra).

Every function draws into ``axes`` where they are given, else into a figure of its own, and returns the figure; nothing
is registered with pyplot, so there is nothing to close: ``plot_lds(results).savefig("lds.png")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from source_proj._io.printable import drawn
from source_proj.evaluate._counterfactual import Retrainings, bootstrap_weights, subset_predictions
from source_proj.evaluate.calibration import calibrate
from source_proj.evaluate.ground_truth import GroundTruth
from source_proj.evaluate.linear_datamodeling import LDS
from source_proj.evaluate.mislabelled import Mislabel
from source_proj.evaluate.removal import SubsetRemoval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_calibration", "plot_inspection", "plot_lds", "plot_removal"]


def plot_lds(results: Mapping[str, LDS], *, axes: Axes | None = None) -> Figure:
    """Draw a bar for each method, the first on top, with its interval and the noise ceiling.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for no results.
    """
    ax = _axes(axes, results, height=1.2 + 0.4 * len(results))
    places = np.arange(len(results))[::-1]
    ax.barh(places, [result.value for result in results.values()], height=0.65, color=_colours(len(results)))
    low, high = np.array([result.interval for result in results.values()]).T
    ax.hlines(places, low, high, color="black", label="95 % interval")
    known = [
        (place, result.ceiling)
        for place, result in zip(places, results.values(), strict=True)
        if result.ceiling is not None
    ]
    if known:
        at, ceilings = (np.array(column) for column in zip(*known, strict=True))
        ax.vlines(ceilings, at - 0.5, at + 0.5, color="gray", linestyle="--", label="noise ceiling")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(places, [drawn(name) for name in results])
    ax.set_xlabel("linear datamodeling score")
    ax.legend(fontsize="small")
    return _figure(ax)


def plot_removal(results: Mapping[str, SubsetRemoval], *, axes: Axes | None = None) -> Figure:
    """Draw the fraction of queries flipped against the number of removed examples, with 95 % bands.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for no results.
    """
    ax = _axes(axes, results)
    for name, result in results.items():
        (line,) = ax.plot(result.sizes, result.fraction, marker="o", label=drawn(name))
        ax.fill_between(result.sizes, *result.interval.T, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("helpful training examples removed")
    ax.set_ylabel("fraction of predictions flipped")
    ax.legend(fontsize="small")
    return _figure(ax)


def plot_inspection(results: Mapping[str, Mislabel], *, axes: Axes | None = None) -> Figure:
    """Draw the share of mislabelled examples found against the share inspected; chance is the diagonal.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for no results.
    """
    ax = _axes(axes, results)
    for name, one in results.items():
        ax.plot(np.linspace(0, 1, len(one.found)), one.found, label=drawn(f"{name}, AUC {one.auc:.3f}"))
    ax.plot([0, 1], [0, 1], color="gray", linestyle="--", label="chance")
    ax.set_xlabel("share of training examples inspected")
    ax.set_ylabel("share of mislabelled ones found")
    ax.legend(fontsize="small", loc="lower right")
    return _figure(ax)


def plot_calibration(
    scores: ArrayLike, truth: GroundTruth | ArrayLike, outcomes: ArrayLike | None = None, *, axes: Axes | None = None
) -> Figure:
    """Scatter the actual against the predicted change of every query on every subset, with the slope and the line 1.

    Changes are from the query's mean over the subsets. Arguments and errors are those of :func:`calibration`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    retrainings = Retrainings.of(truth, outcomes)
    predicted, actual = subset_predictions(scores, retrainings), retrainings.mean  # (Q, M)
    line = calibrate(predicted, actual, bootstrap_weights(predicted.shape[1], 1000, 0))
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (predicted, actual))
    ax = _axes(axes, {"": scores})
    ax.scatter(x.ravel(), y.ravel(), s=4, alpha=min(1.0, 2000 / x.size), linewidth=0, color="C0", rasterized=True)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, ends, color="gray", linestyle="--", label="slope 1")
    low, high = line.interval
    ax.plot(ends, line.slope * ends, color="C3", label=f"slope {line.slope:.2f} [{low:.2f}, {high:.2f}]")
    ax.set_xlabel("predicted change")
    ax.set_ylabel("actual change")
    ax.legend(fontsize="small", loc="upper left")
    return _figure(ax)


def _axes(axes: Axes | None, results: Mapping[str, Any], *, height: float = 4.0) -> Axes:
    if not results:
        raise ValueError("there is nothing to draw: results are empty")
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "source-proj[plot]"') from error
    return Figure(figsize=(6, height), layout="constrained").subplots()


def _figure(axes: Axes) -> Figure:
    figure: Any = axes.figure
    while figure.figure is not figure:  # axes of a subfigure
        figure = figure.figure
    made: Figure = figure
    return made


def _colours(count: int) -> list[str]:
    """The first method stands out."""
    return ["C0"] + ["lightsteelblue"] * (count - 1)
