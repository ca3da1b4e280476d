"""How well the checkpoints of a run agree on each parameter's gradients, and the weights that follow.

SOURCE takes the mean of an example's gradients over the checkpoints of a segment. A parameter whose gradients turn
about between checkpoints adds less of what the mean stands for, and more of what is the checkpoints' own, than one
whose gradients stay: in language models embeddings, whose gradients are as large as all others', are of the first
kind, and the head is of the second (examples/paper/LABORATORY.md, study r). The agreement of parameter p is

    ρ_p = mean_{c ≠ c'} Σ_i ⟨g_i(c), g_i(c')⟩ / mean_c Σ_i |g_i(c)|²

for the parts g_i(c) of the examples' loss gradients that belong to p, and its weight is ρ_p², times the one number by
which the sum of all |g_i(c)|² stays what it is, so that times and damping keep their meaning.

With random signs w_i the gradient of Σ_i w_i ℓ_i has E ⟨∇(c), ∇(c')⟩ = Σ_i ⟨g_i(c), g_i(c')⟩: plain backward passes of
a few batches tell ρ, whatever the model is made of.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._errors import named_examples
from source_proj._io.progress import Progress, progress_bar
from source_proj.bank.build.data import Batch, BatchSource, to_device
from source_proj.gradients import ParameterSpace, private_copy
from source_proj.gradients.evaluation import evaluating
from source_proj.gradients.general import weighted_gradient
from source_proj.gradients.law import AUTOCAST, autocasting
from source_proj.gradients.proof import share_sink
from source_proj.gradients.sink import SinkByParameter
from source_proj.task import Task
from source_proj.task.base import derivatives_of
from source_proj.trajectory import Trajectory
from source_proj.trajectory.placement import placement_of

__all__ = [
    "LEAST_CHECKPOINTS",
    "LEAST_EXAMPLES",
    "MOST_EXAMPLES",
    "agreement",
    "weighted_by_agreement",
    "with_sizes_kept",
]

LEAST_CHECKPOINTS = 3  # of a stage, and examples, for which agreement is measured unless it is asked for
LEAST_EXAMPLES = 128

_BATCHES, _EXAMPLES = 16, 8  # of a stage, and of a batch
MOST_EXAMPLES = _BATCHES * _EXAMPLES  # of a stage that are looked at
_FLOOR = 0.1  # of the largest agreement: what is below counts as this
_DIGITS = 3  # of a weight


def weighted_by_agreement(space: ParameterSpace, agreement: Tensor, sizes: Tensor) -> ParameterSpace:
    """The space with weights ρ², which leave the sum of the squared gradients as it is.

    Args:
        space: the attributed parameters.
        agreement: ρ of each, (parameters,); NaN where the gradient is zero.
        sizes: Σ_i |g_i|² of each, (parameters,).

    Example:
        >>> space = ParameterSpace(("embedding", "head"), ((4,), (4,)))
        >>> weighted_by_agreement(space, torch.tensor([0.4, 0.8]), torch.tensor([1.0, 1.0])).weights
        (0.343, 1.37)
    """
    weights = with_sizes_kept(agreement, sizes).tolist()
    return space.weighted({name: float(f"{w:.{_DIGITS}g}") for name, w in zip(space.names, weights, strict=True)})


def with_sizes_kept(agreement: Tensor, sizes: Tensor, power: float = 2.0) -> Tensor:
    """ρ^power of each parameter, no less than a tenth of the largest ρ, times what keeps the sum of the sizes."""
    known = torch.isfinite(agreement)
    if not bool((agreement[known] > 0).any()):
        return torch.ones_like(agreement)
    largest = agreement[known].max()
    weights = torch.where(known, agreement, largest).clamp(min=float(_FLOOR * largest)) ** power
    scaled: Tensor = weights * (sizes[known].sum() / (weights.square() * sizes)[known].sum()).sqrt()
    return scaled


def agreement(
    model: nn.Module,
    task: Task,
    trajectory: Trajectory,
    sources: Sequence[BatchSource],
    ids: Sequence[np.ndarray],
    space: ParameterSpace,
    device: torch.device | str | None,
    autocast: str | None,
    progress: Progress = False,
) -> tuple[Tensor, Tensor]:
    """ρ of each parameter, over all stages of at least two checkpoints, and Σ_i |g_i|² at a mean checkpoint.

    Args:
        model: of the architecture that was trained.
        task: whose loss is differentiated.
        trajectory: the run.
        sources: the examples of each stage.
        ids: theirs.
        space: the attributed parameters.
        device: where a copy of the model runs; default: where it is.
        autocast: of the forward pass.
        progress: as for :func:`source_proj.build`.

    Returns:
        (parameters,) and (parameters,), float64 on the CPU.

    Raises:
        GradientError: the model or the task fails; names the ids.
    """
    private = private_copy(model, device)
    placement = placement_of(private)
    forward = autocasting(placement, None if autocast is None else AUTOCAST[autocast])
    both, single = (torch.zeros(len(space.names), dtype=torch.float64, device="cpu") for _ in range(2))
    several = zip(([*stage.checkpoints] for stage in trajectory.stages), sources, ids, strict=True)
    stages = [(index, each) for index, each in enumerate(several) if len(each[0]) > 1]
    looked_at = sum(len(stage) * min(source.n, MOST_EXAMPLES) for _, (stage, source, _) in stages)
    with progress_bar(progress, "agreement of checkpoints", looked_at, "examples") as bar:
        for index, (stage, source, own) in stages:
            count, spans = len(stage), _spans(source.n)
            starts = [start for start, _ in spans]
            sizes = ((), (len(spans), len(space.names)))
            total, squares = (torch.zeros(size, dtype=torch.float64, device="cpu") for size in sizes)
            function = partial(_loss_gradient, task.of_stage(index))
            for checkpoint in stage:
                with placement.other_weights():
                    checkpoint.load_into(private)
                sink = share_sink(len(spans), space, placement.device)
                for start, stop, batch in source.load(spans):  # several of a span, where batches are smaller
                    receive = partial(_receive, sink, bisect_right(starts, start) - 1, placement.device)
                    given, signs = to_device(batch, placement.device), _signs(index, start, stop)
                    with torch.inference_mode(False), evaluating(private), named_examples(own[start:stop].tolist()):
                        weighted_gradient(placement, space, function, given, signs, forward, receive)
                    bar.update(stop - start)
                sums = sink.sums.double().cpu()  # (parameters, spans, k)
                total = total + sums
                squares += sums.square().sum(2).T
            sound = torch.isfinite(squares).all(1)  # the build itself says which example is not
            squares, total = squares[sound].sum(0), total[:, sound].square().sum((1, 2))
            both += (total - squares) / (count * (count - 1))
            single += squares / count
    return both / single, single


def _spans(n: int) -> list[tuple[int, int]]:
    """Batches that lie evenly in n examples."""
    ends = [n * place // _BATCHES for place in range(_BATCHES + 1)]
    return [(begin, min(begin + _EXAMPLES, end)) for begin, end in pairwise(ends) if begin < end]


def _signs(stage: int, start: int, stop: int) -> Tensor:
    """One for each example, the same at every checkpoint."""
    generator = torch.Generator().manual_seed((stage << 40) + start)
    return torch.randint(0, 2, (stop - start,), generator=generator, device="cpu").float() * 2 - 1


def _loss_gradient(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """What has the gradients of the losses: ℓ' as a constant, times the outputs."""
    outputs = task.output(model, batch)
    with torch.no_grad():
        first, _ = derivatives_of(task, outputs.detach().float(), batch)
    return outputs * first.to(outputs.device)


def _receive(sink: SinkByParameter, number: int, device: torch.device, name: str, gradient: Tensor) -> None:
    sink.add(name, gradient.detach().to(device).unsqueeze(0), number)
