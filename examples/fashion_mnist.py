r"""How well do attribution scores predict retraining? SOURCE and its rivals on Fashion-MNIST.

    python examples/fashion_mnist.py              # two cores: ten minutes of retraining, then about twenty of fits
    python examples/fashion_mnist.py --quick      # a miniature, a minute or two

An MLP (784-256-128-10) is trained on 6,000 images. The linear datamodeling score (LDS) asks, for 200 test images: if
the network is retrained on random halves of the images, do the attribution scores, summed over each half, rank the
margins that the retrained networks really have? Every method works on the same banks (two training runs, two sketch
seeds each), with its best setting, chosen on other queries than those it is judged by.

Writes a table (markdown, CSV) and a figure into --results. Runs, banks and retrainings are kept in --cache (about
6 GB); a killed run goes on where it was.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _comparison import Candidate, evaluate_methods, write_results
from _data import add_data_option, cached_array, digest, load_images
from _training import margin, record_training
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import source_proj as sp
from source_proj.curvature import Damping
from source_proj.evaluate import calibration, half_subsets, retrain, stacked_outputs

BATCH, LR, MOMENTUM, DECAY, CHECKPOINTS = 64, 0.03, 0.9, 1e-3, 6
CHUNK = 48  # retrained models a cache file
RIDGES = [0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0]  # for TRAK, added to the eigenvalues of ΦᵀΦ/N
DAMPINGS: list[Damping] = [
    None,
    1e-4,
    3e-4,
    1e-3,
    3e-3,
    1e-2,
    3e-2,
    1e-1,
    3e-1,
]  # for influence functions, beside the formula


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )  # fmt: skip


def main() -> None:
    options = parse()
    started = time.perf_counter()
    train_set, queries = load_problem(options)
    setting = {
        "examples": options.examples, "queries": options.queries, "epochs": options.epochs, "batch": BATCH, "lr": LR,
        "momentum": MOMENTUM, "decay": DECAY, "checkpoints": CHECKPOINTS,
    }  # fmt: skip
    home = options.cache / digest(setting)

    masks = half_subsets(options.examples, options.subsets, seed=0)
    outcomes = ground_truth(options, setting, home / "retrainings", train_set, queries, masks)
    lap = report(started, f"{options.subsets} half-subsets x {options.retrainings} retrainings")

    banks = build_banks(options, home, train_set)
    lap = report(lap, f"{options.runs} training runs, {sum(map(len, banks.values()))} banks")

    rows = evaluate_methods(candidates(banks, options.dim), queries, masks, outcomes)
    report(lap, "fits and scores")

    slope = calibration(sp.Source(banks[options.dim][0], model=make_model()).score(queries), masks, outcomes)
    notes = [
        f"{options.examples:,} examples, {options.epochs} epochs, {options.queries} queries, margin; "
        f"{options.subsets} half-subsets x {options.retrainings} retrainings",
        f"mean over {options.runs} training runs x {options.sketches} sketch seeds; k = {options.dim:,} unless said; "
        "settings of rivals chosen on the other half of the queries",
        f"noise ceiling {rows[0].single.ceiling:.3f}" if rows[0].single.ceiling is not None else "no noise ceiling",
        f"SOURCE (one segment): slope of retrained on predicted margins {slope.slope:.2f} "
        f"({slope.interval[0]:.2f} to {slope.interval[1]:.2f}); halving the set doubles every example's weight, "
        "so an exact first-order method shows 2",
    ]
    print("\n" + write_results(rows, options.results, "fashion_mnist", "LDS on Fashion-MNIST", notes))
    print(f"written to {options.results}/fashion_mnist.md, .csv and .png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--cache", type=Path, default=Path("cache/fashion_mnist"), help="kept between runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where table and figure go")
    parser.add_argument("--quick", action="store_true", help="a miniature, to see it work")
    sizes = {  # name: (full, quick, help)
        "examples": (6000, 1000, "training images"),
        "epochs": (20, 6, "epochs"),
        "queries": (200, 60, "test images"),
        "subsets": (100, 24, "random halves of the training images"),
        "retrainings": (6, 2, "networks trained on each half"),
        "runs": (2, 1, "training runs that are attributed"),
        "sketches": (2, 1, "sketch seeds a run"),
        "dim": (4096, 512, "sketch dimension k"),
    }
    for name, (full, quick, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default {full:,}, quick {quick:,})")
    options = parser.parse_args()
    for name, (full, quick, _) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def report(since: float, what: str) -> float:
    now = time.perf_counter()
    print(f"{what}: {now - since:.0f} s")
    return now


def load_problem(options: argparse.Namespace) -> tuple[TensorDataset, TensorDataset]:
    """Draw the training images and the queries."""
    inputs, targets = load_images(options.data, "fashion_mnist", "train")
    test_inputs, test_targets = load_images(options.data, "fashion_mnist", "t10k")
    chosen = np.random.default_rng(0).permutation(len(inputs))[: options.examples]
    asked = np.random.default_rng(1).permutation(len(test_inputs))[: options.queries]
    return TensorDataset(inputs[chosen], targets[chosen]), TensorDataset(test_inputs[asked], test_targets[asked])


def ground_truth(
    options: argparse.Namespace,
    setting: dict[str, object],
    folder: Path,
    train_set: TensorDataset,
    queries: TensorDataset,
    masks: np.ndarray,
) -> np.ndarray:
    """Margins of networks retrained on the subsets, ``(subsets, retrainings, queries)``, kept in pieces."""
    subsets = [np.flatnonzero(mask) for mask in masks for _ in range(options.retrainings)]
    seeds = [1000 + i for i in range(len(subsets))]
    inputs, targets = train_set.tensors
    evaluate = stacked_outputs(make_model, queries.tensors[0])

    def piece(start: int) -> np.ndarray:
        chosen = slice(start, start + CHUNK)
        logits = retrain(
            make_model, inputs, targets, subsets[chosen], seeds[chosen], epochs=options.epochs, batch_size=BATCH,
            lr=LR, momentum=MOMENTUM, weight_decay=DECAY, evaluate=evaluate, progress=False,
        )  # fmt: skip
        return logits.numpy()

    pieces = []
    for start in tqdm(range(0, len(subsets), CHUNK), f"retrain {CHUNK} at a time"):
        known = {**setting, "subsets": options.subsets, "retrainings": options.retrainings, "start": start}
        pieces.append(cached_array(folder, known, partial(piece, start)))
    margins = margin(torch.from_numpy(np.concatenate(pieces)), queries.tensors[1])
    return margins.reshape(options.subsets, options.retrainings, -1).numpy()


def train(options: argparse.Namespace, seed: int, train_set: TensorDataset, folder: Path) -> sp.Trajectory:
    """Train one network and record it."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    steps = options.epochs * -(-len(train_set) // BATCH)
    at = [round(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)]
    recorder = sp.Recorder(model, optimizer, folder, at=at)
    record_training(model, optimizer, train_set, recorder, epochs=options.epochs, batch_size=BATCH, seed=seed)
    inputs, targets = train_set.tensors
    right = (model(inputs).argmax(1) == targets).float().mean()
    print(f"run {seed}: {steps:,} steps, {right:.1%} of the training images right")
    return recorder.trajectory()


