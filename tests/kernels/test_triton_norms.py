"""Sums of normalisations in the interpreter or on a GPU: those that torch makes of the normalised input."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import source_proj as sp
from source_proj.gradients import ParameterSpace, gradient_engine
from source_proj.kernels import norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = (torch.float32, torch.float16, torch.bfloat16)

pytest.importorskip("triton")
triton_norms = importlib.import_module("source_proj.kernels.triton_norms")


def pair(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return [(3 * torch.randn(shape, generator=generator) + 1).to(DEVICE, dtype) for _ in range(2)]


def close(found, expected):
    for got, right in zip(found, expected, strict=True):
        assert (got.double() - right).norm() <= 1e-6 * right.norm() + 1e-6


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("batch", "rows", "width"), [(3, 20, 5), (1, 1, 300), (2, 33, 768)])
def test_along_rows(batch, rows, width, centred, dtype):
    x, g = pair(batch, rows, width, dtype=dtype)
    wide, of_output = x.double(), g.double()
    normal = F.layer_norm(wide, [width], eps=1e-3) if centred else F.rms_norm(wide, [width], eps=1e-3)
    found = triton_norms.row_sums_triton(x, g, 1e-3, centred=centred)
    close(found, [(normal * of_output).sum(1), of_output.sum(1)])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("batch", "channels", "positions"), [(3, 7, 33), (1, 1, 1), (2, 70, 100), (5, 3, 5000)])
def test_of_channels(batch, channels, positions, dtype):
    x, g = pair(batch, channels, positions, dtype=dtype)
    mean, scale = (one[0] for one in pair(1, channels))
    found = triton_norms.channel_sums_triton(x, g, mean, scale)
    normal = (x.double() - mean[:, None]) * scale[:, None]
    close(found, [(normal * g.double()).sum(2), g.double().sum(2)])


@pytest.mark.parametrize("module", [
    torch.nn.LayerNorm((4, 5)), torch.nn.RMSNorm(5), torch.nn.RMSNorm((4, 5), eps=1e-2), torch.nn.BatchNorm2d(3),
], ids=str)  # fmt: skip
def test_rules_ask_for_them(module, monkeypatch):
    """The rows of a model whose norms the kernels sum are those of torch's own sums."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), module, torch.nn.Flatten(), torch.nn.Linear(60, 4)).eval()
    model = model.to(DEVICE)
    batch = (torch.randn(6, 2, 5, 6, device=DEVICE), torch.arange(6, device=DEVICE) % 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))

    expected, served = rows_of(model, batch), []
    monkeypatch.setattr(norms, "_has_kernel", lambda x: served.append(x.shape) or True)
    found = rows_of(model, batch)
    assert served
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def rows_of(model, batch):
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, sp.Sketch(space.size, "identity"), method="hooks")
    return engine.sketch(sp.Classification().output, batch)[1]
