r"""Ways to clean and to choose training sets, judged by retraining.

    python examples/curation.py                                        # breast cancer, a fifth of the labels flipped
    python examples/curation.py --dataset digits --flipped 0
    python examples/curation.py --dataset pima --data DIR              # also fashion_mnist

A network is trained and banked, and every way proposes examples to leave out, or a fifth of the examples to keep.
Networks are trained on what each proposes, and measured on test examples that no way has seen. Each seed draws its own
split, flips its own labels, and trains two networks on each proposal; differences are taken seed by seed, and their
95 % intervals are Student's over the seeds. Random choices, the loss at the end of training and cleanlab (where it is
installed), which needs no attribution but networks trained on folds, stand beside the library's. The guide page
examples/guide/curation.md shows what came out.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _data import add_data_option, load_images
from _training import few_threads, record_training
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj import curate
from source_proj.curate.verification import interval
from source_proj.evaluate import mislabel, retrain, stacked_outputs

BATCH, MOMENTUM, DECAY, CHECKPOINTS, NETWORKS, FOLDS = 32, 0.9, 1e-3, 4, 2, 4
EPOCHS = {"breast_cancer": 30, "digits": 20, "wine": 40, "pima": 30, "fashion_mnist": 12}
LR = {"fashion_mnist": 0.02}
SKLEARN = ("breast_cancer", "digits", "wine")


class Problem(NamedTuple):
    """A data set in three parts, the labels of the first partly flipped."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    flipped: np.ndarray
    classes: int


Proposals = dict[str, np.ndarray]
"""Positions that are kept, by the way that proposes them."""


def main() -> None:
    options = parse()
    left: dict[str, list[float]] = {}
    chosen: dict[str, list[float]] = {}
    ranked: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        problem = load_problem(options, seed)
        with few_threads(problem.train.tensors[0].shape[1]), tempfile.TemporaryDirectory() as folder:
            model, bank = trained(options, problem, seed, Path(folder))
            source = sp.Source(bank, model=model, progress=False)
            suspicions = suspect(options, problem, source, model, seed)
            dropping = propose_to_drop(options, problem, source, suspicions)
            selecting = propose_to_keep(options, problem, source, model, seed)
            proposals = [*dropping.values(), *selecting.values()]
            measured = iter(accuracies(options, problem, proposals))
        if problem.flipped.any():
            for name, values in suspicions.items():
                ranked.setdefault(name, []).append(mislabel(values, problem.flipped).auc)
        for table, names in ((left, dropping), (chosen, selecting)):
            for name in names:
                table.setdefault(name, []).append(next(measured))
    n = len(problem.train)
    print(
        f"{options.dataset}: {n} training examples, {options.flipped:.0%} of the labels flipped, {options.seeds} seeds"
    )
    show("flipped labels: area under the ROC curve", ranked, None)
    show(f"left out: {options.remove:.0%} of the examples, where nothing else is said", left, "nothing (all examples)")
    show(f"kept: {options.keep:.0%} of the examples", chosen, "random")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(EPOCHS), default="breast_cancer")
    add_data_option(parser)
    parser.add_argument("--flipped", type=float, default=0.2, help="share of the labels that are flipped")
    parser.add_argument("--remove", type=float, help="share to leave out (default: --flipped, or a tenth)")
    parser.add_argument("--keep", type=float, default=0.2, help="share to select")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    options.remove = options.remove or options.flipped or 0.1
    for name, low in (("flipped", -1), ("remove", 0), ("keep", 0)):
        if not low < getattr(options, name) < 1:
            parser.error(f"--{name} is a share below 1, got {getattr(options, name)}")
    return options


