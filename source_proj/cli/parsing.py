"""Turn the words of a command line into objects: ``module:function``, options, checkpoints, shards."""

import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from source_proj.sketch import Sketch
from source_proj.task import CausalLM, Classification, Regression, Task
from source_proj.trajectory import SGD, Checkpoint, Trajectory

__all__ = [
    "load_function",
    "load_model",
    "load_object",
    "make_sketch",
    "make_task",
    "make_trajectory",
    "needed",
    "parse_damping",
    "parse_json",
    "parse_options",
    "parse_picture",
    "parse_segments",
    "parse_steps",
    "parse_target",
    "parse_weights",
    "with_options",
]

_FILES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_TASKS = {"classification": Classification, "regression": Regression, "causal-lm": CausalLM}


def load_object(name: str, what: str) -> Any:
    """Import what ``module:function`` names; functions and classes are called without arguments.

    The current directory is importable. An object that is neither is used as it is.

    Args:
        name: ``package.module:function``.
        what: the option it was given for, for messages.

    Raises:
        ValueError: if the name has no colon, or names nothing.
    """
    value = _named(name, what)
    if inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, functools.partial):
        return value()
    return value


def load_function(name: str, what: str) -> Callable[..., Any]:
    """Import a function that ``module:function`` names, to be called later.

    Args:
        name: ``package.module:function``.
        what: the option it was given for, for messages.

    Raises:
        ValueError: if the name has no colon, or names nothing.
        TypeError: if it names what cannot be called.
    """
    value = _named(name, what)
    if not callable(value):
        raise TypeError(f"{what} {name!r} must name a function, got {type(value).__name__}")
    function: Callable[..., Any] = value
    return function


