"""The learning rate and the momentum of every update of a Lightning run."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from source_proj._errors import MismatchError
from source_proj.integrations.momentum import GivenValues, given_values

__all__ = ["SavedSchedule", "logged_values", "momenta", "of_updates", "rates"]

_PERIODS = {"T_0", "T_max", "total_size"}  # in the states of torch's warm restarts, cosine and cycles
_FROM_BASE = _PERIODS | {"step_size", "milestones", "gamma", "power", "_schedule_phases"}
_RELATIVE = 1e-6  # a CSVLogger prints float32 numbers where a model logs its rate itself


@dataclass(frozen=True)
class SavedSchedule:
    """What a checkpoint knows of the update that follows it.

    Attributes:
        step: updates before it.
        batches: Lightning's own count for its logs, of batches (accumulated ones together); None if it is not known.
        optimizer: its optimizer's ``state_dict()``.
        schedulers: the states of its schedulers.
    """

    step: int
    batches: int | None
    optimizer: Mapping[str, Any]
    schedulers: Sequence[Mapping[str, Any]]

    @property
    def group(self) -> Mapping[str, Any]:
        """Options of the first parameter group."""
        options: Mapping[str, Any] = self.optimizer["param_groups"][0]
        return options

    @property
    def logs_updates(self) -> bool:
        """Whether logs count updates; they count batches where a module steps its optimizer itself, not once a batch.

        A checkpoint that is written at the end of a batch does not count that one yet.
        """
        return self.batches is None or self.step - self.batches in (0, 1)

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


def of_updates(saved: Sequence[SavedSchedule], logged: LoggedValues) -> LoggedValues:
    """The logged values, or none of them if their numbers are not those of updates."""
    return logged if all(checkpoint.logs_updates for checkpoint in saved) else LoggedValues({}, {})


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
        raise ValueError(_no_rates(saved))
    known = {**{checkpoint.step: checkpoint.rate for checkpoint in saved}, **logged}
    begin = _first_rate(saved, known)
    if begin is not None:
        known.setdefault(0, begin)
    remedy = "(LearningRateMonitor(logging_interval='step') logs all): give schedule="
    return _filled(known, last, "learning rate", remedy, longest=_updates_per_step(saved, _repeats))


def _no_rates(saved: Sequence[SavedSchedule]) -> str:
    lacking = "there is no metrics.csv (or metrics=) of a CSVLogger with the rates of a LearningRateMonitor"
    for checkpoint in saved:
        if not checkpoint.logs_updates:
            lacking = f"its {checkpoint.step} updates took {checkpoint.batches} batches, by which Lightning logs"
    return (
        f"the run had a learning-rate scheduler, and {lacking}: give schedule=, a function of the update's number or "
        "one value each"
    )


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
    return _filled(known, last, "momentum", remedy, longest=0 if cycled else math.inf)


def _first_rate(saved: Sequence[SavedSchedule], known: Mapping[int, float]) -> float | None:
    """Rate of update 0; None where a scheduler may have begun elsewhere than at the optimizer's, as one that warms up.

    Args:
        saved: the checkpoints.
        known: update's number → its rate, of at least one.
    """
    group, first = saved[0].group, min(known)
    states = saved[0].schedulers  # others may follow, as that of averaging at the end
    if "initial_lr" in group and states and all(map(_begins_at_base, states)):
        return float(group["initial_lr"])
    moved = states or "initial_lr" in group  # which a scheduler writes there
    return known[first] if not moved or first < _updates_per_step(saved, _is_any) else None


def _updates_per_step(saved: Sequence[SavedSchedule], which: Callable[[Mapping[str, Any]], bool]) -> float:
    """Updates between two steps of some schedulers, as the checkpoints count them."""
    per_step = math.inf
    for checkpoint in saved:
        for state in filter(which, checkpoint.schedulers):
            taken = state.get("last_epoch", checkpoint.step)  # a chain of schedulers does not count
            per_step = min(per_step, checkpoint.step / taken if taken else math.inf)
    return per_step


def _is_any(_: Mapping[str, Any]) -> bool:
    return True


def _begins_at_base(state: Mapping[str, Any]) -> bool:
    """Whether a scheduler's first rate is the one that the optimizer was made with."""
    parts = state.get("_schedulers")
    return all(map(_begins_at_base, parts)) if parts else not _FROM_BASE.isdisjoint(state)


def _repeats(state: Mapping[str, Any]) -> bool:
    """Whether a scheduler, or one that it is put together from, comes back to rates that it had.

    One that does not has a rate twice only where it stays.
    """
    return not _PERIODS.isdisjoint(state) or any(map(_repeats, state.get("_schedulers") or ()))


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


def _filled(known: Mapping[int, float], last: int, what: str, remedy: str, *, longest: float) -> list[float]:
    """Values of updates 0 to last - 1; between known ones they must be equal, and lie no further apart than longest."""
    points = sorted({0, *(t for t in known if t <= last)})
    values: list[float] = []
    for begin, end in zip(points, [*points[1:], last], strict=True):
        holds = end - begin <= max(longest, 1) and known.get(end, known.get(begin)) == known.get(begin)
        if begin not in known or (end > begin + 1 and not holds):
            here, there = (known.get(t, "not known") for t in (begin, end))
            raise ValueError(
                f"the {what} was {here} at update {begin} and {there} at update {end}, and none was logged in between "
                f"{remedy}"
            )
        values += [known[begin]] * (end - begin)
    return values
