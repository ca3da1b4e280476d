"""Whether self-influence finds the examples whose label was changed: the noisy tasks' second question."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _methods import Run
from _pictures import save_picture
from _problem import Problem

import source_proj as sp
from source_proj.attribution.operands import loss_gradients
from source_proj.evaluate import Mislabel, mislabel, plot_inspection

__all__ = ["find_mislabelled"]


def find_mislabelled(problem: Problem, runs: Sequence[Run], folder: Path) -> dict[str, float]:
    """Draw the inspection curves and return the areas under the ROC curve, by what marks an example as suspicious."""
    if problem.noisy is None:
        raise ValueError(f"{problem.name} has no changed labels")
    banks = [run.bank for run in runs]
    suspicions = {
        "SOURCE": sp.Source(banks, query_gradient="mean", progress=False).self_influence(),
        "SOURCE, query at the end": sp.Source(banks, query_gradient="final", progress=False).self_influence(),
        "squared gradient norm": np.mean([_squared_norms(run.plain) for run in runs], axis=0),
    }
    curves: dict[str, Mislabel] = {
        name: mislabel(suspicion[: problem.n], problem.noisy) for name, suspicion in suspicions.items()
    }
    figure = plot_inspection(curves)
    figure.axes[0].set_title(f"{problem.title}: {problem.noisy.sum():,} of {problem.n:,} labels changed")
    save_picture(figure, folder / f"{problem.name}_mislabelled.png")
    return {name: round(curve.auc, 4) for name, curve in curves.items()}


def _squared_norms(bank: sp.Bank) -> np.ndarray:
    """Of the loss gradients at the last checkpoint: GradDot's self-influence, but for a factor."""
    last = bank.stages[-1].n_checkpoints - 1
    blocks = loss_gradients(bank, len(bank.stages) - 1, last, None)
    return np.concatenate([block.rows.square().sum(1).numpy() for block in blocks])
