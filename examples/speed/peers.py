"""Ours beside its peers in one process: projections of the same gradients, and a pass over the same batch.

    pip install traker kronfluence dattri        # those that are there are timed, the others are named
    python examples/speed/peers.py               # a minute on one core
    python examples/speed/peers.py --coordinates 1000000 --dim 4096

* projections: rows of float32 gradients to k numbers, by each kind of ours, by TRAK's BasicProjector (the one of its
  projectors that runs without a GPU) and by dattri's random_project. What each does in between is its own affair: only
  ours give the same matrix on every device;
* passes: values and sketched gradients of one batch, beside kronfluence's covariance pass over that batch (its first of
  three fitting passes, which sketches nothing yet) and plain forward + backward.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import source_proj as sp

from _bounds import Way, interleaved  # isort: skip
from build import CPU, PLAIN, SUBJECTS, Passes  # isort: skip

KINDS = ("sparse", "tensor")


def trak_projection(rows: Tensor, dim: int) -> Callable[[], object]:
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(rows.shape[1], dim, 0, ProjectionType.rademacher, CPU, dtype=torch.float32)
    return lambda: projector.project(rows, model_id=0)


def dattri_projection(rows: Tensor, dim: int) -> Callable[[], object]:
    from dattri.func.projection import random_project

    project = random_project(rows, len(rows), dim, 32, proj_type="rademacher", device="cpu")
    return lambda: project(rows)


def kronfluence_pass(passes: Passes) -> Callable[[], object]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class Classes(Task):  # type: ignore[misc]  # untyped
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:  # noqa: ARG002
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classes()
    model = prepare_model(passes.subject.model(), task)
    data = TensorDataset(*passes.batch)
    folder = tempfile.TemporaryDirectory()
    analyzer = Analyzer("covariances", model, task, cpu=True, output_dir=folder.name, disable_tqdm=True)

    def fit() -> object:
        analyzer.fit_covariance_matrices("f", data, per_device_batch_size=len(data), overwrite_output_dir=True)
        return folder

    return fit


def timed(title: str, ways: list[Way], missing: list[str], repetitions: int, baseline: str) -> Table:
    times = interleaved(ways, repetitions, CPU)
    table = Table("", "ms", f"of {baseline}", title=title, box=None)
    for name, seconds in times.items():
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / times[baseline]:.2f}")
    for reason in missing:
        table.add_row(reason, "-", "-")
    return table


def present(makers: dict[str, Callable[[], Callable[[], object]]]) -> tuple[list[Way], list[str]]:
    """The ways whose package is installed, and what to say of the others."""
    ways, missing = [], []
    for name, make in makers.items():
        try:
            ways.append(Way(name, make()))
        except ImportError as problem:
            missing.append(f"{name}: skipped, {problem}")
    return ways, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinates", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows, out = torch.randn(a.rows, a.coordinates), torch.zeros(a.rows, a.dim)
    own = [Way(k, partial(sp.Sketch(a.dim, k).add_, out, rows)) for k in ("sparse", "rademacher")]
    peers, missing = present(
        {
            "traker BasicProjector": partial(trak_projection, rows, a.dim),
            "dattri": partial(dattri_projection, rows, a.dim),
        }
    )
    title = f"{a.rows} x {a.coordinates:,} float32 to {a.dim:,}, {a.threads} threads"
    Console().print(timed(title, own + peers, missing, a.repetitions, "sparse"))
    passes = Passes(SUBJECTS["mlp"], SUBJECTS["mlp"].size, CPU, None, list(KINDS))
    peers, missing = present({"kronfluence covariances": partial(kronfluence_pass, passes)})
    ways = [Way(name, function) for name, function in passes.ways().items()]
    Console().print(timed("one batch of the MLP", ways + peers, missing, a.repetitions, PLAIN))


if __name__ == "__main__":
    main()
