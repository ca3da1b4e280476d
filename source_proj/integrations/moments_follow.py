"""Whether one optimizer's state can have become another, as that of a run's later checkpoint: a certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from source_proj.trajectory.optimizers.describe import steps_of

__all__ = ["moments_contradict"]

_LOOKED_AT = 4096  # numbers of each parameter, so that a large file is not read whole
_ROUNDED = 1e-3  # float32 over some thousand updates
_LEAST = 1e-20  # below, decay underflows
_NONE = torch.zeros(0, dtype=torch.float32, device="cpu")
_TYPES = (torch.float32, torch.float64)  # half precision rounds away what one update takes


def moments_contradict(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    r"""Whether no training leads from one state of Adam's kind to the other.

    An update makes :math:`v ← β_2 v + (1 - β_2) g^2`, so that :math:`v' ≥ β_2^n v` after n updates, in every coordinate
    and whatever the gradients were. Moments of two runs break that somewhere, unless n is so large that nothing is left
    of the former. Of states without such moments, or whose count of updates began anew, nothing is said.

    Args:
        before: an optimizer's ``state_dict()``.
        after: the one of a later step.

    Example:
        >>> group = {"params": [0], "betas": (0.9, 0.99)}
        >>> def state(step, v):
        ...     return {"state": {0: {"step": step, "exp_avg_sq": torch.tensor(v)}}, "param_groups": [group]}
        >>> moments_contradict(state(1, [4.0]), state(2, [3.97]))
        False
        >>> moments_contradict(state(1, [4.0]), state(2, [3.9]))
        True
    """
    updates = steps_of(after) - steps_of(before)
    groups = [*before["param_groups"], *after["param_groups"]]
    held = [[group["params"] for group in state["param_groups"]] for state in (before, after)]
    betas = [beta for group in groups for beta in (group.get("betas") or ())[1:]]
    if updates <= 0 or steps_of(before) <= 0 or held[0] != held[1] or not betas:
        return False
    left = (1 - _ROUNDED) * float(min(betas)) ** updates
    return any(
        bool((own[own > _LEAST] * left > its[own > _LEAST]).any())
        for number, entry in before["state"].items()
        for own, its in [_moments(entry, after["state"].get(number))]
    )


def _moments(entry: Any, later: Any) -> tuple[Tensor, Tensor]:
    """The same coordinates of two second moments, some of many; none where there are no two to compare."""
    pair = [each.get("exp_avg_sq") if isinstance(each, Mapping) else None for each in (entry, later)]
    own, its = pair
    if not isinstance(own, Tensor) or not isinstance(its, Tensor) or own.shape != its.shape:
        return _NONE, _NONE
    if own.dtype not in _TYPES or its.dtype not in _TYPES:
        return _NONE, _NONE
    stride = max(1, own.numel() // _LOOKED_AT)
    return own.detach().reshape(-1)[::stride].double(), its.detach().reshape(-1)[::stride].double()
