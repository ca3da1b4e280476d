"""A trajectory from the checkpoints that the Trainer of transformers left."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from source_proj._errors import MismatchError
from source_proj._io.outputs import from_home
from source_proj.integrations.callback_log import callback_stage, is_callback_dir
from source_proj.integrations.momentum import GivenValues, momentum_factors
from source_proj.integrations.peft import require_adapter
from source_proj.integrations.trainer_arguments import (
    accumulated_undivided,
    check_trainer_optimizer,
    trainer_arguments,
    trainer_optimizer,
    trainer_version,
)
from source_proj.integrations.trainer_clipping import clipping, trainer_norms
from source_proj.integrations.trainer_end import step_of_final_model
from source_proj.integrations.trainer_folder import NamedState, TrainerFolder, read_tensors
from source_proj.integrations.trainer_folders import trainer_folders
from source_proj.integrations.trainer_rates import GivenSchedule, trainer_rates
from source_proj.integrations.trainer_weights import model_of, trainer_weights
from source_proj.trajectory import Adam, Checkpoint, Optimizer, PreconditionerMode, Segments, Stage
from source_proj.trajectory.optimizers import ParameterGroup
from source_proj.trajectory.optimizers.describe import describe_state
from source_proj.trajectory.optimizers.naming import parameter_names

__all__ = ["hf_trainer_stage"]


def hf_trainer_stage(
    dir: str | Path,
    segments: Segments = 1,
    stage: str = "train",
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    learning_rate: float | None = None,
    schedule: GivenSchedule | None = None,
    warmup_steps: int | None = None,
    schedule_options: Mapping[str, Any] | None = None,
    max_grad_norm: float | None = None,
    momentum: GivenValues | None = None,
    steps: Sequence[int] | None = None,
    accumulation: int | None = None,
    preconditioner: PreconditionerMode = "scalar",
) -> Stage:
    r"""Read a Trainer's output folder as one stage of training.

    Time runs in optimizer steps (``global_step``). Gradients of accumulated micro-batches are averaged by the Trainer,
    but for models that take further arguments for their loss and do not use them, such as BERT's sequence classifier:
    it leaves the division to these, and their gradients are summed; see :func:`accumulated_undivided`. The learning
    rates of steps that were not logged follow from the schedule, which is found by comparing transformers' schedules
    with all rates that are known. Clipping shortens a step by
    :math:`c_t = \min(1, \text{max}/‖g_t‖)`, so that the time scale is :math:`\sum_t c_t η_t`.

    Nothing is unpickled but tensors and plain values; of ``training_args.bin`` only numbers are looked up, in its text.

    Args:
        dir: the Trainer's ``output_dir``, with folders ``checkpoint-N``; or the directory of a
            :class:`RecorderCallback`, which knows everything.
        segments: number of segments, or lists of checkpoint indices.
        stage: the stage's name.
        model: the model that was trained, its frozen parameters frozen. It says which parameter has which number in
            ``optimizer.pt``; default: the architecture of ``config.json``.
        optimizer: how gradients became steps; default: as ``optimizer.pt`` says.
        learning_rate: peak learning rate; default: as ``scheduler.pt`` says.
        schedule: transformers' name (``lr_scheduler_type``), a function of the update's number, or one value per
            update. Default: the one that agrees with the known rates.
        warmup_steps: steps of warm-up; default: what agrees with the known rates.
        schedule_options: settings of a schedule that is given by name (``lr_scheduler_kwargs``), such as
            ``{"min_lr": 1e-6}`` of "cosine_with_min_lr".
        max_grad_norm: what gradients were clipped to; 0 if they were not. Default: the run's own, as
            ``training_args.bin`` of each checkpoint says of the steps before it; 1, as the Trainer's, where it is not
            there.
        momentum: of SGD or RMSprop at every update, a function of its number or one value each, where it changed.
        steps: steps of the checkpoints to use; default: all until the final model. That is the checkpoint whose weights
            the model in ``dir`` (or the one given) has, such as the best one (``load_best_model_at_end``).
        accumulation: micro-batches whose gradients were summed undivided before a step, 1 where they were averaged.
            Default: as the Trainer does with the model's own loss. Of another one (``compute_loss_func``, an overridden
            ``compute_loss``) no file says whether it divides.
        preconditioner: as in :class:`Stage`. "none" also reads runs of Adam that were saved without ``optimizer.pt``
            (``save_only_model=True``): gradients count as they are, and not as Adam scaled them.

    Raises:
        FileNotFoundError: no Trainer's run, or a file is missing.
        ValueError: something cannot be inferred; the message names the argument to give. Or the run learnt from
            preferences.
        MismatchError: the files, or an argument and the files, contradict each other.

    Warns:
        UserWarning: if the final model is not the last checkpoint; if clip factors had to be assumed for steps whose
            gradient norm was not logged; or if ``max_grad_norm`` is not the run's own.
    """
    if is_callback_dir(dir):
        _refuse_options(
            dir, optimizer, learning_rate, schedule, warmup_steps, schedule_options, max_grad_norm, momentum, steps,
            accumulation,
        )  # fmt: skip
        return callback_stage(dir, segments, stage, preconditioner)
    folders, run = trainer_folders(dir, steps)
    if optimizer is None:
        check_trainer_optimizer(folders[-1].path)
    if steps is None:
        end, remark = step_of_final_model(from_home(dir).absolute(), folders, model)
        folders, run = ([folder for folder in some if folder.step <= end] for some in (folders, run))
        if remark:
            warnings.warn(remark, UserWarning, stacklevel=3)
    _refuse_preferences(folders[-1])
    last = folders[-1].step
    rates = trainer_rates(run, schedule, learning_rate, warmup_steps, schedule_options)
    clipped = clipping(folders[-1].history, trainer_norms(run, max_grad_norm))
    if clipped.assumed:
        warnings.warn(f"{str(dir)!r}: {clipped.assumed}", UserWarning, stacklevel=3)
    names = None
    described: dict[int, Optimizer] = {}
    if preconditioner == "none" and not any((folder.path / _OPTIMIZER).is_file() for folder in folders):
        optimizer = optimizer or _without_state(folders[-1])
    elif optimizer is None or optimizer.preconditioned:
        _ = folders[-1].saved_optimizer  # what is missing first
        model = model or model_of(folders[-1].path)
        names, described = _described(folders, model, optimizer)
        optimizer = optimizer or described[last]
    undivided, smoothing = _loss(folders, model)
    checkpoints = [
        Checkpoint(
            trainer_weights(f, model),
            f.step,
            optimizer_state=NamedState(f.saved_optimizer, names) if names and optimizer.preconditioned else None,
        )
        for f in folders
    ]
    return Stage(
        stage,
        checkpoints,
        optimizer,
        segments,
        lr_schedule=rates,
        preconditioner=preconditioner,
        clip_factors=clipped.factors if min(clipped.factors) < 1 else None,
        time_factors=momentum_factors(optimizer, described, _first_groups(folders), last, given=momentum),
        trained=None if names is None else [name for group in names for name in group],
        accumulation=undivided if accumulation is None else accumulation,
        label_smoothing=smoothing,
    )


def _without_state(last: TrainerFolder) -> Optimizer:
    """The run's optimizer as far as plain gradients need it: the decay, of what the Trainer gives one.

    Raises:
        ValueError: it may have been SGD, whose momentum nothing tells.
    """
    kind = trainer_optimizer(last.path)
    if kind is None or not kind.preconditioned:
        _ = last.saved_optimizer  # says what is missing
    without = tuple(ParameterGroup(name, weight_decay=0) for name in _WITHOUT_DECAY)
    return Adam(weight_decay=trainer_arguments(last.path).get("weight_decay", 0.0), groups=without)


def _loss(folders: Sequence[TrainerFolder], model: nn.Module | None) -> tuple[int, float | None]:
    """Micro-batches that were summed undivided before a step, and how labels were smoothed, None if nothing says so.

    Raises:
        MismatchError: the run was resumed with another of the two.
    """
    told = {folder.step: trainer_arguments(folder.path) for folder in folders}
    versions = {folder.step: trainer_version(folder.path) for folder in folders}
    found = {
        step: (accumulated_undivided(arguments, model, versions[step]), arguments.get("label_smoothing_factor"))
        for step, arguments in told.items()
    }
    last = found[folders[-1].step]
    for step, (count, smoothing) in found.items():
        if told[step] and told[folders[-1].step] and (count, smoothing) != last:
            raise MismatchError(
                f"until step {step} the run was trained with label_smoothing_factor={smoothing} and summed the "
                f"gradients of {count} micro-batches a step, undivided, and in the end with {last[1]} and {last[0]}; a "
                "stage has one of each: choose the checkpoints before or after the change by steps=[...]"
            )
    return last


def _described(
    folders: Sequence[TrainerFolder], model: nn.Module, given: Optimizer | None
) -> tuple[list[list[str]], dict[int, Optimizer]]:
    """Names of the parameters of each group in ``optimizer.pt``; the optimizer of each file, if none is given."""
    last = folders[-1]
    require_adapter(last.path, model)
    names = parameter_names(read_tensors(last.saved_optimizer), model, f"{_OPTIMIZER} of {last.path.name}", given)
    # Before torch 2.7 the state does not say which decay it has; the Trainer's is AdamW's.
    assumed = {"decoupled_weight_decay": True}
    described = {
        folder.step: describe_state(
            read_tensors(folder.saved_optimizer), f"{_OPTIMIZER} of {folder.path.name}", names, assumed
        )
        for folder in (folders if given is None else ())
    }
    return names, described


def _first_groups(folders: Sequence[TrainerFolder]) -> dict[int, Mapping[str, Any]]:
    """Options of the first parameter group at each checkpoint that has its optimizer, by step."""
    return {
        folder.step: read_tensors(folder.saved_optimizer)["param_groups"][0]
        for folder in folders
        if (folder.path / _OPTIMIZER).is_file()
    }


_OPTIMIZER = "optimizer.pt"
_WITHOUT_DECAY = ("*bias*", "*[nN]orm*", "*ln_*")  # what the Trainer does not decay, as models name it
_PREFERENCES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")  # as TRL logs them


def _refuse_preferences(last: TrainerFolder) -> None:
    """Refuse runs whose loss compares two answers: it is no sum over training sequences of one task here."""
    logged_keys = {key.removeprefix("eval_") for entry in last.history for key in entry}
    for key in _PREFERENCES:
        if key in logged_keys:
            raise ValueError(
                f"{str(last.path)!r} logged {key!r}: the run learnt from preferences (DPO or the like), and its loss "
                "is none of a language model's. Write a Task for it, and give source_proj.Trajectory the checkpoints"
            )


def _refuse_options(dir: str | Path, *given: object) -> None:
    if any(option is not None for option in given):
        raise ValueError(
            f"{str(dir)!r} was recorded by a RecorderCallback, which wrote down optimizer, learning rates, clipping "
            "and steps: leave optimizer=, learning_rate=, schedule=, warmup_steps=, schedule_options=, max_grad_norm=, "
            "momentum=, steps= and accumulation= out"
        )
