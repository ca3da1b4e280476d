"""The learning rate of every update of a Trainer's run, also of those that were not logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from source_proj._errors import MismatchError
from source_proj.integrations.schedule_options import rates_with_options
from source_proj.integrations.schedules import NAMES, Fit, agreeing, learning_rates, same_integral
from source_proj.integrations.trainer_folder import TrainerFolder, logged

__all__ = ["GivenSchedule", "trainer_rates"]


class NamedSchedule(NamedTuple):
    """A schedule by transformers' name, with its settings."""

    name: str
    options: Mapping[str, Any]


GivenSchedule: TypeAlias = str | Callable[[int], float] | Sequence[float]
_RELATIVE = 1e-6  # between a logged rate and a given schedule: some callers give float32 numbers


def trainer_rates(
    folders: Sequence[TrainerFolder],
    schedule: GivenSchedule | None = None,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    schedule_options: Mapping[str, Any] | None = None,
) -> list[float]:
    """Learning rate of updates 0 to the last checkpoint's step, of the first parameter group.

    Where every update was logged, these are the rates. Else the schedules of transformers are compared with all that
    is known: logged rates, peak rates and next rates from ``scheduler.pt``. A run that was resumed with another length
    or peak rate has several pieces, each with a schedule of its own.

    Args:
        folders: of one run.
        schedule: transformers' name, or a function of the update's number, or one value per update.
        learning_rate: peak learning rate, if ``scheduler.pt`` is missing.
        warmup_steps: length of the warm-up.
        schedule_options: settings of a schedule that is given by name, ``lr_scheduler_kwargs``.

    Raises:
        ValueError: what is known fits no schedule, or several that differ; the message names the argument that helps.
        MismatchError: an argument contradicts what was logged.
    """
    last = folders[-1].step
    if schedule_options and not isinstance(schedule, str):
        raise ValueError(f"schedule_options={dict(schedule_options)} belong to a schedule by name, got {schedule!r}")
    named = None if not isinstance(schedule, str) else NamedSchedule(schedule, schedule_options or {})
    orders = _orders(folders)
    known = _known(folders, orders[0])
    if schedule is not None and not isinstance(schedule, str):
        rates = [float(schedule(t)) for t in range(last)] if callable(schedule) else [float(rate) for rate in schedule]
        if len(rates) != last:
            raise ValueError(f"schedule has {len(rates)} entries for the {last} updates of the run: give one each")
        _check(rates, known)
        return rates
    _refuse_skipped(folders)
    complete = (
        schedule is None and learning_rate is None and warmup_steps is None and all(t in known for t in range(last))
    )
    if complete and len(orders) == 1:
        return [known[t] for t in range(last)]
    try:
        return _fitted(folders, known, named, learning_rate, warmup_steps)
    except ValueError:
        for order in orders[1:]:
            with suppress(ValueError):
                return _fitted(folders, _known(folders, order), named, learning_rate, warmup_steps)
        if complete:
            return [known[t] for t in range(last)]
        raise


def _fitted(
    folders: Sequence[TrainerFolder],
    known: Mapping[int, float],
    schedule: NamedSchedule | None,
    learning_rate: float | None,
    warmup_steps: int | None,
) -> list[float]:
    rates: list[float] = []
    carried: list[float] = []
    for piece in _pieces(folders, learning_rate):
        # A run that is resumed takes its first step at the rate that the saved optimizer had, by the former schedule.
        rates += carried
        updates = range(len(rates), piece.end)
        agreed = {t: known[t] for t in updates if t in known}
        rates += piece.rates({**piece.upcoming, **agreed}, updates, schedule, warmup_steps)
        carried = [piece.upcoming[piece.end]] if piece.end in piece.upcoming else []
    _check(rates, known)
    return rates


def _orders(folders: Sequence[TrainerFolder]) -> list[bool]:
    """Whether a step's logged rate is that of the update after it (True) or of the one before it: what is possible.

    Trainers of today log the rate of the update that led to the step, those before 2024 that of the next one.
    """
    at_steps = logged(folders[-1].history, "learning_rate")
    differing = any(at_steps[step] != rate for step, rate in _upcoming(folders).items() if step in at_steps)
    return [False] if differing else [False, True]


def _upcoming(folders: Sequence[TrainerFolder]) -> dict[int, float]:
    return {f.step: float(f.scheduler["_last_lr"][0]) for f in folders if f.scheduler.get("_last_lr")}


def _known(folders: Sequence[TrainerFolder], after: bool) -> dict[int, float]:
    """Update's number → its learning rate, where that was logged."""
    at_steps = logged(folders[-1].history, "learning_rate")
    return {step - (not after): rate for step, rate in at_steps.items()}


