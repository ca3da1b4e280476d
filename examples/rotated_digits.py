r"""Attribute through two stages: which upright digits help a network that was fine-tuned on rotated ones?

    python examples/rotated_digits.py                    # digits of scikit-learn, a few minutes
    python examples/rotated_digits.py --dataset mnist    # 28x28, larger sets; about three times as long

A network learns upright digits (stage one), then goes on with other digits, rotated (stage two). Queries are rotated
test digits, asked of the final network; attributed are the upright digits, whose traces stage two has partly
overwritten. SOURCE carries each query back through stage two by the propagator S. Beside it: the same without S,
influence functions and TRAK on stage one (which have no notion of a second stage; queries at the end of stage one or of
stage two, whichever is better), TracIn, and gradient products.

The judge is retraining: stage one on random halves of the upright digits, stage two on all rotated digits, many
networks at once. Writes a table (markdown, CSV) and a figure into --results; retrainings are kept in --cache.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _comparison import Candidate, evaluate_methods, write_results
from _data import add_data_option, cached_array, digest, load_images
from _training import few_threads, margin, record_training
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import source_proj as sp
from source_proj.evaluate import half_subsets, stacked_outputs, train_stacked

CHECKPOINTS = 4  # of each stage
MOMENTUM, DECAY = 0.9, 1e-3
RIDGES = [0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
DAMPINGS = ["noise", None, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


class Setting(NamedTuple):
    """Sizes of a problem, and how its two stages are trained."""

    side: int
    hidden: int
    upright: int
    rotated: int
    queries: int
    degrees: float
    batch: int
    epochs: tuple[int, int]
    rates: tuple[float, float]


SETTINGS = {
    "digits": Setting(8, 64, 900, 300, 200, 30, 32, (20, 10), (0.03, 0.01)),
    "mnist": Setting(28, 96, 3000, 600, 200, 45, 64, (15, 10), (0.03, 0.01)),
}


class Problem(NamedTuple):
    """The training sets of the stages, and the queries."""

    upright: TensorDataset
    rotated: TensorDataset
    queries: TensorDataset


def main() -> None:
    options = parse()
    setting = SETTINGS[options.dataset]
    problem = load_problem(options, setting)
    known = {"dataset": options.dataset, **setting._asdict(), "momentum": MOMENTUM, "decay": DECAY}
    home = options.cache / digest(known)
    started = time.perf_counter()

    masks = half_subsets(setting.upright, options.subsets, seed=0)
    with few_threads(setting.side**2):
        outcomes = ground_truth(options, setting, known, home / "retrainings", problem, masks)
    print(f"{options.subsets} half-subsets x {options.retrainings} retrainings: {time.perf_counter() - started:.0f} s")

    banks = [build_banks(home, options, setting, problem, run) for run in range(options.runs)]
    rows = evaluate_methods(
        candidates(banks, setting), problem.queries, masks, outcomes, columns=slice(0, setting.upright)
    )
    notes = [
        f"{setting.upright:,} upright digits (attributed), then {setting.rotated:,} others rotated by "
        f"{setting.degrees:g} degrees; {setting.queries} rotated queries, margin of the final network",
        f"{options.subsets} half-subsets of the upright digits x {options.retrainings} retrainings through both stages",
        f"mean over {options.runs} runs, k = {options.dim:,}; settings of rivals chosen on the other half of the "
        "queries",
        f"noise ceiling {rows[0].single.ceiling:.3f}" if rows[0].single.ceiling is not None else "no noise ceiling",
    ]
    name = f"rotated_{options.dataset}"
    print("\n" + write_results(rows, options.results, name, f"Stage one through stage two ({options.dataset})", notes))
    print(f"written to {options.results}/{name}.md, .csv and .png; {time.perf_counter() - started:.0f} s in all")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(SETTINGS), default="digits")
    add_data_option(parser)
    parser.add_argument("--cache", type=Path, default=Path("cache/rotated_digits"), help="kept between runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where table and figure go")
    parser.add_argument("--quick", action="store_true", help="fewer retrainings and runs, to see it work")
    parser.add_argument("--subsets", type=int, help="halves of the upright digits (default 100, quick 24)")
    parser.add_argument("--retrainings", type=int, help="networks trained on each half (default 8, quick 4)")
    parser.add_argument("--runs", type=int, help="training runs that are attributed (default 3, quick 1)")
    parser.add_argument("--dim", type=int, default=2048, help="sketch dimension k")
    options = parser.parse_args()
    for name, full, quick in [("subsets", 100, 24), ("retrainings", 8, 4), ("runs", 3, 1)]:
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def load_problem(options: argparse.Namespace, setting: Setting) -> Problem:
    """Split the digits in three, and rotate all but the first part."""
    if options.dataset == "mnist":
        images, labels = load_images(options.data, "mnist", "train")
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    sizes = (setting.upright, setting.rotated, setting.queries)
    upright, rotated, queries = torch.split(order[: sum(sizes)], list(sizes))
    turn = partial(rotate, side=setting.side, degrees=setting.degrees)
    return Problem(
        TensorDataset(images[upright], labels[upright]),
        TensorDataset(turn(images[rotated]), labels[rotated]),
        TensorDataset(turn(images[queries]), labels[queries]),
    )


def rotate(images: Tensor, side: int, degrees: float) -> Tensor:
    """Rotate flat square images ``(n, side²)`` about their centre; what comes from outside is background."""
    angle = torch.deg2rad(torch.tensor(degrees))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]]).expand(len(images), 2, 3)
    square = images.reshape(-1, 1, side, side)
    background = float(images.min())  # grid_sample fills with zero
    grid = nn.functional.affine_grid(turn, list(square.shape), align_corners=False)
    turned = nn.functional.grid_sample(square - background, grid, align_corners=False)
    return (turned + background).reshape(len(images), -1)


def make_model(setting: Setting) -> nn.Module:
    inputs, hidden = setting.side**2, setting.hidden
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )  # fmt: skip


def ground_truth(
    options: argparse.Namespace,
    setting: Setting,
    known: dict[str, object],
    folder: Path,
    problem: Problem,
    masks: np.ndarray,
) -> np.ndarray:
    """Margins after both stages, stage one being trained on the subsets: ``(subsets, retrainings, queries)``."""
    make = partial(make_model, setting)
    outputs = stacked_outputs(make, problem.queries.tensors[0])
    everything = np.arange(setting.rotated)

    def together(mask: np.ndarray, seeds: list[int]) -> np.ndarray:
        descend = partial(train_stacked, make, batch_size=setting.batch, momentum=MOMENTUM, weight_decay=DECAY)
        inputs, targets = problem.upright.tensors
        state = descend(
            inputs, targets, [np.flatnonzero(mask)] * len(seeds), seeds,
            epochs=setting.epochs[0], lr=setting.rates[0],
        )  # fmt: skip
        inputs, targets = problem.rotated.tensors
        state = descend(
            inputs, targets, [everything] * len(seeds), [10**6 + seed for seed in seeds],
            epochs=setting.epochs[1], lr=setting.rates[1], initial=state,
        )  # fmt: skip
        return margin(outputs(state), problem.queries.tensors[1]).numpy()

    margins = []
    for subset, mask in enumerate(tqdm(masks, "retrain", unit="subset")):
        seeds = [1000 + subset * options.retrainings + i for i in range(options.retrainings)]
        piece = {**known, "subset": subset, "count": options.subsets, "seeds": seeds}
        margins.append(cached_array(folder, piece, partial(together, mask, seeds)))
    return np.stack(margins)


class Banks(NamedTuple):
    """One run's banks: both stages; stage one with queries at the final network; stage one by itself."""

    both: sp.Bank
    queried_at_end: sp.Bank
    alone: sp.Bank


