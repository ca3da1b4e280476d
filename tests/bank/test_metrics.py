"""Banks of preconditioned gradients: their rows, what they refuse, and builds that are killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from bank_runs import BATCH, N, assert_same, content, make_adam_run, make_data, make_run, rows

from source_proj import bank as banks
from source_proj._errors import BankError, MismatchError
from source_proj.bank.layout import flat_objects, metric_array
from source_proj.sketch import Sketch

D = 6 * 10 + 10 + 10 * 3 + 3


@pytest.fixture(scope="module")
def run():
    return make_adam_run()


@pytest.fixture(scope="module")
def built(run, tmp_path_factory):
    torch.set_num_threads(1)
    return run.build(tmp_path_factory.mktemp("built") / "bank", sampled_fisher=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Of the same run, without metrics."""
    exact = {"sketch": Sketch(dim=D, kind="identity"), "storage": "float32"}
    return make_adam_run("none").build(tmp_path_factory.mktemp("plain") / "bank", **exact)


@pytest.fixture
def copied(built, tmp_path):
    """To be damaged."""
    return shutil.copytree(built.path, tmp_path / "bank")


def all_rows(bank, checkpoint, what="output", metric=None):
    return torch.cat([block.rows for block in bank.stages[0].iter_rows(checkpoint, what, metric)])


@pytest.mark.parametrize(
    ("gradients", "sketch"),
    [
        ("hooks", Sketch(dim=D, kind="identity")),
        ("hooks", Sketch(dim=16, kind="sparse")),
        ("general", Sketch(dim=16, kind="sparse")),
        ("general", Sketch(dim=16, kind="rademacher")),
    ],
)
def test_rows_are_sketches_of_scaled_gradients(run, plain, tmp_path, gradients, sketch):
    """R P^½ ∇o in the own metric, and in those of earlier segments."""
    bank = run.build(tmp_path / "bank", sketch=sketch, storage="float32", gradients=gradients)
    matrix = sketch.matrix(0, D)
    scales = [bank.metrics.scale(metric).diagonal for metric in range(2)]
    for checkpoint, metrics in enumerate([[0], [0], [1, 0], [1, 0]]):
        assert bank.stages[0].metric(checkpoint) == metrics[0]
        for metric in metrics:
            expected = (rows(plain, checkpoint) * scales[metric]) @ matrix.T
            found = all_rows(bank, checkpoint, metric=metric)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert torch.equal(all_rows(bank, checkpoint), all_rows(bank, checkpoint, metric=metrics[0]))
    with pytest.raises(
        ValueError, match=r"checkpoint 0 .* has rows in its own metric 0, and .* checkpoints, \[\]; got 1"
    ):
        bank.stages[0].iter_rows(0, metric=1)


def test_a_metric_is_the_mean_over_its_checkpoints(run, built):
    """P = mean of 1/(√v̂ + ε), v̂ bias-corrected at each one's own step."""
    for metric, group in enumerate([[0, 1], [2, 3]]):
        found = torch.zeros(D, dtype=torch.float64)
        for c in group:
            checkpoint = run.trajectory.stages[0].checkpoints[c]
            v = torch.cat([entry["exp_avg_sq"].flatten() for entry in checkpoint.optimizer_state["state"].values()])
            found += 1 / ((v.double() / (1 - 0.999**checkpoint.step)).sqrt() + 1e-8) / 2
        torch.testing.assert_close(built.metrics.scale(metric).diagonal.double(), found.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradients", ["hooks", "general"])
@pytest.mark.parametrize("kind", ["identity", "tensor"])
def test_rows_of_factored_metrics(tmp_path, kind, gradients):
    """R P^½ ∇o with two vectors in place of each matrix, which is what the bank keeps; crossed as others are."""
    plain = make_adam_run("none").build(tmp_path / "plain", sketch=Sketch(D, "identity"), storage="float32")
    sketch = Sketch(D, kind) if kind == "identity" else Sketch(64, kind)
    run = make_adam_run("factored_per_segment")
    bank = run.build(tmp_path / "bank", sketch=sketch, storage="float32", gradients=gradients)
    assert [len(bank.metrics.scale(metric).values) for metric in range(2)] == [(10 + 6) + 10 + (3 + 10) + 3] * 2
    begins = [0, 60, 70, 100, D]
    shapes = [(10, 6), (10,), (3, 10), (3,)]
    matrix = torch.cat([sketch.matrix(begins[n], begins[n + 1], shape) for n, shape in enumerate(shapes)], dim=1)
    for checkpoint, metrics in enumerate([[0], [0], [1, 0], [1, 0]]):
        for metric in metrics:
            values = bank.metrics.scale(metric).values.split([10, 6, 10, 3, 10, 3])
            whole = [torch.outer(*values[:2]).flatten(), values[2], torch.outer(*values[3:5]).flatten(), values[5]]
            expected = (rows(plain, checkpoint) * torch.cat(whole)) @ matrix.T
            made = all_rows(bank, checkpoint, metric=metric)
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert banks.verify(bank.path).ok


def test_factors_that_were_altered_or_are_of_others_are_refused(tmp_path):
    bank = make_adam_run("factored").build(tmp_path / "bank")
    path, digest = bank.path, bank.metrics.hash(0)
    array = zarr.open_array(path / "metrics" / digest, mode="r+")
    whole = np.asarray(array[...])
    array[...] = whole * np.float32(2)
    with pytest.raises(BankError, match="was altered"):
        banks.open(path).metrics.scale(0)
    shutil.rmtree(path / "metrics" / digest)
    (path / "metrics" / digest).mkdir()
    for key, value in flat_objects(f"metrics/{digest}", metric_array(len(whole) - 1), whole[1:]).items():
        (path / key).write_bytes(value)
    with pytest.raises(BankError, match=r"is not of the bank's parameters: a scale has \(41,\) numbers; .* has 42"):
        banks.Metrics(bank.store, bank.settings).scale(0)
    assert not banks.verify(path).ok


def test_segments_across_factored_metrics_name_the_factored_remedy(tmp_path):
    bank = make_adam_run("factored_per_segment").build(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"joins checkpoints .* or build with preconditioner='factored'$"):
        bank.trajectory.stages[0].cut(1)


@pytest.mark.parametrize("mode", ["shared", "factored"])
def test_a_shared_metric_crosses_nothing(tmp_path, mode):
    bank = make_adam_run(mode).build(tmp_path / "bank", sampled_fisher=1)
    assert len(bank.metrics) == 1
    assert bank.nbytes()["crossings"] == 0
    assert not any("_metric_" in name for name in content(bank.path))


def test_plain_rows_stay_plain(tmp_path):
    plain = make_run(4).build(tmp_path / "plain")
    for mode in ("scalar", "none"):
        bank = make_adam_run(mode).build(tmp_path / mode)
        for checkpoint in range(4):
            assert torch.equal(rows(bank, checkpoint), rows(plain, checkpoint))
        assert not (bank.path / "metrics").exists()


def test_bytes_and_files_are_accounted_for(built):
    assert built.verify().ok
    kinds = built.nbytes()
    assert kinds["metrics"] >= 2 * 4 * D
    assert kinds["crossings"] > 0
    assert kinds["temporary"] == 0


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}, {root!r}]
import torch
torch.set_num_threads(1)
from bank_runs import make_adam_run
from source_proj.bank.read.part import Part
commit, count = Part.commit, []
def killing(self, *arguments):
    if len(count) == {shards}:
        os.kill(os.getpid(), signal.SIGKILL)
    count.append(1)
    commit(self, *arguments)
