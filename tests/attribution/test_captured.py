"""Attribution on rows that were captured in training: what takes them, and what is refused by name."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, labels = torch.randn(20, 4), torch.randint(3, (20,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sp.Recorder(
        model, optimizer, tmp_path_factory.mktemp("run"), every=5, capture=sp.Sketch(32), task=sp.Classification(),
        segment_ends=[10],
    )  # fmt: skip
    for _ in range(20):
        index = torch.randperm(20)[:8]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[index]), labels[index]).backward()
        optimizer.step()
        recorder.step(ids=index)
    return model, TensorDataset(inputs, labels), recorder.bank(storage="float32")


def test_scores_are_those_of_the_formula(captured):
    """From the rows and matrices themselves, two segments, without the library's fits."""
    model, data, bank = captured
    source = sp.Source(bank, model=model, progress=False)
    features = source.sketch(data)
    query = source._query(bank, features[0]).double()
    assert len(features[0].rows) == len(bank.query_points()) == 4
    stage, cuts = bank.stages[0], bank.stages[0].record.cut()
    total = torch.zeros(20, 20, dtype=torch.float64)
    later = torch.eye(32, dtype=torch.float64)
    for segment in (1, 0):
        hessian = stage.captured_curvature(segment)[0].double()
        time, damping = cuts[segment].time, float(hessian.trace()) / 32
        values, vectors = torch.linalg.eigh(hessian)
        x = values.clamp(min=0) + damping
        response = (vectors * (-torch.expm1(-time * x) / x)) @ vectors.T
        rows = torch.cat([block.rows for block in stage.iter_rows(segment)]).double()
        total -= query @ later @ response @ rows.T / 20
        later = later @ ((vectors * torch.exp(-time * values.clamp(min=0))) @ vectors.T)
    scores = torch.from_numpy(source.score(data).to_numpy()).double()
    assert torch.allclose(scores, total, rtol=1e-4, atol=1e-6 * float(total.abs().max()))
    parts = source.by_segment(features)
    assert torch.allclose(
        torch.from_numpy(parts.total().to_numpy()).double(), total, atol=1e-5 * float(total.abs().max())
    )
    assert source.self_influence().shape == (20,)


def test_what_needs_more_than_the_sums_is_refused(captured):
    model, data, bank = captured
    for make in (sp.TracIn, sp.Trak, sp.GradDot, sp.GradCos, sp.InfluenceFunction, sp.ArnoldiInfluence, sp.DataInf):
        with pytest.raises(ValueError, match=f"{make.__name__} needs gradients at a checkpoint"):
            make(bank, model=model)
    for curvature in ("gauss_newton", "sampled_fisher"):
        with pytest.raises(ValueError, match=f"{curvature}' can't be had of rows of whole segments"):
            sp.Source(bank, model=model, curvature=curvature).fit()
    with pytest.raises(ValueError, match="can't be joined"):
        sp.Source(bank, model=model, segments=[[0, 1]]).fit()
    with pytest.raises(sp.BankError, match="none can be appended"):
        bank.append(model, sp.Classification(), data)
    assert sp.Hydra(bank, model=model, progress=False).score(data).to_numpy().shape == (20, 20)


def test_regression_takes_the_curvature_that_was_captured(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = sp.Recorder(model, optimizer, tmp_path / "run", capture=sp.Sketch(8), task=sp.Regression())
    inputs, targets = torch.randn(6, 3), torch.randn(6, 1)
    nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
    recorder.step(ids=range(6))
    assert sp.Source(recorder.bank(), model=model).curvature == "empirical_fisher"


def test_damage_to_the_curvature_is_named(captured, tmp_path):
    import shutil

    _, _, bank = captured
    shutil.copytree(bank.path, tmp_path / "bank")
    (digest, *_) = bank.trajectory.curvatures
    file = next(iter((tmp_path / "bank" / "curvature" / digest).glob("c*")))
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    damaged = sp.open(tmp_path / "bank")
    assert any(digest in problem for problem in damaged.verify().problems)
    with pytest.raises(sp.BankError, match="altered"):
        damaged.stages[0].captured_curvature(0)[0]
