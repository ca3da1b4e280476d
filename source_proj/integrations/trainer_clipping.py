"""By how much a Trainer's clipping shortened the gradient of every update, also of those whose norm was not logged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from source_proj.integrations.trainer_arguments import trainer_arguments
from source_proj.integrations.trainer_folder import TrainerFolder, logged
from source_proj.trajectory.recording.run_files import clip_factor

__all__ = ["Clipping", "clipping", "trainer_norms"]

_DEFAULT = 1.0  # the Trainer's
_ENOUGH = 30  # steps looked at: where none of them was clipped, a tenth of all were at most (95 %)


@dataclass(frozen=True)
class Clipping:
    """By how much gradients were shortened.

    Attributes:
        factors: of every update, 1 where nothing was clipped.
        assumed: what could not be read and was assumed; None where every step's norm was logged, or enough of them and
            none was clipped.
    """

    factors: list[float]
    assumed: str | None


def clipping(history: Sequence[Mapping[str, object]], most: Sequence[float]) -> Clipping:
    """Clip factors as of :func:`torch.nn.utils.clip_grad_norm_`, from the logged norms.

    A step between two logged ones is taken to have the norm of the next logged one.

    Args:
        history: the Trainer's log; "grad_norm" is the norm before clipping.
        most: what each update's gradient was clipped to; 0: it was not.

    Example:
        >>> clipping([{"step": 1, "grad_norm": 0.5}, {"step": 2, "grad_norm": 4.0 - 1e-6}], [1.0, 1.0]).factors
        [1.0, 0.25]
    """
    norms = {step - 1: norm for step, norm in logged(history, "grad_norm").items() if math.isfinite(norm)}
    factors, following = [1.0] * len(most), 0.0
    for update in reversed(range(len(most))):
        following = norms.get(update, following)
        if most[update]:
            factors[update] = clip_factor(following, most[update])
    clipped = [update for update, norm in enumerate(most) if norm]
    looked_at = [factors[update] for update in clipped if update in norms]
    if len(looked_at) == len(clipped):
        return Clipping(factors, None)
    if not looked_at:
        why = "no gradient norm was logged, so that no gradient is assumed to have been clipped"
    elif min(looked_at) == 1.0 and len(looked_at) >= _ENOUGH:
        why = None
    elif min(looked_at) == 1.0:
        why = (
            f"the gradient norms of {len(looked_at)} of {len(clipped)} steps were logged, and none of these was "
            "clipped: the others are assumed not to have been either"
        )
    else:
        why = "gradient norms were logged at some steps only: the steps before each are assumed to have the same"
    named = " and ".join(map(str, sorted({most[update] for update in clipped})))
    return Clipping(
        factors, why and f"max_grad_norm={named}: {why}. Give max_grad_norm=0 (--max-grad-norm 0) if none was clipped"
    )


def trainer_norms(folders: Sequence[TrainerFolder], given: float | None = None) -> list[float]:
    """What the gradient of every update was clipped to, 0 for no clipping.

    Every checkpoint keeps the arguments of the process that wrote it, so that a run that was resumed with another
    ``max_grad_norm`` has both, each at its steps.

    Args:
        folders: of one run.
        given: the user's word, which counts; None: the run's own, and the Trainer's default where that is not there.

    Warns:
        UserWarning: a number was given, and the run has another one.
    """
    own = {folder.step: trainer_arguments(folder.path).get("max_grad_norm") for folder in folders}
    if given is not None:
        other = sorted({norm for norm in own.values() if norm is not None and norm != given})
        if other and given:  # 0 may be said of any run in which nothing was long enough to be clipped
            warnings.warn(
                f"max_grad_norm={given} was given, and training_args.bin of {str(folders[-1].path.parent)!r} says "
                f"{' and '.join(map(str, other))}: what was given counts; leave it out to take the run's own",
                UserWarning,
                stacklevel=4,
            )
        return [given] * folders[-1].step
    norms: list[float] = []
    for folder in folders:
        norm = own[folder.step]
        norms += [_DEFAULT if norm is None else max(norm, 0.0)] * (folder.step - len(norms))
    return norms
