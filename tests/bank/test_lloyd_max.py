"""Codes of 4, 2 and 1 bits: their levels, packing and scale against plain definitions, and theory's error."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from bank_runs import N, make_data, make_run

from source_proj import bank as banks
from source_proj._errors import GradientError
from source_proj.bank.codecs import Int1, Int2, Int4
from source_proj.bank.read import stage_bank
from source_proj.kernels.rotation import rotate
from source_proj.sketch import Sketch
from source_proj.task import Task

DISTORTION = {"int4": 0.00950, "int2": 0.1175, "int1": 0.3634}
"""Mean squared error of the best levels for a standard normal (Max 1960, table I)."""


@pytest.fixture(scope="module")
def run():
    return make_run()


every_codec = pytest.mark.parametrize("codec", [Int4(), Int2(), Int1()], ids=lambda codec: codec.name)


def normal_rows(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def round_trip(codec, rows):
    return codec.decode(*codec.encode(rows), rows.shape[1])


def moments(a, b):
    """Probability and first moment of a standard normal between a and b."""
    density = [math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi) if math.isfinite(t) else 0.0 for t in (a, b)]
    return (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2, density[0] - density[1]


@every_codec
def test_levels_are_the_means_of_their_cells(codec):
    """Lloyd's and Max's condition; with it the error is 1 - E level²."""
    levels = [*(-level for level in reversed(codec.levels)), *codec.levels]
    assert len(levels) == 2**codec.bits
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    cells = [moments(*edges[i : i + 2]) for i in range(len(levels))]
    np.testing.assert_allclose([first / mass for mass, first in cells], levels, atol=1e-6)
    error = 1 - sum(mass * level**2 for (mass, _), level in zip(cells, levels, strict=True))
    assert error == pytest.approx(DISTORTION[codec.name], rel=1e-3)


@every_codec
@pytest.mark.parametrize("k", [1, 5, 16, 33])
def test_codes_are_those_of_the_definition(codec, k):
    rows = normal_rows(6, k, seed=k)
    levels = np.array([*(-level for level in reversed(codec.levels)), *codec.levels])
    codes, scale = codec.encode(rows)
    for row, packed, factor in zip(rotate(rows).double().numpy(), codes.numpy(), scale.numpy(), strict=True):
        number = int.from_bytes(packed.tobytes(), "little")
        chosen = [number >> codec.bits * j & 2**codec.bits - 1 for j in range(k)]
        assert number >> codec.bits * k == 0
        wanted = np.abs(row[:, None] / np.sqrt(np.mean(row**2)) - levels).argmin(1)
        np.testing.assert_array_equal(chosen, wanted)
        assert factor == pytest.approx(row @ row / (levels[chosen] @ row), rel=1e-6)


@every_codec
def test_the_error_of_normal_rows_is_theory_s(codec):
    """D / (1 - D) with the unbiased scale, and D at the best scale; within five standard errors."""
    rows = normal_rows(100, 4096)
    decoded = round_trip(codec, rows)
    distortion = DISTORTION[codec.name]
    relative = ((decoded - rows) ** 2).sum(1) / (rows**2).sum(1)
    tolerance = 5 * float(relative.std()) / 10 + 2e-3 * distortion  # and the table's digits
    assert float(relative.mean()) == pytest.approx(distortion / (1 - distortion), abs=tolerance)
    cosine = (decoded * rows).sum(1) ** 2 / ((decoded**2).sum(1) * (rows**2).sum(1))
    assert float(1 - cosine.mean()) == pytest.approx(distortion, abs=tolerance)


def odd_rows(n, k):
    """Rows that are no normal's: few entries, heavy tails, a common sign, one value."""
    normal, generator = normal_rows(n, k), torch.Generator().manual_seed(1)
    return {
        "normal": normal,
        "sparse": normal * (torch.rand(n, k, generator=generator) < 3 / k),
        "heavy": normal**5,
        "positive": normal.abs(),
        "one entry": torch.eye(k).repeat(-(-n // k), 1)[:n],
        "constant": torch.ones(n, k) * torch.arange(1, n + 1)[:, None],
    }


@every_codec
@pytest.mark.parametrize("kind", odd_rows(1, 4))
@pytest.mark.parametrize("k", [20, 256, 1001])
def test_a_row_s_product_with_itself_is_kept(codec, k, kind):
    rows = odd_rows(30, k)[kind]
    products, sizes = (round_trip(codec, rows).double() * rows).sum(1), (rows.double() ** 2).sum(1)
    torch.testing.assert_close(products, sizes, rtol=2e-6, atol=0)


@every_codec
@pytest.mark.parametrize("kind", ["sparse", "heavy", "positive", "one entry", "constant"])
def test_no_kind_of_row_errs_much_more_than_normal_ones(codec, kind):
    rows = odd_rows(200, 1000)[kind]
    rows = rows[rows.abs().amax(1) > 0]
    relative = ((round_trip(codec, rows) - rows) ** 2).sum(1) / (rows**2).sum(1)
    assert relative.mean() <= 2 * DISTORTION[codec.name] / (1 - DISTORTION[codec.name])


def slope(products, exact):
    """Of products regressed on exact ones, and its standard error whatever the errors' sizes."""
    found = (products * exact).sum() / (exact**2).sum()
    error = (((products - found * exact) * exact) ** 2).sum().sqrt() / (exact**2).sum()
    return float(found), float(error)


@every_codec
@pytest.mark.parametrize("k", [64, 96])
def test_products_with_an_exact_query_are_unbiased(codec, k):
    """In the mean over rows of every direction, to five standard errors; by least squares they are off by more."""
    rows, query = normal_rows(20_000, k), normal_rows(1, k, seed=2)
    encoded = codec.encode(rows)
    exact, products = (rows @ query[0]).double(), codec.multiply(query, *encoded)[0].double()
    found, error = slope(products, exact)
    assert abs(found - 1) <= 5 * error
    bias = (products - exact).mean() / (products - exact).std()
    assert abs(bias) * math.sqrt(len(rows)) <= 5
    least = products * (1 - DISTORTION[codec.name])
    found, error = slope(least, exact)
    assert abs(found - 1) > 5 * error


@every_codec
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e30, 3e38])
def test_sizes_at_the_ends_of_float32_give_finite_rows(codec, size):
    rows = normal_rows(4, 30)
    rows *= size / rows.abs().amax(1, keepdim=True)
    codes, scale = codec.encode(rows)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(codec.multiply(normal_rows(2, 30, seed=1) * 1e-6, codes, scale)).all()
    assert (scale == 0).all() == (size < 1e-36)


