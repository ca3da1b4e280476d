"""The demo from start to end: train, record, build, score, show, check."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from source_proj._io.outputs import require_free
from source_proj._io.progress import Progress
from source_proj.attribution.parts import PartScores
from source_proj.attribution.scores import Scores
from source_proj.attribution.source import Source
from source_proj.attribution.words import explained
from source_proj.bank import build
from source_proj.demo.check import Removal, retrain_without
from source_proj.demo.digits import (
    CHECKPOINTS,
    Digits,
    checkpoint_steps,
    load_digits,
    make_network,
    make_optimizer,
    train,
)
from source_proj.demo.show import Answer, answer_text, check_text, demo_page
from source_proj.report import write_report
from source_proj.sketch import Sketch
from source_proj.task import Classification
from source_proj.trajectory import Recorder, Trajectory

__all__ = ["Demo", "run"]

SEGMENTS = 2
DIM = 1024


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        scores: scores of the chosen test digits, one row each.
        parts: the same by segment of training.
        answers: the chosen test digits and what the network said of them.
        removals: the first answer's checks by retraining.
        accuracy: share of all test digits that the network gets right.
        page: where the HTML page was written.
        seconds: how long each part took.
    """

    scores: Scores
    parts: PartScores
    answers: tuple[Answer, ...]
    removals: tuple[Removal, ...]
    accuracy: float
    page: Path
    seconds: dict[str, float]


def run(
    folder: str | Path | None = None,
    *,
    page: str | Path | None = None,
    pairs: int = 16,
    remove: int = 20,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress = True,
) -> Demo:
    """Train a network on digits, attribute four of its answers, and hold the scores against retraining.

    Args:
        folder: where run, bank and page are kept (an interrupted demo goes on there); default: a temporary folder,
            removed at the end.
        page: where the HTML page is written; default: ``report.html`` in the folder, or ``source-proj-demo.html``
            in the current directory if none is given.
        pairs: matched pairs of retrainings behind each check, at least 2.
        remove: training digits left out in each check, 1 to 500.
        overwrite: replace a page that is there; one by the demo's own name always is.
        say: prints a line.
        progress: show progress bars for what takes over two seconds.

    Raises:
        ImportError: without the ``demo`` extra.
        ValueError: if ``pairs`` or ``remove`` is out of range.
        FileExistsError: the page is there already.
    """
    if pairs < 2:
        raise ValueError(f"pairs must be at least 2, so that the noise of retraining can be told, got {pairs}")
    if not 1 <= remove <= 500:
        raise ValueError(f"remove must lie in 1..500, got {remove}")
    target = Path(page) if page is not None else Path(folder or ".") / ("report.html" if folder else _PAGE)
    require_free(target, overwrite=overwrite or page is None)
    with _home(folder) as home:
        return _Run(home, say, progress).all(target, pairs, remove)


_PAGE = "source-proj-demo.html"


