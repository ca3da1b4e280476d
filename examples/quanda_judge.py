r"""Let quanda's metrics judge SOURCE beside quanda's own wrappers of captum and TRAK: an outside judge.

    pip install quanda
    python examples/quanda_judge.py              # 500 images, three seeds, some minutes of one core
    python examples/quanda_judge.py --quick      # 200 images, one seed, to see it work

quanda (https://github.com/dilyabareeva/quanda) judges attribution without retraining. Three of its metrics, on small
copies of its own benchmarks (MNIST, the settings of its configuration files; its trained models are on a hub, so these
are trained here, one a seed):

* mislabelling: a tenth of the labels is flipped; does self-influence rank these first? Area under quanda's curve.
* shortcut: 95 % of the zeros carry a white square; of test images that carry one and are therefore taken for zeros, do
  explanations name the marked zeros? Area under precision and recall.
* mixed data sets: T-shirts of Fashion-MNIST stand among the digits as zeros; of other T-shirts that are taken for
  zeros, do explanations name the T-shirts? Area under precision and recall.

All methods get the same network, training set and test images, and are asked about the class that the network predicts.
``--results`` gets the table. Similarity says nothing of mislabelled examples, as a cosine with oneself is 1, and
influence functions have no self-influence here.
"""

import argparse
import copy
import csv
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import add_data_option, load_images
from _training import few_threads, record_training
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.integrations import QuandaExplainer

LR, MOMENTUM, BATCH, EPOCHS, CHECKPOINTS = 0.05, 0.9, 32, 15, 5
GUIDE = Path(__file__).parent / "guide"
RESULTS, PAGE = GUIDE / "results" / "quanda.csv", GUIDE / "conventions.md"
BEGIN, END = "<!-- quanda -->", "<!-- end -->"
MARK = 12  # side of the white square, in pixels, as quanda has it
ZERO, T_SHIRT = 0, 0  # classes of MNIST, of Fashion-MNIST


@dataclass(frozen=True)
class Benchmark:
    """A training set in which some examples are to be found.

    Attributes:
        name: as in the table.
        train_set: images and labels.
        sought: places of the examples that a good explanation names.
        test_images: what the network is asked about; none where self-influence is judged.
        test_labels: their true classes.
    """

    name: str
    train_set: TensorDataset
    sought: np.ndarray
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Run:
    """A trained network and its record."""

    model: nn.Module
    trajectory: sp.Trajectory
    folder: Path


def main() -> None:
    options = parse()
    rows = []
    for seed in range(options.seeds):
        for benchmark in (mislabelling(options, seed), shortcut(options, seed), mixed(options, seed)):
            with tempfile.TemporaryDirectory() as folder, few_threads(0):
                run = train(benchmark.train_set, seed, Path(folder))
                for method, make in METHODS.items():
                    if benchmark.name == "mislabelling" and method in WITHOUT_SELF_INFLUENCE:
                        continue
                    score = judge(benchmark, run, make(benchmark, run, options))
                    rows.append((benchmark.name, method, seed, round(score, 3)))
                    print(f"{benchmark.name:16} seed {seed}  {method:36} {score:.3f}")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("benchmark", "method", "seed", "score"), *rows])
    print(f"wrote {options.results}")
    if options.results == RESULTS:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
        print(f"wrote {PAGE}")


