"""Recall@10 of the bank's lists and of reranked ones, against SOURCE without a sketch at the same damping.

    python examples/speed/rerank.py --data FOLDER                    # Fashion-MNIST, some minutes on one core
    python examples/speed/rerank.py --data FOLDER --dims 512 --candidates 50 100 400

Of each sketch: the mean over queries of the share of the ten highest scores that are right, and the distance of the
listed scores from the unsketched ones, relative to these; once as the bank has them, and once for each number of
candidates. The last column is what comes of correcting the inner product of query and example alone, by its exact value
times c(0)/N: worse than no correction, as the error of the Hessian's part no longer cancels that of the product.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from _data import add_data_option, load_images
from _training import record_training

import source_proj as sp
from source_proj.attribution.hits import Hits
from source_proj.attribution.operands import mean_gradients
from source_proj.attribution.spectral import response

TOP, BATCH = 10, 32


def recall(places: np.ndarray, truth: np.ndarray) -> float:
    """The mean share of the truly highest that are listed, of places ``(Q, 10)`` and true scores ``(Q, N)``."""
    best = np.argsort(-truth, axis=1)[:, :TOP]
    return float(np.mean([len(set(a) & set(b)) / TOP for a, b in zip(places, best, strict=True)]))


def distance(hits: Hits, truth: np.ndarray) -> float:
    right = np.take_along_axis(truth, hits.indices, axis=1)
    return float(np.linalg.norm(hits.scores - right) / np.linalg.norm(right))


def plainly_corrected(source: sp.Source, exact: sp.Source, queries: TensorDataset) -> np.ndarray:
    """Places ``(Q, 10)`` after <q, g> - <Rq, Rg>, times -c(0)/N, was added to all scores."""
    scores = torch.from_numpy(source.score(queries).to_numpy()).double()
    (segment,) = source.segments
    products = []
    for method in (exact, source):
        bank = method.banks[0]
        query = method._query(bank, method.sketch(queries)[0]).double()
        rows = torch.cat([block.rows for block in mean_gradients(bank, 0, segment.checkpoints, None)]).double()
        products.append(query @ rows.T)
    at_zero = response(segment.time, segment.decay, segment.damping)(torch.zeros(1, dtype=torch.float64))
    scores -= at_zero / segment.n * (products[0] - products[1])
    return scores.topk(TOP, 1).indices.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_data_option(parser)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--candidates", type=int, nargs="+", default=[50, 100, 200])
    given = parser.parse_args()
    x, y = load_images(given.data, "fashion_mnist", "train")
    train = TensorDataset(x[: given.examples], y[: given.examples])
    x, y = load_images(given.data, "fashion_mnist", "t10k")
    queries = TensorDataset(x[: given.queries], y[: given.queries])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))
    table = Table("k", "list", "recall@10", "distance", "passes", "seconds", "plainly corrected")
    with tempfile.TemporaryDirectory() as folder:
        run = recorded(model, train, given.epochs, Path(folder))
        size = sum(parameter.numel() for parameter in model.parameters())
        build = partial(sp.build, model, sp.Classification(), run, train, batch_size=64, progress=False)
        whole = build(f"{folder}/exact", sketch=sp.Sketch(size, "identity"), storage="float32")
        for dim in given.dims:
            bank = build(f"{folder}/{dim}", sketch=sp.Sketch(dim))
            source = sp.Source(bank, model=model, progress=False)
            exact = sp.Source(
                whole, model=model, damping=source.segments[0].damping, query_gradient="mean", progress=False
            )
            truth = exact.score(queries).to_numpy()
            plain = f"{recall(plainly_corrected(source, exact, queries), truth):.3f}"
            for candidates in (None, *given.candidates):
                start = time.perf_counter()
                hits = source.top_k(queries, TOP, rerank=candidates)
                passes = "" if hits.reranked is None else str(hits.reranked.passes)
                name = "the bank's" if candidates is None else f"M = {candidates}"
                table.add_row(
                    str(dim), name, f"{recall(hits.indices, truth):.3f}", f"{distance(hits, truth):.3f}", passes,
                    f"{time.perf_counter() - start:.1f}", plain if candidates is None else "",
                )  # fmt: skip
    Console().print(table)


def recorded(model: nn.Module, train: TensorDataset, epochs: int, folder: Path) -> sp.Trajectory:
    """The trajectory of some epochs of SGD with momentum, three checkpoints, one segment."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    steps = epochs * -(-len(train) // BATCH)
    recorder = sp.Recorder(model, optimizer, folder / "run", every=max(1, steps // 3))
    record_training(model, optimizer, train, recorder, epochs=epochs, batch_size=BATCH, seed=1)
    return recorder.trajectory(segments=1)


if __name__ == "__main__":
    main()