def load_problem(options: argparse.Namespace, seed: int) -> Problem:
    """Half of the examples to train on, a fifth to choose by, the rest to test (Fashion-MNIST: 1,500, 300, 2,000)."""
    inputs, labels = _load(options)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(inputs))
    n = len(inputs)
    cuts = [1500, 1800, 3800] if options.dataset == "fashion_mnist" else [n // 2, n // 2 + n // 5, n]
    own = inputs[order[: cuts[0]]]
    inputs = (inputs - own.mean(0)) / (own.std(0) + 1e-6)
    parts = [
        TensorDataset(torch.tensor(inputs[places], dtype=torch.float32), torch.tensor(labels[places], dtype=torch.long))
        for places in np.split(order[: cuts[2]], cuts[:2])
    ]
    train_inputs, given = parts[0].tensors
    classes = int(labels.max()) + 1
    flipped = np.zeros(cuts[0], dtype=bool)
    flipped[rng.permutation(cuts[0])[: round(options.flipped * cuts[0])]] = True
    shift = torch.from_numpy(np.where(flipped, rng.integers(1, classes, cuts[0]), 0))
    return Problem(TensorDataset(train_inputs, (given + shift) % classes), parts[1], parts[2], flipped, classes)


def _load(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    if options.dataset in SKLEARN:
        from sklearn import datasets

        loaded = getattr(datasets, f"load_{options.dataset}")()
        return loaded.data.astype(np.float64), loaded.target
    if options.dataset == "pima":
        table = np.loadtxt(options.data / "pima_diabetes" / "pima-indians-diabetes.csv", delimiter=",")
        return table[:, :-1], table[:, -1].astype(int)
    images, labels = load_images(options.data, "fashion_mnist", "train")
    return images[:10_000].numpy().astype(np.float64), labels[:10_000].numpy()


def make_model(problem: Problem) -> Callable[[], nn.Module]:
    n_inputs = problem.train.tensors[0].shape[1]
    return lambda: nn.Sequential(nn.Linear(n_inputs, 32), nn.ReLU(), nn.Linear(32, problem.classes))


def trained(options: argparse.Namespace, problem: Problem, seed: int, folder: Path) -> tuple[nn.Module, sp.Bank]:
    torch.manual_seed(seed)
    model, epochs = make_model(problem)(), EPOCHS[options.dataset]
    lr = LR.get(options.dataset, 0.03)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=DECAY)
    steps = epochs * -(-len(problem.train) // BATCH)
    recorder = sp.Recorder(
        model, optimizer, folder / "run", at=[steps * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)]
    )
    record_training(model, optimizer, problem.train, recorder, epochs=epochs, batch_size=BATCH, seed=seed)
    bank = sp.build(
        model, sp.Classification(), recorder.trajectory(), problem.train, folder / "bank", sketch=sp.Sketch(dim=1024),
        progress=False,
    )  # fmt: skip
    return model, bank


def suspect(
    options: argparse.Namespace, problem: Problem, source: sp.Source, model: nn.Module, seed: int
) -> dict[str, np.ndarray]:
    """What speaks against each training example; larger is more suspicious."""
    inputs, labels = problem.train.tensors
    n = len(labels)
    by_verb: dict[str, np.ndarray] = {}
    for by in ("error", "self_influence", "disagreement"):
        named = curate.mislabelled(source, labels, n=n - 1, by=by)
        values = np.full(n, -np.inf)
        values[named.ids] = -np.arange(n - 1)
        values[np.isneginf(values)] = -n
        by_verb[f"mislabelled by {by}"] = values
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(inputs), labels, reduction="none").numpy()
    suspicions = {**by_verb, "loss at the end": loss, "random": np.random.default_rng(seed).random(n)}
    if importlib.util.find_spec("cleanlab") is None:
        print("cleanlab is not installed, and left out: pip install cleanlab")
        return suspicions
    from cleanlab.rank import get_label_quality_scores

    fold = np.arange(n) % FOLDS
    folds = [np.flatnonzero(fold != place) for place in range(FOLDS)]
    outputs = trained_on(options, problem, folds, list(range(FOLDS)), inputs).softmax(-1)
    out_of_fold = outputs[torch.from_numpy(fold), torch.arange(n)].numpy()
    return {**suspicions, "cleanlab": 1 - get_label_quality_scores(labels.numpy(), out_of_fold)}


def propose_to_drop(
    options: argparse.Namespace, problem: Problem, source: sp.Source, suspicions: dict[str, np.ndarray]
) -> Proposals:
    n = len(problem.train)
    count = round(options.remove * n)
    summed = curate.aggregate(source, problem.validation)
    proposals = {"nothing (all examples)": np.arange(n)}
    proposals |= {name: np.sort(np.argsort(values)[: n - count]) for name, values in suspicions.items()}
    proposals["drop_worst for the validation set"] = curate.drop_worst(summed, count).kept
    proposals["harmful (as many as it names)"] = curate.harmful(summed).kept
    if problem.flipped.any():
        proposals["exactly the flipped"] = np.flatnonzero(~problem.flipped)
    return proposals


def propose_to_keep(
    options: argparse.Namespace, problem: Problem, source: sp.Source, model: nn.Module, seed: int
) -> Proposals:
    inputs, labels = problem.train.tensors
    n = round(options.keep * len(labels))
    scores = source.score(problem.validation)
    sums = curate.aggregate(scores).benefit[0]
    suspects = curate.mislabelled(source, labels, n=round(options.remove * len(labels)))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(inputs), labels, reduction="none").numpy()
    return {
        "random": np.random.default_rng(seed).permutation(len(labels))[:n],
        "highest sums of scores": np.argsort(-sums)[:n],
        "lowest loss at the end": np.argsort(loss)[:n],
        "select": curate.select(scores, n=n).kept,
        "select, by labels": curate.select(scores, n=n, labels=labels).kept,
        "select, by labels, no suspects": curate.select(scores, n=n, labels=labels, exclude=suspects).kept,
    }


def trained_on(
    options: argparse.Namespace, problem: Problem, subsets: list[np.ndarray], seeds: list[int], inputs: Tensor
) -> Tensor:
    """Outputs ``(subsets, n, classes)`` on ``inputs`` of a network trained on each subset."""
    make = make_model(problem)
    train_inputs, labels = problem.train.tensors
    return retrain(
        make, train_inputs, labels, subsets, seeds, epochs=EPOCHS[options.dataset], batch_size=BATCH,
        lr=LR.get(options.dataset, 0.03), momentum=MOMENTUM, weight_decay=DECAY, group=16,
        evaluate=stacked_outputs(make, inputs), progress=False,
    )  # fmt: skip


def accuracies(options: argparse.Namespace, problem: Problem, proposals: list[np.ndarray]) -> list[float]:
    """Test accuracy of each proposal, the mean over its networks."""
    inputs, labels = problem.test.tensors
    subsets = [kept for kept in proposals for _ in range(NETWORKS)]
    outputs = trained_on(options, problem, subsets, [100 + i % NETWORKS for i in range(len(subsets))], inputs)
    correct = (outputs.argmax(-1) == labels).double().mean(1).reshape(-1, NETWORKS)
    return [float(value) for value in correct.mean(1)]


def show(title: str, rows: dict[str, list[float]], reference: str | None) -> None:
    if not rows:
        return
    print(f"\n{title}")
    for name, values in sorted(rows.items(), key=lambda row: -np.mean(row[1])):
        line = f"  {name:36s} {np.mean(values):.3f}"
        if reference is not None and name != reference:
            line += f"   {interval(np.array(values) - rows[reference])} against {reference}"
        print(line)


if __name__ == "__main__":
    main()
