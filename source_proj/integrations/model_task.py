"""The task that a model of transformers was trained on, by its class, its configuration and its run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from source_proj._io.outputs import from_home
from source_proj.integrations.callback_log import CallbackLog, is_callback_dir
from source_proj.integrations.trainer_arguments import trainer_arguments, trainer_version, version_numbers
from source_proj.integrations.trainer_folders import trainer_folders
from source_proj.task import CausalLM, Classification, Regression, Task

__all__ = ["task_for"]

_CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Audio", "Video"))  # of one loss
_TAGGERS = ("ForTokenClassification", "ForMaskedLM")


def task_for(model: nn.Module, run: str | Path | None = None) -> Task:
    """The loss that transformers' Trainer trains a model with, by the model's class and configuration.

    Classifiers of sequences, images, sounds and videos: cross-entropy, or the squared error where there is one output.
    Causal language models: the mean over all tokens of a batch.

    Args:
        model: the model.
        run: the Trainer's ``output_dir``, or what a :class:`RecorderCallback` recorded, which says whether labels were
            smoothed, and which version of transformers trained. Without it that is the one that saved the model's
            configuration, which may be another, of a model that was not saved since.

    Raises:
        ValueError: it is of another kind, or was trained with a loss that no built-in task has.
    """
    unwrapped: Any = model
    name = type(unwrapped.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    smoothing, version = (0.0, None) if run is None else _told(run)
    if name.endswith(_CLASSIFIERS):
        return _classifier_task(model, smoothing)
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        if smoothing:
            raise ValueError(f"the run smoothed its labels by {smoothing}, which CausalLM does not know: write a Task")
        _warn_of_routing(model.config)
        return CausalLM(reduction="token", normalizer=None if _skips_first_label(model, version) else "labels")
    raise ValueError(
        f"{name} is no classifier of whole inputs and no causal language model: {_other(name, smoothing)} (on the "
        "command line --task, --model and --data)"
    )


def _other(name: str, smoothing: float) -> str:
    """Which task a model of another kind may have."""
    if name.endswith(_TAGGERS) and not smoothing:
        return "as its loss is the mean over all labels of a batch, give sp.CausalLM(shift=False, reduction='token')"
    return "give a task of your own, or sp.CausalLM(shift=False) where every token has a label"


def _warn_of_routing(config: Any) -> None:
    """Say that a mixture of experts was trained for balance, too, which is no loss of an example's own."""
    share = getattr(config, "router_aux_loss_coef", 0.0) or 0.0
    if share and getattr(config, "output_router_logits", False):
        warnings.warn(
            f"the model adds {share:g} times a loss of how evenly a batch uses its experts (router_aux_loss_coef), "
            "which is no example's own: the task leaves it out",
            UserWarning,
            stacklevel=3,
        )


def _told(run: str | Path) -> tuple[float, str]:
    """How much a run smoothed its labels, and the version of transformers that trained: today's where nothing says."""
    import transformers

    if is_callback_dir(run):
        settings = CallbackLog.open(from_home(run)).settings
        return settings.label_smoothing, settings.transformers or transformers.__version__
    last = trainer_folders(run)[0][-1].path
    smoothing = float(trainer_arguments(last).get("label_smoothing_factor", 0.0))
    return smoothing, trainer_version(last) or transformers.__version__


def _skips_first_label(model: nn.Module, version: str | None) -> bool:
    """Whether the Trainer's count of a batch's labels leaves out each sequence's first, which nothing predicts.

    It does from transformers 5.10 on (the run's own), for models whose class says that their loss shifts labels:
    ``LlamaForCausalLM``, not ``GPT2LMHeadModel``.

    Args:
        model: the model.
        version: of the transformers that trained; None: as the model's configuration says.
    """
    import transformers

    trained = version or str(getattr(model.config, "transformers_version", None) or transformers.__version__)
    return version_numbers(trained) >= (5, 10) and getattr(model, "loss_type", None) == "ForCausalLM"


def _classifier_task(model: nn.Module, smoothing: float) -> Task:
    """By ``problem_type`` and ``num_labels``, as transformers chooses the loss of a classifier."""
    kind, outputs = getattr(model.config, "problem_type", None), int(model.config.num_labels)  # type: ignore[union-attr,arg-type]
    if kind == "multi_label_classification" or (kind == "regression" and outputs > 1):
        raise ValueError(
            f"{type(model).__name__} has problem_type={kind!r} with {outputs} outputs, which no built-in task has: "
            "write a Task"
        )
    if kind == "regression" or outputs == 1:
        if smoothing:
            raise ValueError(f"the run smoothed its labels by {smoothing}, and the model has one output: write a Task")
        return Regression()
    return Classification(label_smoothing=smoothing)
