"""What a CPU computes, a GPU computes too: banks, scores and searches; and halves lose no more than they must."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.gradients import ParameterSpace, gradient_engine

N, K = 60, 256

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter


class Small(nn.Module):
    """A convolution, layers over positions, normalisations and a head."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.mixed, self.after = nn.Linear(16, 24), nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.convolution(x)))
        x = self.after(torch.tanh(self.mixed(x.flatten(2))))
        return self.head(x.mean(1))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    train, queries = (TensorDataset(torch.randn(n, 2, 4, 4), torch.randint(0, 5, (n,))) for n in (N, 9))
    model = Small()
    checkpoints = []
    for step in (10, 20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        checkpoints.append(sp.Checkpoint({k: v.clone() for k, v in model.state_dict().items()}, step, lr=0.1))
    return model, sp.Trajectory(checkpoints, segments=2), train, queries


def build(problem, path, **options):
    model, trajectory, train, _ = problem
    sketch = sp.Sketch(K, seed=3)
    return sp.build(model, sp.Classification(), trajectory, train, path, sketch=sketch, progress=False, **options)


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("marked", [pytest.param(None, marks=gpu)])
def test_a_bank_of_a_gpu_gives_the_scores_of_a_cpu(problem, tmp_path, storage, marked):
    here = build(problem, tmp_path / "here", storage=storage)
    there = build(problem, tmp_path / "there", storage=storage, device="cuda")
    model, queries = problem[0], problem[3]
    expected = sp.Source(here, model=model, progress=False).score(queries).values
    # Rounding moves a few numbers from one of 255 values to the next.
    tolerance = {"float32": 1e-4, "int8": 1e-2}[storage] * abs(expected).max()
    for bank, device in ((there, "cpu"), (here, "cuda"), (there, "cuda")):
        found = sp.Source(bank, model=model, progress=False, device=device)
        assert abs(found.score(queries).values - expected).max() <= tolerance
        strongest = found.top_k(queries, 5)
        for row, indices in zip(expected, strongest.indices, strict=True):
            assert abs(row[indices] - sorted(row)[::-1][:5]).max() <= 2 * tolerance


def rows(model, batch, backend, autocast, device):
    space = ParameterSpace.from_model(model.to(device))
    sketch = sp.Sketch(K, seed=3, backend=backend)
    engine = gradient_engine(model, space, sketch, method="hooks", autocast=autocast)
    batch = tuple(one.to(device) for one in batch)
    return engine.sketch(sp.Classification().output, batch)[1].cpu()


@pytest.mark.parametrize("autocast", ["bfloat16", None])
def test_halves_go_to_the_gpus_sketch_as_they_are(problem, autocast):
    pytest.importorskip("triton")
    model, batch = problem[0], tuple(one[:7] for one in problem[3].tensors)
    expected = rows(model, batch, "torch", None, "cpu")
    found = rows(model, batch, "triton", autocast, DEVICE)
    # Halves have 8 bits of mantissa, and some roundings follow one another.
    assert (found - expected).norm() <= (0.05 if autocast else 1e-5) * expected.norm()
    assert not autocast or not torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_two_devices_has_the_rows_of_one(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    data = torch.utils.data.TensorDataset(torch.randn(11, 6), torch.arange(11) % 3)
    options = {"sketch": sp.Sketch(dim=64), "batch_size": 4, "storage": "float32", "parameters": ["*"]}
    options |= {"progress": False, "gradients": "hooks"}
    whole = sp.build(model, sp.Classification(), run, data, tmp_path / "whole", **options)
    places = {"0": 0, "1": 0, "2": "cpu", "3": "cpu"}
    spread = accelerate.dispatch_model(model, places, main_device=0, force_hooks=True)
    bank = sp.build(spread, sp.Classification(), run, data, tmp_path / "bank", **options)
    rows, expected = (torch.cat([b.rows for b in each.stages[0].iter_rows(0)]) for each in (bank, whole))
    assert (rows - expected).norm() <= 1e-5 * expected.norm()
