"""Schedule-free averaging: how much of a step at z reaches the weights that are kept."""

from __future__ import annotations

from itertools import accumulate

from source_proj.trajectory.optimizers.base import Updates

__all__ = ["averaging_factors"]


def averaging_factors(
    updates: Updates, momentum: float, warmup_steps: int, r: float, weight_lr_power: float, averaged: bool
) -> list[float]:
    r"""What each update moves the weights at the run's end by, in units of its rate times P.

    Step t moves z by :math:`η_t P g_t`, and x, the mean of all z with weights :math:`w_t = t^r η_{max}^p`, by the share
    of the weights from t on, :math:`\sum_{i≥t} w_i/\sum_i w_i`. Gradients are taken at y = (1 - β) z + β x.
    Reference: Defazio et al. 2024, arXiv 2405.15682.

    Args:
        updates: all to the run's end; their learning rates are without the optimizer's own warm-up.
        momentum: β.
        warmup_steps: of the optimizer's own linear warm-up.
        r: power of the step in a weight.
        weight_lr_power: power p of the largest rate so far.
        averaged: whether the weights are x, which is what the optimizer's ``eval()`` puts into the model; else y.

    Raises:
        ValueError: the optimizer had averaged before the stage, with weights that no state says one by one.

    Example:
        >>> averaging_factors(Updates([0.1] * 4, [4]), 0.9, 0, 0.0, 2.0, averaged=True)
        [1.0, 0.75, 0.5, 0.25]
    """
    if updates.before:
        raise ValueError(
            f"the optimizer had averaged over {updates.before} steps when the stage began, and what they weigh is not "
            "known: make the optimizer anew for each stage, or record all of its steps as one stage"
        )
    rates = updates.rates
    warmup = [min(1.0, t / warmup_steps) if warmup_steps else 1.0 for t in range(1, len(rates) + 1)]
    largest = accumulate((rate * ramp for rate, ramp in zip(rates, warmup, strict=True)), max)
    weights = [t**r * most**weight_lr_power for t, most in enumerate(largest, 1)]
    total = sum(weights)
    later = [1 - before / total if total else 0.0 for before in accumulate(weights[:-1], initial=0.0)]
    return [
        ramp * (share if averaged else 1 - momentum + momentum * share)
        for ramp, share in zip(warmup, later, strict=True)
    ]
