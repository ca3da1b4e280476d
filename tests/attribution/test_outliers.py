"""One example whose gradient is thousands of times as large as all others' leaves theirs as they are."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution.spectral import response


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["identity", "sparse"])
def test_scores_are_those_of_sums_in_double_precision(tmp_path, factor, storage, kind):
    """Without damping, of a target that is far off, as a sentinel for "missing" is."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 40, generator=generator)
    y = x @ torch.randn(40, 1, generator=generator) + 0.3 * torch.randn(60, 1, generator=generator)
    y[3] *= factor
    model = nn.Linear(40, 1, bias=False)
    nn.init.normal_(model.weight, std=0.1, generator=generator)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=100, lr=0.02)])
    sketch = sp.Sketch(40, kind="identity") if kind == "identity" else sp.Sketch(32, kind="sparse")
    options = {"sketch": sketch, "storage": storage, "progress": False}
    bank = sp.build(model, sp.Regression("squared"), run, TensorDataset(x, y), tmp_path / "bank", **options)
    source = sp.Source(bank, model=model, damping=None, curvature="empirical_fisher", progress=False)
    queries = TensorDataset(torch.randn(5, 40, generator=generator), torch.randn(5, 1, generator=generator))
    found = torch.from_numpy(source.score(queries).to_numpy()).double()
    blocks = list(bank.stages[0].iter_encoded(0))
    codes = torch.cat([block.rows.double() for block in blocks])
    scale = torch.cat([block.d1.double() * (1 if block.scale is None else block.scale.double()) for block in blocks])
    gradients = codes * scale[:, None]
    values, vectors = torch.linalg.eigh(gradients.T @ gradients / 60)
    (cut,) = bank.stages[0].record.cut(1)
    query = source.sketch(queries)[0].at(bank.final_checkpoint(), bank.metrics.hash(0)).double()
    applied = (vectors * response(cut.time, 0.0, 0.0)(values.clamp(min=0))) @ vectors.T
    expected = -query @ applied @ gradients.T / 60
    others = torch.arange(60) != 3
    error = (found - expected)[:, others].abs().max() / expected[:, others].abs().max()
    assert float(error) < 1e-4
