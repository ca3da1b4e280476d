import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from source_proj.bank.quantize import STORAGES, decode, encode, has_scale

ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(-(2.0**120), 2.0**120, width=32),
)


def round_trip(rows: torch.Tensor, storage: str) -> torch.Tensor:
    values, scale = encode(rows, storage)
    return decode(values.numpy(), None if scale is None else scale.numpy())


@given(ROWS)
def test_int8_errs_by_half_a_scale(array):
    rows = torch.from_numpy(array)
    values, scale = encode(rows, "int8")
    assert values.dtype == torch.int8
    assert values.min() >= -127
    error = (decode(values.numpy(), scale.numpy()) - rows).abs().amax(dim=1)
    # Half a scale, and the rounding of scale, quotient and product (127 of each at most).
    bound = rows.abs().amax(dim=1).double() / 127 * (0.5 + 127 * 3 * 2.0**-24)
    assert (error <= bound.clamp(min=2e-36)).all()


@given(ROWS)
def test_float16_errs_by_eleven_bits(array):
    rows = torch.from_numpy(array)
    values, scale = encode(rows, "float16")
    assert values.dtype == torch.float16
    assert torch.isfinite(values).all()
    error = (decode(values.numpy(), scale.numpy()) - rows).abs().double()
    largest = rows.abs().amax(dim=1, keepdim=True).double().clamp(min=2.0**-112)  # below, scales have no smaller value
    assert (error <= torch.maximum(rows.abs().double() * 2.0**-11, largest * 2.0**-39)).all()


@given(ROWS)
def test_float32_is_kept(array):
    values, scale = encode(torch.from_numpy(array), "float32")
    assert scale is None
    assert decode(values.numpy(), None).numpy().tobytes() == array.tobytes()


def test_halves_round_to_even_and_zero_rows_stay_zero():
    rows = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]])
    values, scale = encode(rows, "int8")
    assert values.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("storage", ["int8", "float16"])
@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1.0, 1e12])
def test_the_size_of_a_row_costs_no_accuracy(storage, factor):
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * factor
    bound = {"int8": 0.5 / 127, "float16": 2.0**-11}[storage]
    error = (round_trip(rows, storage) - rows).abs().amax(dim=1) / rows.abs().amax(dim=1)
    assert (error <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_batches_are_encoded_row_by_row(storage):
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    whole, scales = encode(rows, storage)
    for i in range(6):
        value, scale = encode(rows[i : i + 1], storage)
        assert torch.equal(value[0], whole[i])
        assert (scales is None and scale is None) or scale[0] == scales[i]
    assert has_scale(storage) == (scales is not None)


@pytest.mark.parametrize("storage", STORAGES)
def test_decoded_rows_belong_to_the_caller(storage):
    values, scale = encode(torch.ones(2, 3), storage)
    kept = values.clone()
    decode(values.numpy(), None if scale is None else scale.numpy()).zero_()
    assert torch.equal(values, kept)
