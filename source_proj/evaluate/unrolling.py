"""The derivative of a whole training run by the weight of each example: what SOURCE approximates, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset

from source_proj._errors import GradientError, MismatchError
from source_proj._io.progress import Progress, progress_bar
from source_proj.attribution.hits import Hits
from source_proj.attribution.queries import checked_query_ids, query_source
from source_proj.attribution.scores import Scores
from source_proj.bank.build.columns import examples_of
from source_proj.bank.build.data import BatchSource, to_device
from source_proj.evaluate._stepper import OptimizerFactory, State, Stepper, derivatives
from source_proj.gradients import private_copy
from source_proj.gradients.batches import own_copy
from source_proj.gradients.replaced import call_with, exchanged
from source_proj.sketch import plain_modes
from source_proj.task import Batch, Model, Task
from source_proj.task.base import derivatives_of
from source_proj.trajectory.checkpoint import set_evaluating
from source_proj.trajectory.placement import unwrapped

__all__ = ["ExactUnrolling"]


class ExactUnrolling:
    r"""Scores by reverse-mode differentiation through every step of a small training run.

    Each step sees the gradient :math:`\frac1B \sum_{z \in B} w_z \nabla ℓ_z(θ_t)`; the score of z for query q is
    :math:`\partial m_q(θ_T) / \partial w_z` at w = 1, moments of the optimizer included. That is SGD-influence (Hara et
    al. 2019) for any optimizer of torch that can be differentiated, and the metagradient of Engstrom et al. (2025). It
    judges approximations on runs small enough to be replayed: a set of queries costs some three times the run, and one
    more backward pass a query and step; states are kept at every √T-th of T steps and made again between them.

    The model runs in evaluation mode, as for a bank: without dropout, and normalised by the statistics that it has.

    Args:
        model: with the weights that training began with; a private copy runs. Use ``.double()`` for a reference.
        task: what was minimised, and what is asked.
        train_set: a map-style data set of N examples, a frame, or a ``datasets.Dataset``.
        batches: the places of each step's examples in the training set, one sequence a step.
        optimizer: function of the parameters to their optimizer, such as ``lambda p: torch.optim.AdamW(p, lr=1e-3)``.
        lr: learning rate of each step, for all parameter groups; default: the optimizer's own.
        ids: ids of the training examples; default 0, 1, 2, …
        progress: show a progress bar after two seconds; False for none, or a function of (description, done, total).

    Raises:
        MismatchError: places that the training set lacks, or as many learning rates as there are no steps.
        TypeError: a training set that is no map, or places that are no integers.
        ValueError: no steps, an empty step, an optimizer that cannot be differentiated or has other parameters than
            those that it was given, or a task whose normalizer is not told.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> import source_proj as sp
        >>> _ = torch.manual_seed(0)
        >>> data = TensorDataset(torch.randn(8, 2), torch.randn(8, 1))
        >>> steps = [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
        >>> run = sp.evaluate.ExactUnrolling(
        ...     nn.Linear(2, 1), sp.Regression("squared"), data, steps, lambda p: torch.optim.SGD(p, lr=0.1)
        ... )
        >>> run.score(data).shape
        (8, 8)
    """

    @plain_modes()
    def __init__(
        self,
        model: nn.Module,
        task: Task,
        train_set: Any,
        batches: Sequence[Sequence[int] | np.ndarray],
        optimizer: OptimizerFactory,
        *,
        lr: Sequence[float] | None = None,
        ids: Sequence[Any] | None = None,
        progress: Progress = True,
    ) -> None:
        self._model = set_evaluating(private_copy(unwrapped(model)))
        self._task, self._data, self._progress = task, examples_of(train_set), progress
        if not hasattr(self._data, "__getitem__"):
            raise TypeError(
                f"train_set must be a map-style data set, whose examples the batches name by places, got a "
                f"{type(train_set).__name__}: give the data set itself, such as loader.dataset"
            )
        self.ids = list(range(len(self._data))) if ids is None else list(ids)
        self._batches = [_places(step, places) for step, places in enumerate(batches)]
        _check_steps(self._batches, len(self._data), None if lr is None else len(lr), len(self.ids))
        if task.needs_normalizer:
            raise ValueError(f"the task {task.name!r} divides a batch's loss by a sum: give task.normalized([…])")
        self._names = [name for name, p in self._model.named_parameters() if p.requires_grad]
        self._start = [p.detach().clone() for p in self._model.parameters() if p.requires_grad]
        self._stepper = Stepper(optimizer, self._start, lr)
        self._every = max(1, math.isqrt(len(self._batches)))
        self._kept: dict[int, State] = {}

    def __repr__(self) -> str:
        return f"ExactUnrolling({len(self._batches)} steps, {len(self.ids)} training examples)"

    @plain_modes()
    def final_weights(self) -> dict[str, Tensor]:
        """The weights that training ends with, to compare with those of the run itself."""
        steps = len(self._batches)
        if steps not in self._kept:
            state = self._stepper.begin(self._start)
            with progress_bar(self._progress, "training again", steps, "steps") as bar:
                for t in range(steps):
                    if t % self._every == 0:
                        self._kept[t] = state
                    state = self._step(t, state)
                    bar.update(1)
            self._kept[steps] = state
        return dict(zip(self._names, self._kept[steps].parameters, strict=True))

    @plain_modes()
    def score(self, queries: Any, *, ids: Sequence[Any] | None = None, batch_size: int = 64) -> Scores:
        """Exact scores of queries against all training examples, ``(Q, N)``.

        Args:
            queries: map-style data set, DataLoader or frame.
            ids: ids of the queries; default 0, 1, 2, …
            batch_size: queries that go through the run together.

        Raises:
            GradientError: the run or its derivative is not finite, gradients of embeddings are sparse, or a layer
                cannot be differentiated twice.
        """
        final = list(self.final_weights().values())
        source = query_source(queries, batch_size)
        try:
            values = np.concatenate(
                [self._backward(self._measured(final, batch)) for _, _, batch in source.load([(0, source.n)])]
            )
        except NotImplementedError as error:  # torch's own, of an operation
            raise GradientError(
                f"the model cannot be differentiated twice ({error}): replace that layer, such as an EmbeddingBag by "
                "an Embedding and a mean"
            ) from error
        if not np.isfinite(values).all():
            raise GradientError(
                f"the derivative of the run is not finite in {str(self._start[0].dtype).removeprefix('torch.')}: look "
                "at the learning rate; squares of small gradients vanish in float32 (Adam, RMSprop): use .double()"
            )
        return Scores(
            values, checked_query_ids(queries, ids, source.n), self.ids, unit=self._task.unit,
            higher_is_better=self._task.higher_is_better,
        )  # fmt: skip

    def top_k(self, queries: Any, k: int) -> Hits:
        """The k examples of each query whose inclusion raised its measurement most."""
        return self.score(queries).top_k(k)

    def bottom_k(self, queries: Any, k: int) -> Hits:
        """The k examples of each query whose inclusion lowered its measurement most."""
        return self.score(queries).bottom_k(k)

    def helpful(self, queries: Any, k: int) -> Hits:
        """The k examples that improved each query most, in the task's own sense."""
        return self.score(queries).helpful(k)

    def harmful(self, queries: Any, k: int) -> Hits:
        """The k examples that worsened each query most, in the task's own sense."""
        return self.score(queries).harmful(k)

    def _placed(self, batch: Batch) -> Batch:
        """The batch where the weights are, in their precision: data are seldom in float64."""
        return to_device(batch, self._start[0].device, self._start[0].dtype)

    def _with(self, parameters: list[Tensor]) -> Model:
        """The model with other weights."""
        named = dict(zip(self._names, parameters, strict=True))
        return lambda *inputs, **keywords: call_with(self._model, named, inputs, keywords)

    @contextmanager
    def _held(self, parameters: list[Tensor]) -> Iterator[None]:
        """Within, the model has these weights: what it computes again on the way back sees them, too."""
        with exchanged(self._model, dict(zip(self._names, parameters, strict=True))):
            yield

    def _measured(self, final: list[Tensor], batch: Batch) -> list[Tensor]:
        """Gradient of each query's measurement by the final weights, ``(B, *shape)`` for each parameter."""
        task = self._task
        leaves = [p.clone().requires_grad_() for p in final]
        batch, model = self._placed(batch), self._with(leaves)
        if task.asks_for_answers(batch):
            batch, task = task.answered(batch, task.answers(model, own_copy(batch)).values), task.by_target()
        with _twice_differentiable(), self._held(leaves):
            values = task.measurement(model, batch)
            identity = torch.eye(len(values), dtype=values.dtype, device=values.device)
            return derivatives([values], leaves, [identity])

    def _backward(self, adjoint: list[Tensor]) -> np.ndarray:
        """Carry queries' gradients ``(B, *shape)`` back through the run: by examples' weights, ``(B, N)``."""
        count, steps = len(adjoint[0]), len(self._batches)
        scores = torch.zeros(count, len(self.ids), dtype=torch.float64, device="cpu")
        moments: list[dict[str, Tensor]] = [{} for _ in adjoint]
        with progress_bar(self._progress, "back through the run", steps, "steps") as bar:
            for t, state in self._states_backwards():
                adjoint, moments, weights = self._pulled_back(t, state, adjoint, moments)
                members = torch.tensor(self._batches[t], dtype=torch.int64, device="cpu")
                scores.index_add_(1, members, weights.double().cpu())
                bar.update(1)
        return scores.numpy()

    def _states_backwards(self) -> Iterator[tuple[int, State]]:
        """What each step began with, last step first."""
        steps = len(self._batches)
        for begin in reversed(range(0, steps, self._every)):
            states = [self._kept[begin]]
            for t in range(begin, min(begin + self._every, steps) - 1):
                states.append(self._step(t, states[-1]))
            for t in reversed(range(len(states))):
                yield begin + t, states[t]

    def _step(self, t: int, state: State) -> State:
        leaves = [p.detach().clone().requires_grad_() for p in state.parameters]
        with _twice_differentiable(), self._held(leaves):
            gradients = self._gradients(t, leaves, None)
        with torch.no_grad():
            return self._stepper.step(t, state, [g.detach() for g in gradients])

    def _gradients(self, t: int, parameters: list[Tensor], weights: Tensor | None) -> list[Tensor]:
        """The step's mean gradient; a function of parameters and weights where there are weights."""
        places = self._batches[t]
        ((_, _, batch),) = BatchSource(Subset(self._data, places), len(places)).load([(0, len(places))])
        batch = self._placed(batch)
        output = self._task.output(self._with(parameters), own_copy(batch))
        slope = _slope(self._task, output, batch) / len(places)
        slope = slope.detach() if weights is None else slope * weights
        gradients = torch.autograd.grad(
            output, parameters, slope, create_graph=weights is not None, materialize_grads=True
        )
        sparse = [name for name, g in zip(self._names, gradients, strict=True) if g.layout is not torch.strided]
        if sparse:
            raise GradientError(
                f"the gradients of {sparse[:5]} are sparse, which torch does not differentiate again: make the "
                "embedding with sparse=False, or freeze it"
            )
        return list(gradients)

    def _pulled_back(
        self, t: int, state: State, adjoint: list[Tensor], moments: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]], Tensor]:
        """From the adjoint after a step to the one before it; also the derivative by the weights of its examples."""
        parameters = [p.detach().clone().requires_grad_() for p in state.parameters]
        weights = torch.ones(len(self._batches[t]), dtype=parameters[0].dtype, device=parameters[0].device)
        weights.requires_grad_()
        with _twice_differentiable(), self._held(parameters):
            gradients = self._gradients(t, parameters, weights)
            by_parameters, by_gradients, before = self._stepper.pull_back(
                t, state, [g.detach() for g in gradients], adjoint, moments
            )
            through = derivatives(gradients, [*parameters, weights], by_gradients)
        return [a + b for a, b in zip(by_parameters, through[:-1], strict=True)], before, through[-1]


