"""How far can you trust attribution on your own model? Retrain it on random halves of the data, and see.

A minute or two: ``python examples/evaluate_your_model.py``. The retrainings are kept in --folder, if given:
the command goes on where it was stopped.

The linear datamodeling score (LDS) is the rank correlation, over random halves of the training set, of each query's
summed scores with what models retrained on those halves measure of it. ``retrain`` below is any function of yours that
trains on some examples and measures the queries as the task does. Read the LDS beside its noise ceiling, which a
perfect prediction would reach. An exact first-order prediction shows a slope from 1 to 2: in a half every example
weighs twice as much, but as many epochs are half the steps, which matters where training has not converged.
"""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import source_proj as sp

# What you have already: data, and a function that trains your model on some of it.
pixels, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.from_numpy(pixels / 16).float(), torch.from_numpy(labels))
train_set, queries = Subset(digits, range(1000)), Subset(digits, range(1000, 1050))
task = sp.Classification()


def train(examples: Dataset[Any], seed: int, record: Path | None = None) -> nn.Module:
    """Your own training loop; here it also records itself, when asked to."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = [batch for _ in range(10) for batch in DataLoader(examples, batch_size=50, shuffle=True)]
    recorder = sp.Recorder(model, optimizer, record, every=50) if record is not None else None
    for inputs, targets in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if recorder is not None:
            recorder.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where retrainings are kept (default: a temporary folder)")
    parser.add_argument("--figure", type=Path, default=Path("evaluation.png"), help="where the figure goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder if options.folder is not None else Path(temporary)
        model = train(train_set, seed=0, record=Path(temporary) / "run")
        trajectory = sp.Trajectory.from_recorder(Path(temporary) / "run")
        bank = sp.build(model, task, trajectory, train_set, Path(temporary) / "bank", sketch=sp.Sketch(1024))
        source = sp.Source(bank, model=model)

        # ten lines
        def retrain(kept: np.ndarray, seed: int) -> np.ndarray:
            model = train(Subset(train_set, kept.tolist()), seed)
            with torch.no_grad():
                return task.measurement(model, next(iter(DataLoader(queries, len(queries))))).numpy()

        truth = sp.evaluate.GroundTruth.subsets(
            folder / "truth", len(train_set), len(queries), count=50, retrainings=2, settings={"epochs": 10}
        )
        truth.fill(retrain)  # executor=: by other processes, or a cluster
        result = sp.evaluate.lds(source.score(queries), truth)
        print(result)
        # end

        low, high = result.calibration.interval
        print(f"slope of actual on predicted measurements {result.calibration.slope:.2f} [{low:.2f}, {high:.2f}]")
        if find_spec("matplotlib") is not None:
            sp.evaluate.plot_calibration(source.score(queries), truth).savefig(options.figure)
            print(f"predicted against actual changes are drawn in {options.figure}")
        else:
            print("no figure, as matplotlib is not installed: pip install 'source-proj[plot]'")


if __name__ == "__main__":
    main()
