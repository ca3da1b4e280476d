"""What is fuzzed: banks and their fits, recorded runs, checkpoints and ground truths, each with what it is asked."""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # optimizers import it at their first step: once here, and not in every fork
import torch.utils.serialization.config  # as torch.load does
from mutations import EVERYWHERE, OF_BANKS, OF_TENSORS, Mutation, forged_run, safetensors_header
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bank"))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluate"))
from bank_runs import BATCH, SHARD, make_adam_run, make_data, make_model, make_run
from retrainings import open_truth, train

import source_proj as sp
from source_proj import bank as banks
from source_proj._io.json_records import write_record
from source_proj.evaluate import GroundTruth
from source_proj.trajectory import moments

__all__ = ["KINDS", "Subject"]

Question = Callable[[Path], Any]


@dataclass(frozen=True)
class Subject:
    """A folder that is made once and mutated often.

    Args:
        build: makes it.
        questions: what it is asked; the answers must be those of the unmutated folder.
        mutations: what becomes of it.
        lenient: questions whose answer may be another one, as no digest covers what was altered.
        below: what the mutated files' names begin with.
        problems: what a verifying reader finds; it must find something where a question is refused.
    """

    build: Callable[[Path], object]
    questions: Sequence[Question]
    mutations: Sequence[Mutation]
    lenient: Sequence[Question] = ()
    below: str = ""
    problems: Callable[[Path], Sequence[str]] | None = None


