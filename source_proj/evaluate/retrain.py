"""Train many copies of a small model at once: the retraining oracle's engine.

A counterfactual ("what if these examples had been left out?") is answered by retraining, hundreds of
times. Small networks leave a machine idle when trained one by one, so the copies are stacked along a
leading axis and advance in lock-step, one tensor program for all of them.

Several stages are trained one after the other: ``train_stacked`` returns states that the next call
takes as ``initial``.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import stack_module_state, vmap

from source_proj._errors import MismatchError
from source_proj._io.executors import Executor, check_executor, map_in_order
from source_proj._io.numbers import plain_numbers, whole_number
from source_proj._io.progress import Progress, progress_bar
from source_proj.evaluate._lockstep import MakeOptimizer, lockstep_optimizer, named_tensors, require_one_function
from source_proj.evaluate._stacked_loss import proven_loss, stacking
from source_proj.gradients.replaced import call_with
from source_proj.trajectory.checkpoint import set_evaluating

__all__ = ["StackedState", "half_subsets", "retrain", "stacked_outputs", "train_stacked"]

StackedState = dict[str, Tensor]
"""Parameters (and buffers) of M models: every tensor has a leading axis of length M."""

LearningRate = float | Callable[[int], float]
"""A constant, or a function of the optimizer step, which counts from 0."""

_GENERATOR = threading.Lock()  # torch's global one: threads that train take turns

Group = tuple[list[np.ndarray], list[int], StackedState | None]
"""Subsets, seeds and initial states of models that are trained at once."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss of ``(outputs, targets)``."""


