import importlib
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp
from source_proj.attribution.source.sizes import SegmentSize, fit_peak, fitted_bytes, search_peak
from source_proj.bank.codecs import find_codec
from source_proj.kernels.gram import packed_size
from source_proj.sketch import exact_sketch
from source_proj.sketch.columns import blocks_of

module = importlib.import_module("source_proj.distribute.plan")  # whose name the function has too

N = 400


def make(n=N):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(n, 20, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    return TensorDataset(inputs, labels)


def run(checkpoints=2, width=30):
    def model():
        return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3))

    return model(), sp.Trajectory([sp.Checkpoint(model().state_dict(), step=s + 1, lr=0.1) for s in range(checkpoints)])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_TRIALS", 1)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(folder))
        patched.setattr(module, "_TRIALS", 1)
        model, trajectory = run()
        options = {"sketch": sp.Sketch(dim=64), "batch_size": 10, "workers": 3, "shard_rows": 50}
        made = sp.plan(model, sp.Classification(), trajectory, make(), **options)
    assert list(folder.iterdir()) == []
    return made


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    model, trajectory = run()
    options = {"sketch": sp.Sketch(dim=64), "batch_size": 10, "shard_rows": 50, "progress": False}
    return sp.build(
        model, sp.Classification(), trajectory, make(), tmp_path_factory.mktemp("built") / "bank", **options
    )


def test_what_can_be_counted_is_exact(planned, bank):
    assert (planned.examples, planned.passes) == (N, 2)
    assert planned.batches == 2 * 40
    assert planned.shards == sum(part.spec.n_shards * part.n_checkpoints for part in bank.parts) == 16
    assert planned.parameters == sum(parameter.numel() for parameter in run()[0].parameters())
    assert planned.bytes["rows"] == 2 * N * 64
    assert planned.bytes["marks"] < bank.nbytes()["marks"] < 1.5 * planned.bytes["marks"] + 1000


def test_fits_take_what_was_planned(planned, bank):
    """A spectrum of 64 directions; zarr adds checksums and metadata."""
    sp.Source(bank, progress=False).fit()
    assert planned.bytes["fits"] == 8 * 64 * 65
    assert planned.bytes["fits"] < bank.fits.nbytes() < planned.bytes["fits"] + 10_000


def test_memory_of_fit_and_search_does_not_grow_with_the_examples():
    few, many = ([SegmentSize(rows, 2), SegmentSize(rows, 1)] for rows in (10**5, 10**9))
    (whole,) = blocks_of(4096, 1)
    sizes = [(fitted_bytes(own, [whole]), search_peak(own, 4096, 10_000, find_codec("int8"))) for own in (few, many)]
    assert sizes[0][0] == sizes[1][0] == 2 * 12 * packed_size(4096)
    assert all(peak <= 2 * 10**9 for _, peak in sizes)
    held = [search_peak([SegmentSize(1000, 1)], 64, 100, find_codec("int8"), memory) for memory in ("1GB", 100)]
    assert held[0] - held[1] == 1000 * 68


