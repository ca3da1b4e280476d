"""The board: which method knows what this very run would be without 1 % of its chunks?

    python examples/paper/board.py              # the small decoder of wikitext2.py
    python examples/paper/board.py --no-exact   # without exact derivatives, which take longer than all else
    python examples/paper/board.py --full       # GPT-2, as wikitext2.py --full has it

Half-subsets ask what training on other data gives, from any start. Whoever curates asks about one run. Here that run is
repeated, from the same start and in the same batches, but for 1 % of the chunks, drawn at random many times; nothing
else differs, and so the linear datamodeling score (LDS) has no noise of retraining in it. It is the mean over queries
and runs, each run judged by its own repetitions, with 95 % intervals by bootstrap over the draws. This is the protocol
by which bergson (https://github.com/EleutherAI/bergson) compares tools.

Beside the bank's methods stand the exact derivative of the run, step by step (``sp.evaluate.ExactUnrolling``, what
MAGIC computes: https://arxiv.org/abs/2504.16430), and BM25, which knows of words alone. Needs the extra ``paper-text``.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _above  # noqa: F401
import numpy as np
import wikitext2
from _pipeline import RUN_SEED, home
from _problem import Problem, parser, sized
from _text import Rows, Training

import source_proj as sp
from source_proj.evaluate import Candidate, Comparison, GroundTruth, compare_methods
from source_proj.trajectory import PreconditionerMode, Stage

__all__ = ["board", "repetitions", "word_matches"]

_RIDGES = (0.01, 1.0, 100.0)
_DAMPINGS: tuple[float | str, ...] = ("noise", 1e-3, 1e-2, 1e-1, 1.0)


def repetitions(
    problem: Problem, training: Training, options: argparse.Namespace, runs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Which chunks each draw keeps, ``(M, N)``, and what runs so repeated measure, ``(M, 1, R Q)`` run by run."""
    outcomes = []
    for seed in runs:
        truth = GroundTruth.subsets(
            home(problem, options) / f"without-{seed}", problem.n, len(problem.queries), count=options.draws,
            fraction=1 - options.share, settings={**problem.settings, "repeated": seed},
        )  # fmt: skip
        truth.fill(partial(_repeat, training, seed), group=problem.group)
        outcomes.append(truth.outcomes)
    return truth.masks, np.concatenate(outcomes, axis=2)


def _repeat(training: Training, seed: int, kept: list[np.ndarray], _seeds: list[int]) -> np.ndarray:
    return training.repeat(kept, seed)


def board(
    setting: wikitext2.Setting, problem: Problem, options: argparse.Namespace, runs: Sequence[int]
) -> Iterator[Candidate]:
    """Methods, and the scores ``(R Q, N)`` that each has for the queries of all runs."""
    training, folder = setting.training, home(problem, options)
    trajectories = [training.record(seed, folder / f"run-{seed - RUN_SEED}") for seed in runs]

    def bank(run: int, name: str, trajectory: sp.Trajectory) -> sp.Bank:
        sketch, path = sp.Sketch(options.dim, seed=run), folder / f"board-{options.dim}-{run}-{name}"
        return sp.build(
            problem.make_model(), problem.task, trajectory, training.rows, path, sketch=sketch, device=options.device
        )

    def asked(name: str, attributor: Callable[..., Any], **choices: Any) -> list[np.ndarray]:
        scores = []
        for run, trajectory in enumerate(trajectories):
            told = sp.Trajectory.from_stages([_told(stage, name) for stage in trajectory.stages])
            built = attributor(bank(run, name, told), model=problem.make_model(), progress=False, **choices)
            scores.append(np.asarray(built.score(problem.queries)))
        return [np.concatenate(scores)]

    yield Candidate("SOURCE", "defaults", partial(asked, "scalar", sp.Source))
    yield Candidate("SOURCE, Adam's metric", 'preconditioner="shared"', partial(asked, "shared", sp.Source))
    for damping in _DAMPINGS:
        size = "tr(H)/k" if isinstance(damping, str) else f"{damping:g}"
        function = partial(asked, "sgd", sp.InfluenceFunction, average=True, damping=damping)
        yield Candidate("Influence functions, averaged", f"damping {size}", function)
    for ridge in _RIDGES:
        yield Candidate("TRAK", f"ridge {ridge:g}", partial(asked, "sgd", sp.Trak, ridge=ridge))
    yield Candidate("TracIn", "all checkpoints", partial(asked, "sgd", sp.TracIn))
    yield Candidate("GradCos", "last checkpoint", partial(asked, "sgd", sp.GradCos), calibrated=False)
    train, queries = (
        [setting.show(which, i)[0] for i in range(count)]
        for which, count in (("train", problem.n), ("queries", len(problem.queries)))
    )
    yield Candidate("BM25", "words", lambda: [np.tile(word_matches(train, queries), (len(runs), 1))], calibrated=False)
    if options.exact and not options.full:
        yield Candidate("Exact unrolling", "every step", partial(_unrolled, training, problem, runs))


