"""What does storing rows in fewer bits cost, beside the noise that the sketch has anyway?

    python examples/speed/storage.py        # scikit-learn's digits, about a minute; needs the extra "demo"

For banks of the same run in each codec: bytes per row and checkpoint, the change of SOURCE's scores, and
the change that another sketch seed makes. Both changes are given as the mean absolute difference over the mean absolute
score, and as the correlation of the scores of each query.
"""

import argparse
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import source_proj as sp
from source_proj.bank.codecs import codec_names

STORAGES = codec_names()


def train(data: Dataset[Any], folder: Path) -> tuple[nn.Module, sp.Trajectory]:
    """Fit a small network for 20 epochs and record it six times."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    recorder = sp.Recorder(model, optimizer, folder, every=20 * len(loader) // 6)
    for _ in range(20):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            recorder.step()
    return model, recorder.trajectory()


def compare(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Relative mean absolute difference, and the mean correlation over queries."""
    correlations = [np.corrcoef(one, other)[0, 1] for one, other in zip(a, b, strict=True)]
    return float(np.abs(a - b).mean() / np.abs(a).mean()), float(np.mean(correlations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images).float() / 16, torch.from_numpy(labels))
    fit, queries = Subset(data, range(1500)), Subset(data, range(1500, 1700))
    scores: dict[tuple[str, int], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, trajectory = train(fit, Path(folder) / "run")
        for storage in STORAGES:
            for seed in range(args.seeds):
                scores[storage, seed] = score(model, trajectory, fit, queries, Path(folder), storage, seed, args.dim)
    exact = [scores["float32", seed] for seed in range(args.seeds)]
    noise = np.mean([compare(a, b) for a, b in combinations(exact, 2)], axis=0)
    print(f"seed to seed: difference {noise[0]:.4f}, correlation {noise[1]:.4f}")
    for storage in [name for name in STORAGES if name != "float32"]:
        change = np.mean([compare(exact[seed], scores[storage, seed]) for seed in range(args.seeds)], axis=0)
        print(f"{storage:>12}: difference {change[0]:.4f}, correlation {change[1]:.6f}")


def score(
    model: nn.Module,
    trajectory: sp.Trajectory,
    fit: Dataset[Any],
    queries: Dataset[Any],
    folder: Path,
    storage: str,
    seed: int,
    dim: int,
) -> np.ndarray:
    """Build a bank, say how large it is, and score the queries."""
    path = folder / f"{storage}-{seed}"
    bank = sp.build(
        model, sp.Classification(), trajectory, fit, path, sketch=sp.Sketch(dim, seed=seed), storage=storage
    )
    if seed == 0:
        kinds = bank.nbytes()
        total = sum(kinds.values()) - kinds["weights"] - kinds["fits"]
        cells = bank.n_rows * bank.stages[0].n_checkpoints
        print(f"{storage:>12}: {total / cells:8.1f} bytes per row and checkpoint = {total / cells / dim:.4f} k")
    return np.asarray(sp.Source(bank, model=model, cache=False, progress=False).score(queries))


if __name__ == "__main__":
    main()