@every_codec
def test_banks_are_built_verified_appended_and_read(run, codec, tmp_path):
    """k = 21 fills no whole number of bytes."""
    sketch = Sketch(dim=21, seed=1)
    exact = run.build(tmp_path / "exact", sketch=sketch, storage="float32")
    bank = run.build(tmp_path / "bank", sketch=sketch, storage=codec.name)
    for each in (exact, bank):
        each.append(run.model, run.task, make_data(11, seed=3), ids=range(N, N + 11), batch_size=8, progress=False)
    bank = banks.open(tmp_path / "bank")
    assert bank.verify().ok
    for decoded, plain in zip(bank.stages[0].iter_rows(1), exact.stages[0].iter_rows(1), strict=True):
        assert torch.equal(decoded.rows, round_trip(codec, plain.rows))


@pytest.mark.parametrize("what", ["output", "sampled_fisher"])
def test_a_shard_of_many_numbers_is_decoded_in_parts(what, run, tmp_path, monkeypatch):
    bank = run.build(tmp_path / "bank", storage="int2", sampled_fisher=2, sketch=Sketch(dim=20, seed=5))
    whole = list(bank.stages[0].iter_rows(1, what))
    monkeypatch.setattr(stage_bank, "DECODED_NUMBERS", 7 * 20 + 3)
    parts = list(bank.stages[0].iter_rows(1, what))
    assert max(len(part.rows) for part in parts) == 7
    assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
    assert all(part.stop - part.start == len(part.rows) == len(part.d1) for part in parts)
    for name in ("rows", "d1") if what == "sampled_fisher" else ("rows", "d1", "d2"):
        assert torch.equal(*(torch.cat([getattr(block, name) for block in blocks]) for blocks in (whole, parts)))


@every_codec
def test_rows_that_are_not_finite_are_refused(run, codec, tmp_path):
    def poisoned(model, batch):
        output = model(batch[0])[:, 0]
        return output * torch.where(torch.arange(len(output)) == 5, torch.nan, 1.0)

    with pytest.raises(GradientError, match="5"):
        run.build(tmp_path / "bank", storage=codec.name, task=Task(poisoned, lambda o, _: (torch.ones_like(o), None)))
