"""The derivative of a whole training run by the weight of each example: what SOURCE approximates, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from source_proj._errors import GradientError, MismatchError, SourceProjError
from source_proj._io.progress import Progress, progress_bar
from source_proj.attribution.hits import Hits
from source_proj.attribution.queries import checked_query_ids, query_source
from source_proj.attribution.scores import Scores
from source_proj.bank.build.columns import examples_of
from source_proj.evaluate._second_derivatives import require_true_products
from source_proj.evaluate._step_gradient import StepGradient
from source_proj.evaluate._stepper import OptimizerFactory, State, Stepper, derivatives
from source_proj.gradients import private_copy
from source_proj.gradients.batches import own_copy
from source_proj.sketch import plain_modes
from source_proj.task import Batch, Task
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
    Before the first scores, second derivatives of the first and the last step are held to central differences in double
    precision, where the model runs in it: torch has some that are wrong, and cuts others off silently.

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
        GradientError: a trained embedding with ``max_norm`` or ``scale_grad_by_freq``.
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
        self._gradient = StepGradient(set_evaluating(private_copy(unwrapped(model))), task, self._data)
        self._start = self._gradient.start
        self._stepper = Stepper(optimizer, self._start, lr)
        self._every = max(1, math.isqrt(len(self._batches)))
        self._kept: dict[int, State] = {}
        self._is_proven = False

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
        return dict(zip(self._gradient.names, self._kept[steps].parameters, strict=True))

    @plain_modes()
    def score(self, queries: Any, *, ids: Sequence[Any] | None = None, batch_size: int = 64) -> Scores:
        """Exact scores of queries against all training examples, ``(Q, N)``.

        Args:
            queries: map-style data set, DataLoader or frame.
            ids: ids of the queries; default 0, 1, 2, …
            batch_size: queries that go through the run together.

        Raises:
            GradientError: the run or its derivative is not finite, gradients of embeddings are sparse, weights are
                changed in place, a layer cannot be differentiated twice, torch's second derivative of it is wrong, or
                a second pass gives another gradient.
        """
        final = list(self.final_weights().values())
        source = query_source(queries, batch_size)
        try:
            self._prove()
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

    def _prove(self) -> None:
        """Hold the derivatives of the first and the last step's gradient to differences, once.

        A model that cannot run in double precision is taken as it is.
        """
        if self._is_proven:
            return
        ends = ((self._batches[0], self._start), (self._batches[-1], self._kept[len(self._batches)].parameters))
        try:
            double = self._gradient.in_double()
            for places, parameters in ends:
                require_true_products(double, places, parameters)
        except (SourceProjError, NotImplementedError):
            raise
        except (RuntimeError, TypeError):  # numbers of a precision of its own, or a device that has no float64
            pass
        self._is_proven = True

    def _measured(self, final: list[Tensor], batch: Batch) -> list[Tensor]:
        """Gradient of each query's measurement by the final weights, ``(B, *shape)`` for each parameter."""
        task = self._task
        leaves = [p.clone().requires_grad_() for p in final]
        batch = self._gradient.placed(batch)
        with self._gradient.held(leaves) as model:
            if task.asks_for_answers(batch):
                batch, task = task.answered(batch, task.answers(model, own_copy(batch)).values), task.by_target()
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
        with self._gradient.held(leaves):
            gradients = self._gradient.of(self._batches[t], leaves, None)
        with torch.no_grad():
            return self._stepper.step(t, state, [g.detach() for g in gradients])

    def _pulled_back(
        self, t: int, state: State, adjoint: list[Tensor], moments: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]], Tensor]:
        """From the adjoint after a step to the one before it; also the derivative by the weights of its examples."""
        parameters = [p.detach().clone().requires_grad_() for p in state.parameters]
        weights = torch.ones(len(self._batches[t]), dtype=parameters[0].dtype, device=parameters[0].device)
        weights.requires_grad_()
        with self._gradient.held(parameters):
            gradients = self._gradient.of(self._batches[t], parameters, weights)
            by_parameters, by_gradients, before = self._stepper.pull_back(
                t, state, [g.detach() for g in gradients], adjoint, moments
            )
            through = derivatives(gradients, [*parameters, weights], by_gradients)
        return [a + b for a, b in zip(by_parameters, through[:-1], strict=True)], before, through[-1]


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