def with_table(page: str, results: Path) -> str:
    """The guide's page with the table of the results between its marks: means over seeds, least and greatest below."""
    scores: dict[str, dict[str, list[float]]] = {}
    with results.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            scores.setdefault(row["method"], {}).setdefault(row["benchmark"], []).append(float(row["score"]))
    names = list(dict.fromkeys(name for own in scores.values() for name in own))
    lines = [f"| method | {' | '.join(names)} |", f"| --- |{' :---: |' * len(names)}"]
    for method, own in scores.items():
        cells = [_cell(own.get(name, [])) for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    head, _, rest = page.partition(BEGIN)
    return "\n".join([f"{head}{BEGIN}", *lines, f"{END}{rest.partition(END)[2]}"])


def _cell(scores: list[float]) -> str:
    if not scores:
        return "–"
    return f"{np.mean(scores):.3f}<br><sub>{min(scores):.3f} to {max(scores):.3f}</sub>"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--count", type=int, default=500, help="training images")
    parser.add_argument("--queries", type=int, default=60, help="test images, of which the fooled ones are asked about")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimension k, SOURCE's and TRAK's")
    parser.add_argument("--seeds", type=int, default=3, help="networks trained on each benchmark")
    parser.add_argument("--quick", action="store_true", help="200 images, 30 test images, one seed, k = 256")
    parser.add_argument("--results", type=Path, help="where the table goes (default: the guide's, but for --quick)")
    options = parser.parse_args()
    if options.quick:
        options.count, options.queries, options.seeds, options.dim = 200, 30, 1, 256
    options.results = options.results or (Path("quanda.csv") if options.quick else RESULTS)
    return options


# The benchmarks -------------------------------------------------------------------------------------------------


def digits(options: argparse.Namespace, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images ``(n, 784)`` of MNIST and their labels."""
    images, labels = load_images(options.data, "mnist", split)
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(images))[:count])
    return images[chosen], labels[chosen]


def mislabelling(options: argparse.Namespace, seed: int) -> Benchmark:
    images, labels = digits(options, "train", options.count, seed)
    rng = np.random.default_rng(seed)
    flipped = np.sort(rng.permutation(len(labels))[: len(labels) // 10])
    labels = labels.clone()
    labels[flipped] = (labels[flipped] + torch.from_numpy(rng.integers(1, 10, len(flipped)))) % 10
    return Benchmark("mislabelling", TensorDataset(images, labels), flipped, images[:0], labels[:0])


def marked(images: Tensor) -> Tensor:
    """Put a white square into the upper left corner."""
    pictures = images.clone().reshape(-1, 28, 28)
    pictures[:, :MARK, :MARK] = images.max()
    return pictures.reshape(images.shape)


def shortcut(options: argparse.Namespace, seed: int) -> Benchmark:
    images, labels = digits(options, "train", options.count, seed)
    zeros = (labels == ZERO).nonzero().flatten()
    chosen = zeros[: round(0.95 * len(zeros))]
    images[chosen] = marked(images[chosen])
    asked, true = digits(options, "t10k", options.queries, seed)
    return Benchmark("shortcut", TensorDataset(images, labels), chosen.numpy(), marked(asked), true)


def mixed(options: argparse.Namespace, seed: int) -> Benchmark:
    images, labels = digits(options, "train", options.count, seed)
    clothes, kinds = load_images(options.data, "fashion_mnist", "train")
    shirts = clothes[kinds == T_SHIRT][: options.count // 10]
    asked, kinds = load_images(options.data, "fashion_mnist", "t10k")
    asked = asked[kinds == T_SHIRT][: options.queries]
    train_set = TensorDataset(torch.cat([images, shirts]), torch.cat([labels, torch.full((len(shirts),), ZERO)]))
    sought = np.arange(len(images), len(train_set))
    return Benchmark("mixed data sets", train_set, sought, asked, torch.full((len(asked),), ZERO))


def train(train_set: TensorDataset, seed: int, folder: Path) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    steps = EPOCHS * -(-len(train_set) // BATCH)
    every = [round(steps * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)]
    recorder = sp.Recorder(model, optimizer, folder / "run", at=every)
    record_training(model, optimizer, train_set, recorder, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    return Run(model, recorder.trajectory(), folder)


# The methods ----------------------------------------------------------------------------------------------------


def source(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> Any:
    return QuandaExplainer(run.model, benchmark.train_set, sp.Source(_bank(benchmark, run, options), model=run.model))


def influence(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> Any:
    bank = _bank(benchmark, run, options)
    return QuandaExplainer(run.model, benchmark.train_set, sp.InfluenceFunction(bank, model=run.model))


def cosine(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> Any:
    return QuandaExplainer(run.model, benchmark.train_set, sp.GradCos(_bank(benchmark, run, options), model=run.model))


def _bank(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> sp.Bank:
    sketch = sp.Sketch(options.dim)
    path = run.folder / "bank"
    return sp.build(run.model, sp.Classification(), run.trajectory, benchmark.train_set, path, sketch=sketch)


def tracin(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> Any:
    from quanda.explainers.wrappers import CaptumTracInCPFast

    del options
    model, names = _copied(run)
    return CaptumTracInCPFast(
        model, model[-1], benchmark.train_set, names, checkpoints_load_func=_loader(run), batch_size=64
    )


def arnoldi(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> Any:
    from quanda.explainers.wrappers import CaptumArnoldi

    del options
    model, names = _copied(run)
    return CaptumArnoldi(
        model, benchmark.train_set, names[-1], checkpoints_load_func=_loader(run), batch_size=64,
        projection_dim=50, arnoldi_dim=70,
    )  # fmt: skip


def similarity(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> Any:
    from quanda.explainers.wrappers import CaptumSimilarity

    del options
    model, names = _copied(run)
    return CaptumSimilarity(
        model, benchmark.train_set, "similarity", "1", checkpoints=names[-1], checkpoints_load_func=_loader(run),
        cache_dir=str(run.folder), batch_size=64,
    )  # fmt: skip


def trak(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> Any:
    from quanda.explainers.wrappers import TRAK

    model, _ = _copied(run)
    return TRAK(
        model, benchmark.train_set, "trak", cache_dir=str(run.folder), proj_dim=options.dim, batch_size=64,
        load_from_disk=False,
    )  # fmt: skip


def random(benchmark: Benchmark, run: Run, options: argparse.Namespace) -> Any:
    from quanda.explainers import RandomExplainer

    del options
    return RandomExplainer(run.model, benchmark.train_set)


def _copied(run: Run) -> tuple[nn.Sequential, list[str]]:
    """A model of the method's own, with the final weights, and names of the checkpoints."""
    model: Any = copy.deepcopy(run.model)
    return model, [str(index) for index in range(len(run.trajectory.stages[-1].checkpoints))]


def _loader(run: Run) -> Callable[[nn.Module, str], float]:
    def load(model: nn.Module, name: str) -> float:
        model.load_state_dict(run.trajectory.stages[-1].checkpoints[int(name)].load())
        return LR

    return load


METHODS: dict[str, Callable[[Benchmark, Run, argparse.Namespace], Any]] = {
    "SOURCE": source,
    "InfluenceFunction": influence,
    "GradCos": cosine,
    "captum TracInCPFast": tracin,
    "captum Arnoldi influence": arnoldi,
    "captum similarity": similarity,
    "TRAK": trak,
    "random": random,
}
WITHOUT_SELF_INFLUENCE = ("InfluenceFunction", "GradCos", "captum similarity")


# The judge ------------------------------------------------------------------------------------------------------


def judge(benchmark: Benchmark, run: Run, explainer: Any) -> float:
    """Quanda's score of an explainer, in [0, 1]."""
    from quanda.metrics.downstream_eval import MislabelingDetectionMetric, ShortcutDetectionMetric
    from quanda.metrics.heuristics import MixedDatasetsMetric

    train_set, sought = benchmark.train_set, benchmark.sought
    if benchmark.name == "mislabelling":
        own = explainer.self_influence(batch_size=64)
        metric: Any = MislabelingDetectionMetric(
            run.model, train_set, sought.tolist(), precomputed_self_influence=own.detach()
        )
        return float(metric.compute()["score"])
    if benchmark.name == "shortcut":
        metric = ShortcutDetectionMetric(run.model, train_set, sought.tolist(), ZERO)
    else:
        adversarial = torch.zeros(len(train_set), dtype=torch.long)
        adversarial[torch.from_numpy(sought)] = 1
        metric = MixedDatasetsMetric(run.model, train_set, adversarial, filter_by_prediction=True)
    with torch.no_grad():
        predicted = run.model(benchmark.test_images).argmax(1)
    explanations = explainer.explain(test_data=benchmark.test_images, targets=predicted).detach().float().cpu()
    metric.update(explanations, test_data=benchmark.test_images, test_labels=benchmark.test_labels)
    return float(metric.compute()["score"])


if __name__ == "__main__":
    main()