Part.commit = killing
make_adam_run().build({path!r}, sampled_fisher=1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("shards", [9])  # killed_banks.py kills at all others
def test_a_killed_build_ends_with_the_same_bits(run, built, tmp_path, shards):
    here, path = Path(__file__).parent, tmp_path / "bank"
    script = KILLED.format(here=str(here), root=str(here.parents[1]), path=str(path), shards=shards)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sum(part.done(c).sum() for part in banks.open(path).parts for c in range(4)) == shards
    run.build(path, sampled_fisher=1)
    assert_same(path, built.path)


def test_workers_share_the_crossings(run, built, tmp_path):
    path = tmp_path / "bank"
    for worker in (1, 2, 0):
        run.build(path, sampled_fisher=1, shard=(worker, 3))
    banks.open(path).finalize()
    assert_same(path, built.path)


def test_appended_rows_are_in_the_same_metrics(run, tmp_path):
    bank = run.build(tmp_path / "bank")
    more = make_data(10, seed=1)
    bank.append(run.model, run.task, more, batch_size=BATCH, progress=False)
    assert bank.verify().ok
    other = run.build(tmp_path / "other", data=more)
    for metric in (0, 1):
        assert torch.equal(all_rows(bank, 3, metric=metric)[N:], all_rows(other, 3, metric=metric))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (make_adam_run(seed=1), r"trajectory\.metrics\[0\] is '\w+…' there and '\w+…' here"),
        (make_adam_run("shared"), r"trajectory\..* is .* there and .* here"),
        (make_adam_run("factored_per_segment"), r"trajectory\..* is .* there and .* here"),
        (make_run(4), r"trajectory\..* is .* there and .* here"),
    ],
    ids=["moments", "kind", "factors", "optimizer"],
)
def test_other_metrics_are_refused(built, other, named):
    with pytest.raises(MismatchError, match=named):
        other.build(built.path, sampled_fisher=1)


def test_a_damaged_metric_is_named(copied):
    digest = banks.open(copied).metrics.hash(1)
    array = zarr.open_array(copied / "metrics" / digest, mode="r+")
    values = np.asarray(array[...])
    array[...] = values + np.float32(1)
    assert any("was altered" in problem for problem in banks.verify(copied).problems)
    with pytest.raises(BankError, match="was altered"):
        banks.open(copied).metrics.scale(1)
    (copied / "metrics" / digest / "c.0").write_bytes(b"short")
    with pytest.raises(BankError, match="truncated or altered"):
        banks.open(copied).metrics.scale(1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t["metrics"].pop(), r"stages\[0\].metrics names metric 1, and metrics has 1"),
        (lambda t: t["metrics"].reverse() or t["metrics"].append("x"), r"metrics\[2\] must be 64 hexadecimal digits"),
        (lambda t: t.pop("metrics"), "trajectory lacks 'metrics'"),
        (lambda t: t["stages"][0]["metrics"].pop(), "metrics has 3 entries for 4 checkpoints"),
        (lambda t: t["stages"][0].update(metrics="0011"), "metrics must be a list, got '0011'"),
    ],
)
def test_malformed_metrics_are_refused(copied, change, named):
    group = zarr.open_group(copied, mode="r+")
    settings = group.attrs["settings"]
    change(settings["trajectory"])
    group.attrs["settings"] = settings
    with pytest.raises(BankError, match=named):
        banks.open(copied)