def _named(name: str, what: str) -> Any:
    """What ``module:attribute`` names."""
    module_name, _, attribute = name.partition(":")
    if what in ("--queries", "--data") and (Path(name).is_file() or name.endswith(_FILES)):
        raise ValueError(f"{what} is given as module:function, got the file {name!r}: files of texts go to --dataset")
    if not module_name or not attribute:
        raise ValueError(f"{what} must be given as module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there, but something that it imports is not
        raise ValueError(f"{what} {name!r}: no module {error.name!r} here or among the installed packages") from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{what} {name!r}: {module_name} has no {attribute!r}")
        value = getattr(value, part)
    return value


def load_model(name: str) -> nn.Module:
    """Import a model.

    Raises:
        TypeError: if the name leads to anything but an ``nn.Module``.
    """
    model = load_object(name, "--model")
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {name!r} must give a torch.nn.Module, got {type(model).__name__}")
    return model


def parse_options(pairs: Iterable[str], what: str) -> dict[str, Any]:
    """Read ``key=value`` pairs; values are JSON where they can be, else words.

    Example:
        >>> parse_options(["label_smoothing=0.1", "loss=mse", "shift=true"], "--task-option")
        {'label_smoothing': 0.1, 'loss': 'mse', 'shift': True}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"{what} must be given as key=value, got {pair!r}")
        try:
            options[key.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[key.replace("-", "_")] = value
    return options


def make_task(name: str, options: Iterable[str] = ()) -> Task:
    """Make a task from its name and options, or import a custom one.

    Raises:
        ValueError: for an unknown name or option.
        TypeError: if an imported object is no task.
    """
    chosen = parse_options(options, "--task-option")
    if ":" in name:
        if chosen:
            raise ValueError(
                f"--task-option {sorted(chosen)} has no meaning beside --task {name}; set it in the function"
            )
        task = load_object(name, "--task")
        if not isinstance(task, Task):
            raise TypeError(f"--task {name!r} must give a source_proj.Task, got {type(task).__name__}")
        return task
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(_TASKS)}, or give module:function")
    kind: Any = _TASKS[name]
    made: Task = kind()
    return with_options(made, options)


def with_options(task: Task, options: Iterable[str]) -> Task:
    """A task with some of its options changed.

    Raises:
        ValueError: it has no such option.
    """
    chosen, known = parse_options(options, "--task-option"), inspect.signature(type(task)).parameters
    unknown = [key for key in chosen if key not in known]
    if unknown:
        raise ValueError(f"task {task.name} has no option {unknown}; its options are {list(known)}")
    if not chosen:
        return task
    spec = {**task.spec(), **chosen}
    if "reduction" in chosen and "normalizer" not in chosen:  # that of a mean over tokens belongs to no other
        spec.pop("normalizer", None)
    return Task.from_spec(spec)


def make_sketch(dim: int, kind: str, seed: int, nnz: int, backend: str | None) -> Sketch:
    """Make the sketch of the options."""
    return Sketch(dim=dim, kind=kind, seed=seed, nnz=nnz, backend=backend)


def make_trajectory(
    recorder: str | None,
    trajectory: str | None,
    checkpoints: Iterable[str],
    *,
    lr: float | None,
    momentum: float,
    weight_decay: float,
    segments: int | None,
    hf_run: str | None = None,
    hf_options: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> Trajectory:
    """Make the trajectory from exactly one source.

    That is a Recorder's directory, a Trainer's (``hf_run``), ``module:function``, or ``STEP=PATH`` checkpoints.

    Raises:
        ValueError: if none or several are given, or options are given that would not be used.
    """
    points = list(checkpoints)
    given = [flag for flag, value in _flags(recorder, trajectory, points, hf_run) if value]
    if len(given) != 1:
        raise ValueError(
            "say where the checkpoints are in one way: --recorder DIR, --hf-run DIR, --checkpoint STEP=PATH "
            f"(repeated), or --trajectory module:function; got {' and '.join(given) or 'none'}"
        )
    if not points and (lr is not None or momentum or weight_decay):
        raise ValueError(f"--lr, --momentum and --weight-decay belong to --checkpoint; {given[0]} brings its own")
    if hf_options and not hf_run:
        raise ValueError(_of_trainers([*hf_options], given[0]))
    if hf_run:
        return Trajectory.from_hf_trainer(hf_run, segments=segments or 1, model=model, **(hf_options or {}))
    if recorder:
        return Trajectory.from_recorder(recorder, segments=segments or 1)
    if trajectory:
        if segments is not None:
            raise ValueError(f"--segments belongs to --recorder and --checkpoint; {trajectory} brings its own")
        made = load_object(trajectory, "--trajectory")
        if not isinstance(made, Trajectory):
            raise TypeError(
                f"--trajectory {trajectory!r} must give a source_proj.Trajectory, got {type(made).__name__}"
            )
        return made
    if lr is None:
        raise ValueError("--checkpoint needs --lr, the constant learning rate; for a schedule use --trajectory")
    return Trajectory(
        sorted((_checkpoint(point, lr) for point in points), key=lambda checkpoint: checkpoint.step),
        optimizer=SGD(momentum=momentum, weight_decay=weight_decay),
        segments=segments or 1,
    )


def _of_trainers(options: list[str], given: str) -> str:
    """What to say of a Trainer's options beside another run."""
    named = " and ".join(f"--{option.replace('_', '-')}" for option in options)
    belong = f"{named} {'belongs' if len(options) == 1 else 'belong'} to --hf-run"
    if given == "--checkpoint" and "learning_rate" in options:
        return f"{belong}; the constant learning rate of --checkpoint is --lr"
    return f"{belong}; {given} brings its own"


def needed(value: str | None, flag: str) -> str:
    """Refuse a missing option.

    Raises:
        ValueError: it is missing.
    """
    if value is None:
        raise ValueError(f"{flag} is missing: give it, or a text file by --dataset")
    return value


def _flags(
    recorder: str | None, trajectory: str | None, points: list[str], hf_run: str | None
) -> list[tuple[str, object]]:
    return [("--recorder", recorder), ("--hf-run", hf_run), ("--trajectory", trajectory), ("--checkpoint", points)]


def _checkpoint(point: str, lr: float) -> Checkpoint:
    step, equals, path = point.partition("=")
    if not equals or not step.isdecimal() or not path:
        raise ValueError(f"--checkpoint must be given as STEP=PATH, such as 500=weights.pt, got {point!r}")
    return Checkpoint(path, int(step), lr=lr)


def parse_steps(text: str | None) -> tuple[int, ...] | None:
    """Read numbers of steps, separated by commas.

    Example:
        >>> parse_steps("15,30,45")
        (15, 30, 45)
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--steps must be numbers of steps separated by commas, such as 15,30,45, got {text!r}")
    return tuple(map(int, words))


def parse_json(text: str | None, flag: str) -> dict[str, Any] | None:
    """Read a JSON object.

    Example:
        >>> parse_json('{"min_lr": 1e-6}', "--schedule-options")
        {'min_lr': 1e-06}
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{flag} must be a JSON object, such as '{{\"min_lr\": 1e-6}}', got {text!r}")
    return value


def parse_damping(text: str) -> float | str | None:
    """Read ``noise``, ``off`` or a number.

    Example:
        >>> parse_damping("noise"), parse_damping("off"), parse_damping("1e-3")
        ('noise', None, 0.001)
    """
    if text == "noise":
        return text
    if text == "off":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--damping must be noise, off or a number, got {text!r}") from None


def parse_segments(text: str | None) -> Any:
    """Read a number of segments, JSON lists of checkpoint indices, or a JSON mapping from stage names to either.

    Example:
        >>> parse_segments("2"), parse_segments("[[0, 1], [2]]"), parse_segments('{"train": 3}')
        (2, [[0, 1], [2]], {'train': 3})
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, bool) or not isinstance(value, int | list | dict):
        raise ValueError(f"--segments must be a number, or JSON such as [[0,1],[2]], got {text!r}")
    return value


def parse_target(text: str | None, numbers: Mapping[str, int] | None = None) -> str | int | None:
    """Read which class queries are asked about; None for their labels.

    Args:
        text: what was typed.
        numbers: of the classes that have names.

    Example:
        >>> parse_target("predicted"), parse_target("3"), parse_target("label"), parse_target("cat", {"cat": 1})
        ('predicted', 3, None, 1)
    """
    if text is None or text == "label":
        return None
    if text == "predicted":
        return text
    known = numbers or {}
    if text in known or text.isdecimal():
        return known[text] if text in known else int(text)
    names = f" or its name ({', '.join(known)})" if known else ""
    raise ValueError(f"--target must be label, predicted or the number of a class{names}, got {text!r}")


def parse_picture(text: str | None) -> tuple[int, ...] | None:
    """Read the shape of a picture.

    Example:
        >>> parse_picture("8x8"), parse_picture("3x32x32")
        ((8, 8), (3, 32, 32))
    """
    if text is None:
        return None
    sizes = text.lower().split("x")
    if len(sizes) not in (2, 3) or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--picture must be a shape such as 8x8 or 3x32x32, got {text!r}")
    return tuple(map(int, sizes))


def parse_weights(text: str | None) -> str | dict[str, float] | None:
    """What ``--parameter-weights`` says: a word, or numbers by glob.

    Raises:
        ValueError: a number is none.

    Example:
        >>> parse_weights("agreement"), parse_weights("embed.*=0.5,*.bias=2")
        ('agreement', {'embed.*': 0.5, '*.bias': 2.0})
    """
    if text is None or "=" not in text:
        return text
    pairs = [part.rpartition("=") for part in text.split(",")]
    try:
        return {glob.strip(): float(number) for glob, _, number in pairs}
    except ValueError as error:
        raise ValueError(f"--parameter-weights must be GLOB=NUMBER,..., got {text!r}: {error}") from None