@pytest.mark.parametrize("dim", [512, 4096, 16384])
def test_what_a_fit_leaves_in_memory_grows_with_segments_and_blocks(dim):
    """A factor, or eigenvectors, of each block in each segment."""
    for count in (1, 4):
        blocks = blocks_of(dim, count)
        one, *more = (fit_peak([SegmentSize(10**6, 1)] * segments, blocks, 1) for segments in (1, 2, 6))
        assert [peak - one for peak in more] == [extra * count * 8 * (dim // count) ** 2 for extra in (1, 5)]


PROGRAM = """
import sys
import torch
import source_proj as sp
bank = sp.open(sys.argv[1])
source = sp.Source(bank, cache=False, progress=False)
points = {point.hash(): torch.randn(20, 1536) for point in bank.query_points()}
features = sp.QueryFeatures(points, list(range(20)), bank.sketch.spec())
list(bank.stages[0].iter_rows(0, shards=range(1)))
torch.linalg.cholesky(torch.eye(8).double())
def peak():  # of this program alone: getrusage's begins with what the process that started it had
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
source.fit()
fitted = peak() - before
source.top_k(features, 3)
print(fitted, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux counts it")
def test_planned_and_real_memory(tmp_path):
    """Of the same size; prints the ratios."""
    model, trajectory = run(width=100)
    data, options = make(4000), {"sketch": sp.Sketch(dim=1536), "batch_size": 50, "shard_rows": 1000}
    planned = sp.plan(model, sp.Classification(), trajectory, data, **options)
    sp.build(model, sp.Classification(), trajectory, data, tmp_path / "bank", progress=False, **options)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "bank")]
    path = os.pathsep.join([str(Path(sp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    fitted, searched = map(int, done.stdout.split())
    print(f"planned over real: fit {planned.fit_peak / fitted:.2f}, both {planned.search_peak / searched:.2f}")
    assert 0.5 < planned.fit_peak / fitted < 3
    assert searched < planned.fit_peak + planned.search_peak


def test_a_stage_and_a_draw_are_passes_of_their_own():
    model, trajectory = run(3)
    data = DataLoader(make(), batch_size=20)
    planned = sp.plan(model, sp.Classification(), trajectory, data, sketch=sp.Sketch(dim=8), sampled_fisher=2)
    assert planned.passes == 3 * 3
    assert planned.batches == 3 * 20
    assert planned.bytes["rows"] == 3 * N * (8 + 2 * 4)  # int8, and each draw in four bits


def test_time_is_that_of_its_parts(planned):
    assert planned.seconds == pytest.approx(sum(planned.parts.values()))
    assert planned.seconds_each == pytest.approx(planned.seconds / 3)
    assert planned.parts[planned.dominates] == max(planned.parts.values())
    assert all(value >= 0 for value in planned.parts.values())
    assert planned.dominates in str(planned)
    alone, several = str(replace(planned, workers=1)), str(replace(planned, workers=4))
    assert ", 1 worker\n" in alone
    assert "each" not in alone
    assert ", 4 workers\n" in several
    assert " of each worker, " in several


def test_sizes_that_are_suggested_fit():
    model, trajectory = run()
    task, data = sp.Classification(), make()
    largest = sp.plan(model, task, trajectory, data, batch_size=10, sketch=sp.Sketch(dim=64))
    assert largest.dim == largest.parameters
    assert f"sketch of {largest.dim} ({exact_sketch(largest.dim)})" in str(largest)
    small = sp.plan(model, task, trajectory, data, batch_size=10, disk=200_000, workers=40, sketch=sp.Sketch(dim=64))
    assert 2 * N * small.dim <= 200_000 < 2 * N * 2 * small.dim + 2 * N * 20
    assert small.shard_rows == 10  # else some of 40 workers would have nothing to do
    assert small.checkpoints == 2


@pytest.mark.parametrize("kind", ["sparse", "tensor", "rademacher"])
@pytest.mark.parametrize("width", [1, 7, 30, 1000])
def test_no_sketch_has_more_numbers_than_the_network_has_parameters(width, kind):
    model, trajectory = run(checkpoints=1, width=width)
    planned = sp.plan(model, sp.Classification(), trajectory, make(), batch_size=10, sketch=sp.Sketch(16, kind))
    assert planned.dim == min(16384, planned.parameters)
    assert (planned.dim == planned.parameters) == ("identity" in str(planned))


@given(st.integers(1, 600), st.integers(0, 1 << 20))
def test_a_sparse_sketch_of_as_many_numbers_as_parameters_is_exact(size, seed):
    gradients = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    rows = sp.Sketch(size, "sparse", seed=seed)(gradients, 0)
    assert torch.equal(rows.abs().sort(1).values, gradients.abs().sort(1).values)


@pytest.mark.parametrize("workers", [0, -1, True, 1.5])
def test_workers_that_are_no_number_are_refused(workers):
    model, trajectory = run()
    with pytest.raises(ValueError, match="workers must be a number of at least 1"):
        sp.plan(model, sp.Classification(), trajectory, make(), workers=workers)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"disk": "10GB"}, "disk must be a positive number of bytes.*got '10GB'"),
        ({"disk": 0}, "disk must be a positive number of bytes.*got 0"),
        ({"shard": (0, 2)}, r"plan times a whole build, got shard=\(0, 2\): leave it out, and give workers="),
    ],
)
def test_what_makes_no_plan_is_refused(given, words):
    model, trajectory = run()
    with pytest.raises(ValueError, match=words):
        sp.plan(model, sp.Classification(), trajectory, make(), **given)


def test_planned_and_real_time(tmp_path):
    """Of one order of magnitude on any machine, however busy; prints the ratio."""
    model, trajectory = run(width=400)
    options = {"sketch": sp.Sketch(dim=512), "batch_size": 50, "shard_rows": 500}
    data = make(4000)
    planned = sp.plan(model, sp.Classification(), trajectory, data, **options)
    start = time.perf_counter()
    sp.build(model, sp.Classification(), trajectory, data, tmp_path / "bank", progress=False, **options)
    ratio = planned.seconds / (time.perf_counter() - start)
    print(f"planned over real time: {ratio:.2f}; {asdict(planned)}")
    assert 0.1 < ratio < 10


@pytest.mark.parametrize("storage", [None, "int8"])
def test_sizes_and_storage_that_are_suggested_belong_together(storage):
    """The codec is what a build of the suggested sketch takes, and the disk is asked about both."""
    model, trajectory = run(width=1000)
    task, data = sp.Classification(), make()
    options = {"batch_size": 10, "sketch": sp.Sketch(dim=64), "storage": storage}
    planned = sp.plan(model, task, trajectory, data, **options)
    assert (planned.dim, planned.storage) == (16384, storage or "int2")
    rows = 2 * N * 4096
    smaller = sp.plan(model, task, trajectory, data, **options, disk=int(1.2 * rows))
    assert (smaller.dim, smaller.storage) == ((4096, "int8") if storage else (16384, "int2"))


def test_long_trials_are_made_once(monkeypatch):
    """Else a plan takes longer than the build."""
    model, trajectory = run()
    built, builds = [], module.build

    def counted(*args, **options):
        built.append(len(next(iter(args[3].values()))))
        return builds(*args, **options)

    monkeypatch.setattr(module, "build", counted)
    monkeypatch.setattr(module, "_TRIALS", 3)
    monkeypatch.setattr(module, "_PATIENCE", float("inf"))  # however busy the machine is
    options = {"batch_size": 10, "sketch": sp.Sketch(dim=64), "progress": False}
    sp.plan(model, sp.Classification(), trajectory, make(), **options)
    short, built[:] = len(built), []
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    sp.plan(model, sp.Classification(), trajectory, make(), **options)
    assert (short, sorted(built)) == (10, [10, 10, 40, 40])
