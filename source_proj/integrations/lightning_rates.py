"""The learning rate and the momentum of every update of a Lightning run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from source_proj._errors import MismatchError
from source_proj.integrations.momentum import GivenValues, given_values

__all__ = ["SavedSchedule", "logged_values", "momenta", "rates"]

_RELATIVE = 1e-6  # a CSVLogger prints float32 numbers where a model logs its rate itself


@dataclass(frozen=True)
class SavedSchedule:
    """What a checkpoint knows of the update that follows it.

    Attributes:
        step: updates before it.
        optimizer: its optimizer's ``state_dict()``.
        schedulers: the states of its schedulers.
    """

    step: int
    optimizer: Mapping[str, Any]
    schedulers: Sequence[Mapping[str, Any]]

    @property
    def group(self) -> Mapping[str, Any]:
        """Options of the first parameter group."""
        options: Mapping[str, Any] = self.optimizer["param_groups"][0]
        return options

    @property
    def rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.group["lr"])

    @property
    def momentum(self) -> float:
        """Momentum of the next update, or β₁; 0 where the optimizer has neither."""
        return _momentum(self.group)


class LoggedValues(NamedTuple):
    """Update's number → what a LearningRateMonitor logged of it."""

    rates: dict[int, float]
    momenta: dict[int, float]


def logged_values(directory: Path, metrics: str | Path | None) -> LoggedValues:
    """Read the ``metrics.csv`` of a CSVLogger: the first parameter group's learning rates, and its momenta if there.

    Args:
        directory: of the run; the file is in it, below it, or in the one above.
        metrics: the file, if it is elsewhere.

    Raises:
        FileNotFoundError: ``metrics`` does not exist.
        ValueError: there are several files.
    """
    if metrics is not None:
        files = [Path(metrics)]
        if not files[0].is_file():
            raise FileNotFoundError(f"metrics={str(metrics)!r} does not exist")
    else:
        files = sorted(directory.rglob("metrics.csv")) or [f for f in [directory.parent / "metrics.csv"] if f.is_file()]
    if len(files) > 1:
        raise ValueError(f"{str(directory)!r} holds {len(files)} files metrics.csv: say which by metrics=")
    logged = LoggedValues({}, {})
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            table = csv.DictReader(lines)
            columns = [name for name in table.fieldnames or () if name == "lr" or name.startswith("lr-")]
            beside = ("-momentum", "-weight_decay")  # what the monitor can log besides, under names of the same form
            of_rates = [name for name in columns if not name.endswith(beside)]
            of_momenta = [name for name in columns if name.endswith(beside[0])]
            for row in table:
                for values, names in ((logged.rates, of_rates), (logged.momenta, of_momenta)):
                    texts = [row[name] for name in names if row[name]]
                    if texts and row.get("step"):
                        values[int(float(row["step"]))] = float(texts[0])
    return logged


def rates(saved: Sequence[SavedSchedule], logged: Mapping[int, float], schedule: GivenValues | None) -> list[float]:
    """Learning rate of updates 0 to the last checkpoint's step.

    Args:
        saved: the checkpoints, in order of their steps.
        logged: update's number → its rate.
        schedule: the rates, if they are given.

    Raises:
        ValueError: they cannot be inferred; the message names the argument to give.
        MismatchError: a given schedule contradicts the log.
    """
    last = saved[-1].step
    if schedule is not None:
        return _given("schedule", schedule, logged, last)
    cycle = _one_cycle(saved, last)
    if cycle is not None:
        return _given("saved OneCycleLR", [rate for rate, _ in cycle], logged, last)
    if not logged and any(checkpoint.schedulers for checkpoint in saved):
        raise ValueError(
            "the run had a learning-rate scheduler, and there is no metrics.csv of a CSVLogger with the rates of a "
            "LearningRateMonitor: give schedule=, a function of the update's number or one value each, or metrics="
        )
    group = saved[0].group
    known = {**{checkpoint.step: checkpoint.rate for checkpoint in saved}, **logged}
    known.setdefault(0, float(group.get("initial_lr", group["lr"])))
    remedy = "(LearningRateMonitor(logging_interval='step') logs all): give schedule="
    return _filled(known, last, "learning rate", remedy)


def momenta(saved: Sequence[SavedSchedule], logged: Mapping[int, float], momentum: GivenValues | None) -> list[float]:
    """Momentum of updates 0 to the last checkpoint's step.

    Args:
        saved: the checkpoints, in order of their steps.
        logged: update's number → its momentum.
        momentum: the momenta, if they are given.

    Raises:
        ValueError: it changed on the way, and where is not known; the message names the argument to give.
        MismatchError: given momenta contradict the log.
    """
    last = saved[-1].step
    if momentum is not None:
        return _given("momentum", momentum, logged, last)
    cycle = _one_cycle(saved, last)
    if cycle is not None:
        return _given("saved OneCycleLR", [own for _, own in cycle], logged, last)
    known = {**{checkpoint.step: checkpoint.momentum for checkpoint in saved}, **logged}
    cycled = any(c.group.get("base_momentum") != c.group.get("max_momentum") for c in saved)
    if not cycled:
        known.setdefault(0, known[min(known)])
    remedy = "(LearningRateMonitor(logging_interval='step', log_momentum=True) logs all): give momentum="
    return _filled(known, last, "momentum", remedy, holds=not cycled)


def _momentum(group: Mapping[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def _one_cycle(saved: Sequence[SavedSchedule], last: int) -> list[tuple[float, float]] | None:
    """Rate and momentum of each update, replayed by torch's OneCycleLR; None if the run had no such, stepped each time.

    Its state and the optimizer's group hold all that it needs.
    """
    stepped = [len(c.schedulers) == 1 and c.schedulers[0].get("last_epoch") == c.step for c in saved]
    if not all(stepped) or "_schedule_phases" not in saved[-1].schedulers[0]:
        return None
    state, group = saved[-1].schedulers[0], saved[-1].group
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float32, device="cpu")], lr=1.0, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=2)
    optimizer.param_groups[0].update({key: value for key, value in group.items() if key != "params"})
    scheduler.load_state_dict({**state, "last_epoch": -1, "base_lrs": state["base_lrs"][:1]})
    optimizer.step()  # torch warns of schedulers that go before it
    updates = []
    for _ in range(last):
        scheduler.step()
        updates.append((float(optimizer.param_groups[0]["lr"]), _momentum(optimizer.param_groups[0])))
    return updates


def _given(name: str, given: GivenValues, logged: Mapping[int, float], last: int) -> list[float]:
    values = given_values(name, given, last)
    for update, value in logged.items():
        if update < last and abs(values[update] - value) > _RELATIVE * max(values):
            raise MismatchError(f"the {name} gives {values[update]} for update {update}, and {value} was logged")
    return values


def _filled(known: Mapping[int, float], last: int, what: str, remedy: str, *, holds: bool = True) -> list[float]:
    """Values of updates 0 to last - 1; between known ones they must be equal, and hold at all."""
    points = sorted({0, *(t for t in known if t <= last)})
    values: list[float] = []
    for begin, end in zip(points, [*points[1:], last], strict=True):
        if begin not in known or (end > begin + 1 and not (holds and known.get(end, known[begin]) == known[begin])):
            here, there = (known.get(t, "not known") for t in (begin, end))
            raise ValueError(
                f"the {what} was {here} at update {begin} and {there} at update {end}, and none was logged in between "
                f"{remedy}"
            )
        values += [known[begin]] * (end - begin)
    return values