class _Run:
    """One demo: its folder, its data, its model, and the time it takes."""

    def __init__(self, home: Path, say: Callable[[str], None], progress: Progress) -> None:
        self.home, self.say, self.progress = home, say, progress
        self.digits = load_digits()
        self.model = make_network()
        self.seconds: dict[str, float] = {}

    def all(self, target: Path, pairs: int, remove: int) -> Demo:
        with self.timed("train"):
            trajectory = self.train()
        guesses = predictions(self.model, self.digits)
        accuracy = float((guesses == self.digits.test_set.tensors[1]).float().mean())
        self.say(f"                  {accuracy:.1%} of {len(guesses)} test digits right")
        with self.timed("build"):
            source, size = self.build(trajectory)
        answers = choose(self.model, self.digits)
        with self.timed("score"):
            scores, parts = self.score(source, answers)
        self.say("\n" + explained(scores.unit))
        for row, answer in enumerate(answers):
            self.say("\n" + answer_text(answer, scores, row, self.digits))
        with self.timed("check"):
            removals = self.check(scores, answers[0], pairs, remove)
        self.say("\n" + check_text(answers[0], removals, scores.unit))
        written = write_report(
            demo_page(answers, scores, parts, removals, self.digits, accuracy=accuracy, bank_bytes=size),
            target,
            overwrite=True,
        )
        self.say(f"\npage: {written}")
        return Demo(scores, parts, answers, removals, accuracy, written, self.seconds)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start
        self.say(f"{_PARTS[part]:<58} {self.seconds[part]:5.1f} s")

    def train(self) -> Trajectory:
        optimizer = make_optimizer(self.model)
        at = checkpoint_steps(len(self.digits.train_set))
        recorder = Recorder(self.model, optimizer, self.home / "run", at=at)
        train(self.model, optimizer, self.digits.train_set, recorder=recorder)
        return recorder.trajectory(segments=SEGMENTS)

    def build(self, trajectory: Trajectory) -> tuple[Source, int]:
        bank = build(
            self.model,
            Classification(),
            trajectory,
            self.digits.train_set,
            self.home / "bank",
            sketch=Sketch(dim=DIM),
            progress=self.progress,
        )
        return Source(bank, model=self.model, progress=self.progress), sum(bank.nbytes().values())

    def score(self, source: Source, answers: tuple[Answer, ...]) -> tuple[Scores, PartScores]:
        queries = [answer.query for answer in answers]
        features = source.sketch(Subset(self.digits.test_set, queries), ids=queries)
        return source.score(features), source.by_segment(features)

    def check(self, scores: Scores, answer: Answer, pairs: int, remove: int) -> tuple[Removal, ...]:
        """Leave out the most helpful, the most harmful, and randomly drawn examples of the first answer."""
        drawn = np.random.default_rng(0).permutation(len(scores.train_ids))[:remove]
        groups = {
            f"without the {remove} most helpful": scores.helpful(remove).indices[0].tolist(),
            f"without the {remove} most harmful": scores.harmful(remove).indices[0].tolist(),
            f"without {remove} drawn at random": drawn.tolist(),
        }
        changes = retrain_without(self.digits, answer.query, groups, pairs=pairs, progress=self.progress)
        predicted = {name: float(scores.predict_removal(group).values[0]) for name, group in groups.items()}
        *named, control = groups
        beside = {control: tuple(changes[name] for name in named)}
        return tuple(Removal(name, remove, predicted[name], changes[name], beside.get(name, ())) for name in groups)


_PARTS = {
    "train": "train a network 64-128-128-10 on digits, recording it",
    "build": f"build the bank: {CHECKPOINTS} checkpoints, {DIM} numbers an example",
    "score": f"fit SOURCE with {SEGMENTS} segments, score the queries",
    "check": "train again without the examples, and with all",
}


def predictions(model: nn.Module, digits: Digits) -> torch.Tensor:
    """Return the network's answer for every test digit, ``(359,)``."""
    with torch.no_grad():
        answers: torch.Tensor = model(digits.test_set.tensors[0]).argmax(1)
    return answers


def choose(model: nn.Module, digits: Digits) -> tuple[Answer, ...]:
    """Choose what to explain: the least certain mistake, the least certain right answer, and two at random."""
    inputs, labels = digits.test_set.tensors
    with torch.no_grad():
        margins = Classification().measurement(model, (inputs, labels)).numpy()
    guesses = predictions(model, digits).numpy()
    wrong = guesses != labels.numpy()
    by_certainty = np.argsort(np.abs(margins), kind="stable")
    notes = {int(row): "the least certain mistake" for row in by_certainty[wrong[by_certainty]][:1]}
    notes |= {int(row): "the least certain right answer" for row in by_certainty[~wrong[by_certainty]][:1]}
    others = [int(row) for row in np.random.default_rng(0).permutation(len(margins)) if int(row) not in notes]
    notes |= dict.fromkeys(others[: 4 - len(notes)], "drawn at random")
    return tuple(
        Answer(query, int(labels[query]), int(guesses[query]), float(margins[query]), note)
        for query, note in notes.items()
    )


@contextmanager
def _home(folder: str | Path | None) -> Iterator[Path]:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
    else:
        with tempfile.TemporaryDirectory(prefix="source-proj-demo-") as temporary:
            yield Path(temporary)
