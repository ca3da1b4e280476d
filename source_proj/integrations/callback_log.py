"""The directory of a :class:`RecorderCallback`: one line for each event, and the checkpoints beside them.

::

    updates.jsonl             {"begin": 0}, {"step": 1, "lr": 0.1, "made": true, "momentum": 0.9, "grad_norm": 2.0},
                              {"checkpoint": 4}
    step_00000004.pt          the model's state_dict after 4 optimizer steps
    optimizer_00000004.pt     the optimizer's, with parameter names
    capture_00000004.pt       the sums of a capture, where there is one: at the last two saves, and at ends of segments

A line counts once it is whole, and a checkpoint once its line is there. What comes after the step that a run is resumed
from no longer counts.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from source_proj._errors import MismatchError
from source_proj._io.files import write_files
from source_proj._io.loading import load_tensors
from source_proj._io.outputs import from_home
from source_proj.integrations.callback_settings import RunSettings
from source_proj.integrations.momentum import momentum_factors
from source_proj.integrations.trainer_clipping import clipping
from source_proj.integrations.trainer_folder import read_tensors
from source_proj.trajectory import Checkpoint, PreconditionerMode, Segments, Stage
from source_proj.trajectory.optimizers.describe import describe_state
from source_proj.trajectory.recording.run_files import (
    capture_name,
    check_file,
    resume_name,
    weights_name,
    write_tensors,
)

__all__ = ["CallbackLog", "callback_stage", "is_callback_dir"]

_NAME = "updates.jsonl"
_FORMAT = "source-proj trainer callback 1"


@dataclass
class CallbackLog:
    """What was recorded, and the file that it is written to.

    Attributes:
        dir: the directory.
        begins: what each process was told, by the step it began with.
        rates: learning rate of the update that led to each step; 0 of one that was skipped.
        made: whether that update was made; nothing where that was not written down.
        norms: norm of its gradient before clipping, where it is known.
        momenta: the optimizer's momentum at that update, where it has one.
        checkpoints: steps of the checkpoints, by step: SHA-256 of the files with weights and optimizer.
        captures: by step, SHA-256 of the file with a capture's sums, and whether a segment ends there.
    """

    dir: Path
    begins: dict[int, RunSettings] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    made: dict[int, bool] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    momenta: dict[int, float] = field(default_factory=dict)
    checkpoints: dict[int, list[str]] = field(default_factory=dict)
    captures: dict[int, tuple[str, bool]] = field(default_factory=dict)

    @classmethod
    def begin(cls, dir: Path, step: int, settings: RunSettings, *, given_up: bool = False) -> CallbackLog:
        """Open a directory for a run that begins, or goes on, at a step.

        Args:
            dir: the directory.
            step: the step.
            settings: what its process was told.
            given_up: whether what was recorded is an attempt that the same process gave up, and may be dropped.

        Raises:
            MismatchError: the directory's record does not reach that step, or is of another loss; or the run begins
                anew where one was recorded.
        """
        dir.mkdir(parents=True, exist_ok=True)
        lines = _lines(dir) if is_callback_dir(dir) else []
        log = cls.replay(dir, lines)
        if step > 0 and step not in log.rates:
            raise MismatchError(
                f"the run goes on from step {step}, and {str(dir)!r} knows those up to {max(log.rates, default=0)}: "
                "give the directory that its beginning was recorded in"
            )
        if step == 0 and log.rates and not given_up:
            raise MismatchError(
                f"{str(dir)!r} holds the record of a run up to step {max(log.rates)}, and this one begins at step 0: "
                "go on with that run (trainer.train(resume_from_checkpoint=True)), or give an empty directory, or "
                "remove this one"
            )
        if step > 0:
            settings.require_same_loss(log.settings)
        lines.append({"begin": step, **settings.line(), "format": _FORMAT})
        write_files({dir / _NAME: "".join(f"{json.dumps(line)}\n" for line in lines).encode()})
        return cls.replay(dir, lines)

    @classmethod
    def open(cls, dir: Path) -> CallbackLog:
        """Read what a directory holds now."""
        return cls.replay(dir, _lines(dir))

    @classmethod
    def replay(cls, dir: Path, lines: list[dict[str, Any]]) -> CallbackLog:
        """Put the lines of a file together."""
        log = cls(dir)
        for line in lines:
            if "begin" in line:
                begin = int(line["begin"])
                log.begins = {step: told for step, told in log.begins.items() if step < begin}
                log.begins[begin] = RunSettings.read(line)
                for known in (log.rates, log.made, log.norms, log.momenta, log.checkpoints, log.captures):
                    for step in [step for step in known if step > begin]:
                        del known[step]
            elif "capture" in line:
                log.captures[int(line["capture"])] = (str(line["sha256"]), bool(line["ends_segment"]))
            elif "checkpoint" in line:
                log.checkpoints[int(line["checkpoint"])] = list(line["sha256"])
            else:
                if "made" in line:
                    log.made[int(line["step"])] = bool(line["made"])
                for key, known in (("lr", log.rates), ("grad_norm", log.norms), ("momentum", log.momenta)):
                    if key in line:
                        known[int(line["step"])] = float(line[key])
        return log

    @property
    def settings(self) -> RunSettings:
        """What the last process was told."""
        return self.begins[max(self.begins)]

    def norms_allowed(self, last: int) -> list[float]:
        """What the gradient of every update was clipped to, 0 for no clipping, as its own process was told."""
        ends = [*sorted(self.begins)[1:], last]
        allowed: list[float] = []
        for (_, told), end in zip(sorted(self.begins.items()), ends, strict=True):
            allowed += [told.max_grad_norm] * (min(end, last) - len(allowed))
        return allowed

    def skipped(self, last: int) -> list[int] | None:
        """Numbers of the updates until a step that were not made, from 0 on; None where that is not known of all."""
        steps = range(1, last + 1)
        return [step - 1 for step in steps if not self.made[step]] if all(step in self.made for step in steps) else None

    def add_step(self, step: int, rate: float | None, norm: float | None, momentum: float | None) -> None:
        """Write down an update; of rate None, one that was skipped."""
        optional = {"grad_norm": norm, "momentum": momentum}
        update = {"step": step, "lr": rate or 0.0, "made": rate is not None}
        self._append(update | {key: value for key, value in optional.items() if value is not None})

    def add_norm(self, step: int, norm: float) -> None:
        """Write down the norm of an update's gradient."""
        self._append({"step": step, "grad_norm": norm})

    def add_checkpoint(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint, unless this step has one."""
        if step in self.checkpoints or step == 0:
            return
        state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        hashes = write_tensors(
            {self.dir / weights_name(step): state, self.dir / resume_name(step): _named(optimizer, model)}
        )
        self.checkpoints[step] = hashes
        self._append({"checkpoint": step, "sha256": hashes})

    def add_capture(self, step: int, content: dict[str, Any], *, ends_segment: bool) -> None:
        """Write the sums of a capture, and let go of those that no resumed run will ask for."""
        if step in self.captures or step == 0:
            return
        (digest,) = write_tensors({self.dir / capture_name(step): content})
        self.captures[step] = (digest, ends_segment)
        self._append({"capture": step, "sha256": digest, "ends_segment": ends_segment})
        kept = {*sorted(self.captures)[-2:], *(old for old, (_, ends) in self.captures.items() if ends)}
        for old in set(self.captures) - kept:
            (self.dir / capture_name(old)).unlink(missing_ok=True)

    def captured(self, step: int) -> dict[str, Any]:
        """Read the sums of a capture.

        Raises:
            MismatchError: there are none of this step, or the file was changed.
        """
        path = self.dir / capture_name(step)
        if step not in self.captures or not path.is_file():
            raise MismatchError(
                f"{str(self.dir)!r} holds no captured rows of step {step}: go on from one of the Trainer's last two "
                "checkpoints, or begin anew in an empty directory"
            )
        check_file(path, self.captures[step][0])
        content: dict[str, Any] = load_tensors(path, "begin anew in an empty directory", mapped=True)
        return content

    def _append(self, line: dict[str, Any]) -> None:
        with (self.dir / _NAME).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


def is_callback_dir(dir: str | Path) -> bool:
    """Whether a RecorderCallback wrote to a directory."""
    return (from_home(dir) / _NAME).is_file()


def callback_stage(
    dir: str | Path, segments: Segments = 1, stage: str = "train", preconditioner: PreconditionerMode = "scalar"
) -> Stage:
    """Read back what a :class:`RecorderCallback` recorded, without the model.

    Args:
        dir: its directory.
        segments: as in :class:`Stage`.
        stage: the stage's name.
        preconditioner: as in :class:`Stage`.

    Raises:
        FileNotFoundError: nothing was recorded there, or a file has gone.
        MismatchError: a file is damaged or was changed.
        ValueError: no checkpoint was recorded.

    Warns:
        UserWarning: if clip factors had to be assumed for steps whose gradient norm is not known.
    """
    directory = from_home(dir).absolute()
    if not is_callback_dir(directory):
        raise FileNotFoundError(f"{str(directory)!r} holds no {_NAME}: give the directory of a RecorderCallback")
    log = CallbackLog.replay(directory, _lines(directory))
    steps = sorted(log.checkpoints)
    if not steps:
        raise ValueError(f"no checkpoint was recorded in {str(directory)!r}: train, with every= or at= within the run")
    absent = [step for step in range(1, steps[-1] + 1) if step not in log.rates]
    if absent:
        raise MismatchError(f"{str(directory / _NAME)!r} lacks the step {absent[0]}: it was damaged")
    checkpoints = [_opened(directory, step, log.checkpoints[step], log.rates[step]) for step in steps]
    states = {step: read_tensors(directory / resume_name(step)) for step in steps}
    described = {step: describe_state(state, resume_name(step)) for step, state in states.items()}
    state, optimizer = states[steps[-1]], described[steps[-1]]
    groups = {step: state["param_groups"][0] for step, state in states.items()}
    momenta = {step - 1: momentum for step, momentum in log.momenta.items()}
    names = [name for group in state["param_groups"] for name in group["param_names"]]  # "" for one not in the model
    skipped = log.skipped(steps[-1])
    # What overflowed has no norm, and nothing was clipped of it.
    norms = {**log.norms, **{number + 1: 0.0 for number in skipped or ()}} if log.norms else {}
    history = [{"step": step, "grad_norm": norm} for step, norm in norms.items()]
    clipped = clipping(history, log.norms_allowed(steps[-1]))
    if clipped.assumed:
        warnings.warn(f"{str(directory)!r}: {clipped.assumed}", UserWarning, stacklevel=2)
    return Stage(
        stage,
        checkpoints,
        optimizer,
        segments,
        lr_schedule=[log.rates[step] for step in range(1, steps[-1] + 1)],
        preconditioner=preconditioner,
        clip_factors=clipped.factors if min(clipped.factors) < 1 else None,
        time_factors=momentum_factors(optimizer, described, groups, steps[-1], momenta),
        trained=[name for name in names if name],
        accumulation=log.settings.accumulation,
        label_smoothing=log.settings.label_smoothing,
        skipped=skipped,
    )


def _opened(directory: Path, step: int, hashes: list[str], rate: float) -> Checkpoint:
    optimizer = directory / resume_name(step)
    checkpoint = Checkpoint(directory / weights_name(step), step, rate, optimizer_state=optimizer)
    if checkpoint.hash() != hashes[0]:
        raise MismatchError(f"{str(checkpoint.path)!r} was changed since it was recorded: bring the file back")
    return checkpoint


def _lines(dir: Path) -> list[dict[str, Any]]:
    """The whole lines of the file; a last one that a kill cut short does not count."""
    *whole, _ = (dir / _NAME).read_text(encoding="utf-8").split("\n")
    try:
        lines = [dict(json.loads(line)) for line in whole]
    except (ValueError, TypeError) as error:
        raise MismatchError(f"{str(dir / _NAME)!r} is damaged ({type(error).__name__}: {error})") from error
    if not lines or lines[0].get("format") != _FORMAT:
        raise MismatchError(f"{str(dir / _NAME)!r} was not written by a RecorderCallback of this version")
    return lines


def _named(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state with the model's names in it, under torch's own key."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    groups = [
        {**saved, "param_names": [names.get(id(p), "") for p in live["params"]]}
        for saved, live in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}