def _refuse_skipped(folders: Sequence[TrainerFolder]) -> None:
    for folder in folders:
        taken = folder.scheduler.get("last_epoch", folder.step)
        if taken != folder.step and "lr_lambdas" in folder.scheduler:
            raise ValueError(
                f"the scheduler of {folder.path.name} took {taken} steps of {folder.step}: a GradScaler skipped the "
                "others, and which ones is not written down. Give schedule=, one learning rate per step, 0 for those"
            )


@dataclass(frozen=True)
class _Piece:
    """Updates up to ``end`` under one schedule, made for ``total`` updates with the peak rate ``base``.

    Its schedulers' next rates are known apart: at its end they are not those of the piece that follows. ``names`` are
    the schedules that come into question.
    """

    end: int
    total: int
    base: float
    upcoming: Mapping[int, float]
    names: Sequence[str]

    def rates(
        self, known: Mapping[int, float], updates: range, schedule: NamedSchedule | None, warmup_steps: int | None
    ) -> list[float]:
        """Learning rates of some updates under the schedule that agrees with what is known."""
        if schedule is not None and (schedule.options or schedule.name not in NAMES):
            name, options = schedule
            return rates_with_options(name, options, known, self.total, self.base, warmup_steps)[
                updates.start : updates.stop
            ]
        fit = self.fit(known, updates, self.names if schedule is None else (schedule.name,), warmup_steps)
        at = np.arange(updates.start, updates.stop)
        rates: list[float] = learning_rates(fit.name, at, fit.lowest, self.total, self.base).tolist()
        return rates

    def fit(self, known: Mapping[int, float], updates: range, names: Sequence[str], warmup_steps: int | None) -> Fit:
        """The one schedule that agrees, or one of several with the same integral."""
        fits = agreeing(known, self.total, self.base, names, warmup_steps)
        where = f"updates {updates.start} to {updates.stop - 1}, peak {self.base}, planned for {self.total} updates"
        if not fits:
            tried = " ".join(names) if warmup_steps is None else f"{' '.join(names)} with {warmup_steps} warm-up steps"
            raise ValueError(
                f"the learning rates that are known ({_shown(known)}; {where}) fit none of the schedules tried "
                f"({tried}): give schedule=, a function of the update's number or one value per update"
            )
        if not same_integral(fits, updates, self.total, self.base):
            raise ValueError(
                f"the learning rates that are known ({_shown(known)}; {where}) fit {'; '.join(map(str, fits))}: say "
                "which by schedule= and warmup_steps="
            )
        return fits[0]


def _pieces(folders: Sequence[TrainerFolder], learning_rate: float | None) -> Iterator[_Piece]:
    def settings(folder: TrainerFolder) -> tuple[int, float]:
        bases = folder.scheduler.get("base_lrs")
        if not bases and learning_rate is None:
            raise ValueError(
                f"{folder.path.name} has no scheduler.pt with a peak learning rate, and not every step was logged: "
                "give learning_rate= (and schedule=, warmup_steps= if they are not told by the logged rates)"
            )
        base = float(bases[0]) if bases else float(learning_rate or 0.0)
        if learning_rate is not None and not math.isclose(base, learning_rate, rel_tol=_RELATIVE):
            raise MismatchError(f"learning_rate={learning_rate}, but {folder.path.name} has {base} in its scheduler.pt")
        return folder.max_steps, base

    for (total, base), group in groupby(folders, settings):
        members = list(group)
        yield _Piece(members[-1].step, total, base, _upcoming(members), _possible(members))


def _possible(folders: Sequence[TrainerFolder]) -> Sequence[str]:
    """Schedules that come into question.

    torch keeps what a scheduler's factors depend on, but not a plain function: of transformers' schedules that is the
    constant one without warm-up, and no other.
    """
    kept = [folder.scheduler["lr_lambdas"] for folder in folders if folder.scheduler.get("lr_lambdas")]
    if not kept:
        return NAMES
    if all(settings[0] is None for settings in kept):
        return ("constant",)
    return tuple(name for name in NAMES if name != "constant")


def _check(rates: Sequence[float], known: Mapping[int, float]) -> None:
    peak = max(rates, default=0.0)
    for update, rate in known.items():
        if update < len(rates) and abs(rates[update] - rate) > _RELATIVE * peak:
            raise MismatchError(
                f"the schedule gives {rates[update]} for update {update}, and the run logged {rate}: give the schedule "
                "that it was trained with"
            )


def _shown(known: Mapping[int, float]) -> str:
    some = [f"{rate:.6g} at update {update}" for update, rate in sorted(known.items())[:3]]
    return ", ".join(some) + (f" and {len(known) - 3} more" if len(known) > 3 else "") if some else "none"