def build_banks(options: argparse.Namespace, home: Path, train_set: TensorDataset) -> dict[int, list[sp.Bank]]:
    """Banks of every (run, sketch seed), by sketch dimension: the main one, and smaller ones that TRAK may prefer."""
    dims = sorted({options.dim, max(1, options.dim // 2), max(1, options.dim // 8)})
    banks: dict[int, list[sp.Bank]] = {dim: [] for dim in dims}
    for run in range(options.runs):
        trajectory = train(options, run, train_set, home / f"run-{run}")
        for dim in dims:
            for seed in range(options.sketches):
                # Members of an ensemble get sketches of their own, so that their noise averages out.
                sketch = sp.Sketch(dim=dim, seed=run * options.sketches + seed)
                path = home / f"bank-{run}-{dim}-{sketch.seed}"
                banks[dim].append(
                    sp.build(make_model(), sp.Classification(), trajectory, train_set, path, sketch=sketch)
                )
    return banks


def candidates(banks: dict[int, list[sp.Bank]], dim: int) -> list[Candidate]:
    main, model = banks[dim], make_model()

    def source(segments: int) -> Callable[[list[sp.Bank]], sp.Source]:
        return lambda chosen: sp.Source(chosen, model=model, segments=segments)

    def influence(average: bool, damping: Damping) -> Callable[[list[sp.Bank]], sp.InfluenceFunction]:
        return lambda chosen: sp.InfluenceFunction(chosen, model=model, average=average, damping=damping)

    def trak(ridge: float) -> Callable[[list[sp.Bank]], sp.Trak]:
        return lambda chosen: sp.Trak(chosen, model=model, ridge=ridge)

    found = [
        Candidate("SOURCE, one segment", "no choice", source(1), main),
        Candidate("SOURCE, three segments", "no choice", source(3), main),
    ]
    for average, name in [(True, "averaged gradients and Hessian"), (False, "final checkpoint")]:
        method = f"Influence functions, {name}"
        found.append(Candidate(method, "damping tr(H)/k", influence(average, "noise"), main))
        found += [Candidate(method, f"damping {d}", influence(average, d), main) for d in DAMPINGS]
    for k, own in banks.items():
        found += [Candidate("TRAK", f"k={k}, ridge {ridge:g}", trak(ridge), own) for ridge in RIDGES]
    plain = [("TracIn", sp.TracIn), ("GradDot", sp.GradDot), ("GradCos", sp.GradCos)]
    return found + [Candidate(name, "no choice", partial(make, model=model), main) for name, make in plain]


if __name__ == "__main__":
    main()