def _slope(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """The loss's derivative by the output, (B,), as a function that can itself be differentiated.

    Raises:
        ValueError: a task's ℓ' varies with the output, and its ℓ'' is not told.
    """
    first, second = derivatives_of(task, output, batch)
    if second is not None:
        return first.detach() + second.detach() * (output - output.detach())
    moved, _ = derivatives_of(task, output.detach() + 1, batch)
    if not first.requires_grad and not torch.equal(moved, first):
        raise ValueError(f"loss_derivatives of the task {task.name!r} gives an ℓ' that varies, and no ℓ'': return both")
    return first


def _twice_differentiable() -> Any:
    """Fused attention has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def _places(step: int, places: Any) -> list[int]:
    array = np.asarray(places)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"batches must hold one sequence of places a step, integers from 0 on, got {array.tolist()!r:.60} at step "
            f"{step}"
        )
    found: list[int] = array.tolist()
    return found


def _check_steps(batches: list[list[int]], n: int, rates: int | None, ids: int) -> None:
    if not batches or not all(batches):
        raise ValueError(f"batches must be one non-empty sequence of places a step, got {len(batches)} steps")
    low, high = min(map(min, batches)), max(map(max, batches))
    if low < 0 or high >= n:
        raise MismatchError(f"batches name the places {low}..{high}, but the training set has 0..{n - 1}")
    if rates is not None and rates != len(batches):
        raise MismatchError(f"got {rates} learning rates for {len(batches)} steps: give one a step")
    if ids != n:
        raise MismatchError(f"got {ids} ids for {n} training examples: give one an example")