def _unrolled(training: Training, problem: Problem, runs: Sequence[int]) -> list[np.ndarray]:
    return [np.concatenate([np.asarray(training.unrolled(seed).score(problem.queries)) for seed in runs])]


def _told(stage: Stage, name: str) -> Stage:
    """A stage as methods know it: with Adam's preconditioner as a number or in full, or as a run of SGD."""
    if name == "sgd":
        return replace(stage, optimizer=sp.SGD())
    mode: PreconditionerMode = "shared" if name == "shared" else "scalar"
    return replace(stage, preconditioner=mode)


def word_matches(train: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """BM25 of each query's words in each training text, ``(Q, N)``."""
    from rank_bm25 import BM25Okapi

    index = BM25Okapi([text.split() for text in train])
    return np.stack([index.get_scores(text.split()) for text in queries])


def main() -> None:
    """Repeat, score, compare, write."""
    found = wikitext2.with_weights(parser(__doc__ or ""))
    found.add_argument("--runs", type=int, help="training runs, each with its own repetitions (default 3)")
    found.add_argument("--draws", type=int, help="repetitions of each (default 60)")
    found.add_argument("--share", type=float, default=0.01, help="of the chunks that a repetition lacks")
    found.add_argument("--asked", type=int, help="queries (default 30)")
    found.add_argument("--dim", type=int, default=4096, help="sketch dimension k")
    found.add_argument(
        "--exact", action=argparse.BooleanOptionalAction, default=True, help="the exact derivatives, too: hours"
    )
    compare(found.parse_args())


def compare(options: argparse.Namespace) -> Comparison:
    """The board's table."""
    runs, draws, asked = sized(options, (5, 100, 481), (3, 60, 30), (2, 5, 4))
    options.draws = options.draws or draws
    options.dim = 64 if options.quick else options.dim
    options.share = 0.1 if options.quick else options.share
    setting = wikitext2.gpt2(options) if options.full else wikitext2.decoder(options)
    rows, count = setting.training.queries, options.asked or asked
    queries = Rows({name: tensor[:count] for name, tensor in rows.tensors.items()})
    setting = setting._replace(training=replace(setting.training, queries=queries))
    settings = {**setting.settings, "task": "board", "asked": len(queries), "share": options.share}
    problem = replace(wikitext2.problem(options), name="board", queries=queries, settings=settings)
    seeds = [RUN_SEED + run for run in range(options.runs or runs)]
    masks, outcomes = repetitions(problem, setting.training, options, seeds)
    compared = compare_methods(list(board(setting, problem, options, seeds)), masks, outcomes)
    columns = ["method", "setting", "lds", "low", "high", "diff", "diff_low", "diff_high", "slope"]
    table = compared.table()
    table = table[table["runs"] == "single"][columns]
    print(table.round(3).to_string(index=False))
    if not options.quick:
        path = Path(options.results) / "board" / "board.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False, float_format="%.4f")
    return compared


if __name__ == "__main__":
    main()
