"""DataInf's closed form against one inverse an example."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from source_proj.attribution.methods.data_inf import shares_along


@settings(max_examples=40)
@given(
    n=st.integers(1, 20),
    dim=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    ridge=st.sampled_from([1e-4, 0.1, 30.0]),
    shape=st.sampled_from(["normal", "parallel", "some are zero", "heavy tails"]),
)
def test_the_closed_form_is_the_mean_of_inverses(n, dim, seed, ridge, shape):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, dim, generator=draw)
    if shape == "parallel":
        rows = torch.randn(n, 1, generator=draw) * rows[:1]
    elif shape == "some are zero":
        rows[::2] = 0
    elif shape == "heavy tails":
        rows = rows**5
    queries = torch.randn(3, dim, generator=draw, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)
    exact = rows.double()
    expected = queries @ sum(torch.linalg.inv(torch.outer(a, a) + ridge * eye) for a in exact) / n
    blocks = iter(rows.split(7))
    found = (queries - shares_along(queries, blocks, ridge) / n) / ridge
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 / ridge)


@pytest.mark.parametrize("rows", [1023, 1024, 1025, 2049])
def test_rows_are_counted_once_however_they_are_cut(rows):
    blocks = torch.randn(rows, 3)
    queries = torch.randn(2, 3, dtype=torch.float64)
    whole = shares_along(queries, [blocks], 0.5)
    torch.testing.assert_close(shares_along(queries, blocks.split(100), 0.5), whole)