def build_banks(home: Path, options: argparse.Namespace, setting: Setting, problem: Problem, run: int) -> Banks:
    torch.manual_seed(run)
    model = make_model(setting)
    stages = []
    for index, (name, data) in enumerate([("upright", problem.upright), ("rotated", problem.rotated)]):
        optimizer = torch.optim.SGD(model.parameters(), lr=setting.rates[index], momentum=MOMENTUM, weight_decay=DECAY)
        steps = setting.epochs[index] * -(-len(data) // setting.batch)
        at = [round(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)]
        recorder = sp.Recorder(model, optimizer, home / f"run-{run}" / name, at=at, stage=name)
        record_training(
            model, optimizer, data, recorder,
            epochs=setting.epochs[index], batch_size=setting.batch, seed=run + index * 10**6,
        )  # fmt: skip
        stages.append(recorder.stage())
        inputs, labels = problem.queries.tensors
        print(f"run {run}, after {name}: {(model(inputs).argmax(1) == labels).float().mean():.1%} of the queries right")
    first, end = stages[0], stages[1].checkpoints[-1]
    # A stage may name other final weights than its own last: so stage one alone can be asked about the final network,
    # which is the two-stage attribution with S replaced by the identity.
    without_s = dataclasses.replace(first, final=sp.Checkpoint(end.path or end.load(), step=first.checkpoints[-1].step))

    def build(kind: str, trajectory: sp.Trajectory, train_set: object) -> sp.Bank:
        path = home / f"bank-{run}-{kind}-{options.dim}"
        sketch = sp.Sketch(dim=options.dim, seed=run)
        return sp.build(model, sp.Classification(), trajectory, train_set, path, sketch=sketch, progress=False)

    return Banks(
        build("both", sp.Trajectory.from_stages(stages), {"upright": problem.upright, "rotated": problem.rotated}),
        build("end", sp.Trajectory.from_stages([without_s]), {"upright": problem.upright}),
        build("alone", sp.Trajectory.from_stages([first]), {"upright": problem.upright}),
    )


def candidates(banks: list[Banks], setting: Setting) -> list[Candidate]:
    model = make_model(setting)
    both, at_end, alone = ([getattr(own, kind) for own in banks] for kind in Banks._fields)

    def made(method: Callable[..., object], **choices: object) -> Callable[[list[sp.Bank]], object]:
        return lambda chosen: method(chosen, model=model, progress=False, **choices)

    found = [
        Candidate("SOURCE, a segment a stage", "no choice", made(sp.Source), both),
        Candidate("SOURCE, two segments a stage", "no choice", made(sp.Source, segments=2), both),
        Candidate("SOURCE without S (stage two ignored)", "no choice", made(sp.Source), at_end),
    ]
    places = [("queries at the end", at_end), ("queries after stage one", alone)]
    for place, own in places:
        for average, name in [(True, "averaged"), (False, "end of stage one")]:
            found += [
                Candidate(
                    f"Influence functions, {name}",
                    f"damping {'tr(H)/k' if damping == 'noise' else damping}, {place}",
                    made(sp.InfluenceFunction, average=average, damping=damping),
                    own,
                )
                for damping in DAMPINGS
            ]
        found += [Candidate("TRAK", f"ridge {ridge:g}, {place}", made(sp.Trak, ridge=ridge), own) for ridge in RIDGES]
        found.append(Candidate("GradDot", place, made(sp.GradDot), own))
        found.append(Candidate("GradCos", place, made(sp.GradCos), own))
    found.append(Candidate("TracIn", "both stages' checkpoints", made(sp.TracIn), both))
    found.append(Candidate("TracIn", "stage one by itself", made(sp.TracIn), alone))
    return found


if __name__ == "__main__":
    main()