def digest(state: Any) -> Any:
    """Tensors by their hashes, in what JSON can hold."""
    if isinstance(state, torch.Tensor):
        return hashlib.sha256(
            repr((state.dtype, state.shape)).encode() + state.contiguous().numpy().tobytes()
        ).hexdigest()
    if isinstance(state, dict):
        return {str(key): digest(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [digest(value) for value in state]
    return state


# Banks -----------------------------------------------------------------------------------------------------------


def appended_bank(path: Path) -> None:
    """Appended rows, copies of weights, and fits."""
    run = make_run()
    bank = run.build(path)
    bank.append(run.model, run.task, make_data(30, seed=1), batch_size=BATCH, shard_rows=SHARD, progress=False)
    scores(path)


def crossed_bank(path: Path) -> None:
    """Metrics that are crossed, and fits."""
    make_adam_run().build(path)
    scores(path)


def scores(path: Path, *, cache: bool = True) -> Any:
    """What a bank says of three queries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that is made again says so
        source = sp.Source(banks.open(path), model=make_model(), cache=cache, progress=False)
        return np.asarray(source.score(make_data(3, seed=7))).tolist()


def uncached_scores(path: Path) -> Any:
    """The same, from the bank alone."""
    return scores(path, cache=False)


def bank_problems(path: Path) -> Sequence[str]:
    """What `verify` finds."""
    return banks.verify(path).problems


def of_banks(below: str, *questions: Question) -> list[Subject]:
    """Both banks."""
    return [
        Subject(build, questions, OF_BANKS, below=below, problems=bank_problems)
        for build in (appended_bank, crossed_bank)
    ]


# Recorded runs ---------------------------------------------------------------------------------------------------


class Training:
    """A model, its optimizer and schedule, and a recorder of them."""

    def __init__(self, directory: Path, kind: type[torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(6, 3)
        self.optimizer = kind(self.model.parameters(), lr=0.1, weight_decay=0.1)  # type: ignore[call-arg]
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.recorder = sp.Recorder(self.model, self.optimizer, directory, every=3, also=[self.schedule])

    def go_on(self) -> None:
        """Nine steps."""
        for step in range(self.recorder.restore(), 9):
            self.optimizer.zero_grad()
            inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            self.model(inputs).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
            self.recorder.step()

    def state(self) -> Any:
        """All that training goes on from."""
        return digest([self.model.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()])


def of_runs(kind: type[torch.optim.Optimizer]) -> Subject:
    """A run of an optimizer."""

    def trajectory(path: Path) -> Any:
        (stage,) = sp.Trajectory.from_recorder(path).stages
        model = nn.Linear(6, 3)
        own = [
            [list(moment) for _, moment in moments(checkpoint, stage.optimizer, model)]
            for checkpoint in stage.checkpoints
            if stage.optimizer.preconditioned
        ]
        states = [checkpoint.parameters_of(model) for checkpoint in stage.checkpoints]
        return [json.dumps(write_record(stage.describe())), digest(states), digest(own)]

    def restored(path: Path) -> Any:
        if not (path / "trajectory.json").is_file():  # nothing to go on from: a run begins
            raise sp.SourceProjError(f"{path} holds no run")
        training = Training(path, kind)
        training.recorder.restore()
        return training.state()

    return Subject(
        lambda path: Training(path, kind).go_on(), (trajectory, restored), [*OF_TENSORS, forged_run, forged_run]
    )


# Checkpoints -----------------------------------------------------------------------------------------------------

WEIGHTS = ("first.pt", "second.safetensors", "third/model.safetensors.index.json")


def checkpoint_files(path: Path) -> None:
    """Weights in three formats, an optimizer's state, and a bank that refers to them."""
    path.mkdir()
    run = make_adam_run("shared")
    first, second, third, last = run.trajectory.stages[0].checkpoints
    torch.save(first.load(), path / WEIGHTS[0])
    save_file(second.load(), path / WEIGHTS[1])
    (path / "third").mkdir()
    state, places = third.load(), {}
    for number, part in enumerate((list(state)[:2], list(state)[2:])):
        save_file({name: state[name] for name in part}, path / "third" / f"part{number}.safetensors")
        places |= dict.fromkeys(part, f"part{number}.safetensors")
    (path / WEIGHTS[2]).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    torch.save(last.load(), path / "last.pt")
    torch.save(first.optimizer_state, path / "optimizer.pt")
    checkpoints = opened(path)
    for number, final in enumerate(checkpoints):  # queries need the last weights alone
        trajectory = sp.Trajectory([sp.Checkpoint(last.load(), 1, lr=0.1), final], optimizer=sp.SGD())
        banks.build(
            run.model, run.task, trajectory, make_data(), path / f"bank{number}", sketch=sp.Sketch(dim=16),
            batch_size=BATCH, progress=False,
        )  # fmt: skip


def opened(path: Path) -> list[sp.Checkpoint]:
    """The checkpoints, with an optimizer's state each."""
    return [sp.Checkpoint(path / name, 10, 0.1, path / "optimizer.pt") for name in WEIGHTS]


def loaded(number: int) -> Question:
    """Weights, loaded into their model, and second moments."""

    def ask(path: Path) -> Any:
        model, checkpoint = make_model(), sp.Checkpoint(path / WEIGHTS[number], 10, 0.1, path / "optimizer.pt")
        checkpoint.load_into(model)
        own = dict(moments(checkpoint, sp.Adam(), model))
        return [checkpoint.hash(), digest(model.state_dict()), digest({name: list(own[name]) for name in own})]

    return ask


def asked(number: int) -> Question:
    """Scores of a bank whose last weights they are."""

    def ask(path: Path) -> Any:
        return uncached_scores(path / f"bank{number}")

    return ask


# Ground truths ---------------------------------------------------------------------------------------------------


def whole_truth(path: Path) -> None:
    """Every retraining done."""
    open_truth(path).fill(train, progress=False)


def half_truth(path: Path) -> None:
    """Some retrainings done."""
    open_truth(path, retrainings=2).fill(train, shard=(0, 2), progress=False)


def outcomes(path: Path) -> Any:
    """All that is in it."""
    truth = GroundTruth(path)
    return [truth.outcomes.tolist(), truth.masks.tolist(), truth.seed, truth.settings]


def filled(path: Path) -> Any:
    """All that is in it, once what is missing was done."""
    open_truth(path, retrainings=2).fill(train, progress=False)
    return outcomes(path)


def truth_problems(path: Path) -> Sequence[str]:
    """What `verify` finds, or why there is nothing to verify."""
    try:
        truth = GroundTruth(path)
        return [*truth.verify(), *map(str, truth.missing())]
    except sp.SourceProjError as error:
        return [str(error)]


KINDS: dict[str, list[Subject]] = {
    "bank": of_banks("", scores, uncached_scores),
    "fits": of_banks("fits/", scores),
    "run": [of_runs(torch.optim.SGD), of_runs(torch.optim.AdamW)],
    "checkpoint": [
        Subject(
            checkpoint_files,
            [asked(number) for number in range(len(WEIGHTS))],
            [*OF_TENSORS, safetensors_header, safetensors_header],
            lenient=[loaded(number) for number in range(len(WEIGHTS))],
        )
    ],
    "truth": [
        Subject(whole_truth, [outcomes], OF_BANKS, problems=truth_problems),
        Subject(half_truth, [filled], EVERYWHERE),
    ],
}