def half_subsets(n: int, count: int, *, fraction: float = 0.5, seed: int = 0) -> np.ndarray:
    """Draw random subsets of ``range(n)``, all of the same size.

    Args:
        n: number of training examples.
        count: number of subsets.
        fraction: share of the examples in each subset, in (0, 1).
        seed: seed of the draw.

    Returns:
        Boolean array ``(count, n)``; True marks an example that is kept.

    Example:
        >>> half_subsets(10, 3).sum(axis=1)
        array([5, 5, 5])
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    n, count = whole_number(n, "n", least=1), whole_number(count, "count", least=1)
    size = round(n * fraction)
    rng = np.random.default_rng(whole_number(seed, "seed", least=0))
    masks = np.zeros((count, n), dtype=bool)
    for row in masks:
        row[rng.permutation(n)[:size]] = True
    return masks


def retrain(
    make_model: Callable[[], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
    lr: LearningRate,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    optimizer: MakeOptimizer | None = None,
    loss: Loss = nn.functional.cross_entropy,
    initial: StackedState | None = None,
    group: int = 8,
    evaluate: Callable[[StackedState], Tensor],
    executor: Executor | None = None,
    progress: Progress = True,
) -> Tensor:
    """Train one model per (subset, seed) pair and evaluate each.

    Models advance in groups of ``group``; subsets of different lengths go to different groups. Apart from
    ``evaluate``, ``group``, ``executor`` and ``progress`` the arguments are those of :func:`train_stacked`.

    Args:
        make_model: builds a freshly initialised model; called under ``torch.manual_seed(seed)``.
        inputs: training inputs, shape ``(N, ...)``.
        targets: training targets, shape ``(N, ...)``.
        subsets: M index arrays, the examples each model is trained on.
        seeds: M seeds, one per model, for initialisation and batch order.
        epochs: passes over the subset.
        batch_size: examples in a batch.
        lr: learning rate, constant or by optimizer step.
        momentum: heavy-ball momentum, as in :class:`torch.optim.SGD`.
        weight_decay: coupled L2 coefficient, as in :class:`torch.optim.SGD`.
        optimizer: another one than SGD; see :func:`train_stacked`.
        loss: mean loss of ``(outputs, targets)``.
        initial: weights to start from: one state dict for all, or the stacked states of all M models.
        group: models trained at once; a group's weights should fit the processor's cache.
        evaluate: maps the stacked state of a group to a tensor ``(models in group, ...)``.
        executor: trains the groups, each by itself, as :meth:`GroundTruth.fill` says; None for this process.
        progress: show a progress bar after two seconds.

    Returns:
        The evaluations of all models in the order of ``subsets``: shape ``(M, ...)``.

    Raises:
        TypeError: see :func:`train_stacked`.
        ValueError: a group below 1, and see :func:`train_stacked`.
        MismatchError: if subsets and seeds, inputs and targets, or the initial state and model do not match.
    """
    if whole_number(group, "group") < 1:
        raise ValueError(f"group must be at least 1 model, got {group}")
    subsets, seeds = _checked_pairs(subsets, seeds, len(inputs))
    check_executor(executor)
    evaluations: dict[int, Tensor] = {}
    shared = initial is not None and _is_single(make_model, initial)
    groups = list(_lockstep_groups(subsets, group))

    def jobs() -> Iterator[Group]:
        for positions in groups:
            own = initial if initial is None or shared else {name: value[positions] for name, value in initial.items()}
            yield [subsets[i] for i in positions], [seeds[i] for i in positions], own

    train = partial(
        train_stacked, make_model, inputs, targets, epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum,
        weight_decay=weight_decay, optimizer=optimizer, loss=loss,
    )  # fmt: skip
    with progress_bar(progress, "retrain", len(groups), "groups") as bar:
        results = map_in_order(executor, partial(_evaluated, train, evaluate), jobs())
        for positions, evaluated in zip(groups, results, strict=True):
            evaluations.update(zip(positions, evaluated, strict=True))
            bar.update()
    return torch.stack([evaluations[i] for i in range(len(subsets))])


def _evaluated(train: Callable[..., StackedState], evaluate: Callable[[StackedState], Tensor], group: Group) -> Tensor:
    subsets, seeds, initial = group
    return evaluate(train(subsets, seeds, initial=initial))


def train_stacked(
    make_model: Callable[[], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
    lr: LearningRate,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    optimizer: MakeOptimizer | None = None,
    loss: Loss = nn.functional.cross_entropy,
    initial: StackedState | None = None,
) -> StackedState:
    """Train M models in lock-step, as M separate loops of :class:`torch.optim.SGD`, or of another optimizer, would.

    Every model sees only its own subset, in its own shuffled order (``torch.randperm`` of a generator seeded
    with its seed), from its own initialisation; the loss is the mean over a batch of its subset. The last,
    short batch of an epoch is used. Models are in training mode; dropout, if any, draws from torch's global
    generator, which is left as it was found.

    Args:
        make_model: builds a freshly initialised model; called under ``torch.manual_seed(seed)``.
        inputs: training inputs, shape ``(N, ...)``.
        targets: training targets, shape ``(N, ...)``.
        subsets: M index arrays of one length, the examples each model is trained on.
        seeds: M seeds, one per model, for initialisation and batch order.
        epochs: passes over the subset.
        batch_size: examples in a batch.
        lr: learning rate, constant or by optimizer step (counted from 0 in this call).
        momentum: heavy-ball momentum, as in :class:`torch.optim.SGD`; its velocity starts at zero.
        weight_decay: coupled L2 coefficient, as in :class:`torch.optim.SGD`.
        optimizer: makes another optimizer than SGD of one model's parameters, which it may put into groups by their
            shapes, such as ``partial(torch.optim.AdamW, weight_decay=0.01)``. It must act on each number alone, as SGD,
            Adam, AdamW and RMSprop do: some steps are tried before training, and others (Adafactor, LBFGS, Muon,
            clipping) are refused. Its learning rate is set at every step.
        loss: mean loss of ``(outputs, targets)``.
        initial: weights to start from: one state dict for all, or the stacked states of all M models.

    Returns:
        The stacked final states.

    Raises:
        TypeError: if what is given makes no optimizer.
        ValueError: for no, empty or unequally long subsets, indices beyond the N examples, an optimizer setting out of
            range, models that differ in more than weights and buffers or that torch cannot stack (LSTM, GRU,
            spectral_norm, checkpoints, control flow that depends on data), or an optimizer that has other parameters,
            several learning rates, or does not act on each number alone.
        MismatchError: if subsets and seeds, inputs and targets, or the initial state and model do not match.
    """
    subsets, seeds = _checked_pairs(subsets, seeds, len(inputs))
    _check_setting(len(inputs), len(targets), epochs, batch_size, momentum)
    if optimizer is not None and (momentum or weight_decay):
        raise ValueError("momentum and weight_decay are SGD's: give them to the optimizer that is made instead")
    sizes = sorted({len(subset) for subset in subsets})
    if len(sizes) != 1:
        raise ValueError(f"models in lock-step need subsets of one length, got lengths {sizes}; retrain() groups them")
    inputs, targets = _as_tensor(inputs), _as_tensor(targets)
    rate = lr if callable(lr) else lambda _step: float(lr)
    indices = torch.from_numpy(np.stack(subsets)).long()  # (M, n)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _GENERATOR, torch.random.fork_rng():
        models, parameters, buffers = _initialise(make_model, seeds, initial, inputs.device)
        skeleton, first = models[0], indices[:, :batch_size]
        again = partial(_made, make_model, seeds[0], inputs.device)  # the skeleton must not notice that it was tried
        if len(models) > 1:
            own = inputs[first[0]], targets[first[0]]
            require_one_function([again(), *models[1:]], seeds, own[0], lambda found: loss(found, own[1]))
        losses = proven_loss(again, skeleton, loss, parameters, buffers, inputs[first], targets[first])
        stacked = list(parameters.values())
        if optimizer is None:
            descent: torch.optim.Optimizer = torch.optim.SGD(stacked, momentum=momentum, weight_decay=weight_decay)
        else:
            descent = lockstep_optimizer(optimizer, list(skeleton.parameters()), stacked)

        count = 0
        for _ in range(epochs):
            orders = [torch.randperm(sizes[0], generator=generator, device="cpu") for generator in generators]
            order = torch.stack(orders)
            shuffled = torch.gather(indices, 1, order)
            for batch in torch.split(shuffled, batch_size, dim=1):  # batch: (M, b) indices of examples
                buffers.update(losses.differentiate(parameters, buffers, inputs[batch], targets[batch]))
                for group in descent.param_groups:
                    group["lr"] = rate(count)
                descent.step()
                count += 1
    return {name: value.detach() for name, value in {**parameters, **buffers}.items()}


def _as_tensor(values: Tensor | np.ndarray) -> Tensor:
    """As ``torch.as_tensor``, but where it is, whatever torch's default device is."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def stacked_outputs(make_model: Callable[[], nn.Module], inputs: Tensor) -> Callable[[StackedState], Tensor]:
    """Build an ``evaluate`` for :func:`retrain`: the outputs ``(models, N, ...)`` of every model on ``inputs``.

    Raises:
        ValueError: models of two seeds differ in more than weights and buffers.
    """
    inputs = _as_tensor(inputs)
    with torch.random.fork_rng():
        models = [set_evaluating(_made(make_model, seed, inputs.device)) for seed in (0, 1)]
        require_one_function(models, (0, 1), inputs, lambda outputs: outputs)
    return partial(_outputs, models[0], inputs)


def _outputs(skeleton: nn.Module, inputs: Tensor, state: StackedState) -> Tensor:
    with torch.no_grad(), stacking("evaluate"):
        outputs: Tensor = vmap(lambda parameters: call_with(skeleton, parameters, (inputs,)))(state)
    return outputs


def _initialise(
    make_model: Callable[[], nn.Module], seeds: Sequence[int], initial: StackedState | None, device: torch.device
) -> tuple[list[nn.Module], StackedState, StackedState]:
    """Build all models, and stack the parameters and buffers of all."""
    models = [_made(make_model, seed, device) for seed in seeds]
    with stacking("make"):
        parameters, buffers = stack_module_state(models)
    if initial is not None:
        single = _is_single(make_model, initial)
        with torch.no_grad():
            for name, value in {**parameters, **buffers}.items():
                if name not in initial:
                    continue
                start = initial[name].to(device)
                if not single and len(start) != len(seeds):
                    raise MismatchError(f"initial holds the states of {len(start)} models, but there are {len(seeds)}")
                value.copy_(start.expand_as(value))
    return models, parameters, buffers


def _made(make_model: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    return make_model().to(device).train()


def _is_single(make_model: Callable[[], nn.Module], initial: StackedState) -> bool:
    """Whether ``initial`` is one model's state dict (True) or a stack of several (False)."""
    with torch.random.fork_rng():
        model = make_model()
    own = {name: tuple(value.shape) for name, value in named_tensors(model)}
    saved = model.state_dict().keys()  # without the buffers that are not persistent, with every name of a tied weight
    given = {name: tuple(value.shape) for name, value in initial.items()}
    wrong = sorted((own.keys() & saved) - given.keys() | given.keys() - own.keys() - saved)
    common = own.keys() & given.keys()
    if not wrong and all(given[name] == own[name] for name in common):
        return True
    wrong += sorted(name for name in common if given[name][1:] != own[name])
    if wrong:
        raise MismatchError(f"the initial state does not fit the model at {wrong[:5]}; give its state dict, or a stack")
    return False


def _lockstep_groups(subsets: Sequence[np.ndarray], group: int) -> list[list[int]]:
    """Positions of the subsets in groups of one length and at most ``group`` members."""
    by_length: dict[int, list[int]] = {}
    for position, subset in enumerate(subsets):
        by_length.setdefault(len(subset), []).append(position)
    return [same[i : i + group] for same in by_length.values() for i in range(0, len(same), group)]


def _checked_pairs(subsets: Sequence[np.ndarray], seeds: Sequence[int], n: int) -> tuple[list[np.ndarray], list[int]]:
    """Subsets as index arrays and seeds as ints, whatever library they are of."""
    if len(subsets) == 0:
        raise ValueError("there is nothing to train: got no subsets")
    if len(subsets) != len(seeds):
        raise MismatchError(f"got {len(subsets)} subsets but {len(seeds)} seeds; give one seed a subset")
    indices = [np.asarray(plain_numbers(subset)) for subset in subsets]
    for position, subset in enumerate(indices):
        if subset.ndim != 1 or subset.size == 0 or not np.issubdtype(subset.dtype, np.integer):
            raise ValueError(
                f"subset {position} must be a non-empty array of example indices, got {subset.dtype} "
                f"of shape {subset.shape}; np.flatnonzero turns a mask into indices"
            )
        low, high = int(subset.min()), int(subset.max())
        if low < 0 or high >= n:  # a negative one would count from the end
            raise ValueError(f"subset {position} names the examples {low}..{high}, and there are 0..{n - 1}")
    return indices, [whole_number(seed, "a seed") for seed in seeds]


def _check_setting(n_inputs: int, n_targets: int, epochs: int, batch_size: int, momentum: float) -> None:
    if n_inputs != n_targets:
        raise MismatchError(f"got {n_inputs} inputs but {n_targets} targets; give one target an input")
    if whole_number(epochs, "epochs") < 1 or whole_number(batch_size, "batch_size") < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
