"""Laws of every codec, and what each one says of its own error."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from source_proj._errors import GradientError
from source_proj.bank.codecs import Codec, EncodedRows, codec_names, find_codec
from source_proj.bank.codecs.lloyd_max import LloydMax
from source_proj.bank.format import storage_of
from source_proj.bank.layout import ArraySpec
from source_proj.kernels.scoring import Strongest
from source_proj.sketch import Sketch

CODECS = [find_codec(name) for name in codec_names()]
ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(-(2.0**120), 2.0**120, width=32),
)


def int8_bound(rows):
    # Half a scale, and the rounding of scale, quotient and product (127 of each at most).
    largest = rows.abs().amax(dim=1, keepdim=True)
    return (largest / 127 * (0.5 + 127 * 3 * 2.0**-24)).clamp(min=2e-36).expand_as(rows)


def float16_bound(rows):
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-112)  # below, scales have no smaller value
    return torch.maximum(rows.abs() * 2.0**-11, largest * 2.0**-39)


def lloyd_max_bound(codec, rows):
    """|x| tan(c, y): an angle that no rotated row of k numbers exceeds, whatever they are; see the comments."""
    k, levels = rows.shape[1], codec.levels
    # <c, y> >= levels[0] |y|_1 >= levels[0] |y|, and |c| <= levels[-1] sqrt(k).
    cosine = levels[0] / (levels[-1] * k**0.5)
    # Where rms(y) is 1 no entry is above sqrt(k), and |c - y| is at most half a gap below the last level.
    gaps = [2 * levels[0], *(b - a for a, b in pairwise(levels))]
    sine = max(max(gaps) / 2, levels[0], k**0.5 - levels[-1])
    tangent = min((1 / cosine**2 - 1) ** 0.5, sine / (1 - sine**2) ** 0.5 if sine < 1 else torch.inf)
    size = rows.norm(dim=1, keepdim=True)
    return (size * (tangent + 1e-5)).clamp(min=2e-36 * k**0.5).expand_as(rows)


BOUNDS = {
    "int8": int8_bound,
    "float16": float16_bound,
    "float32": torch.zeros_like,
    **{codec.name: partial(lloyd_max_bound, codec) for codec in CODECS if isinstance(codec, LloydMax)},
}
"""What the docstring of each codec says an entry errs by at most, of rows in float64."""

every_codec = pytest.mark.parametrize("codec", CODECS, ids=codec_names())


def random_rows(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def round_trip(codec: Codec, rows):
    return codec.decode(*codec.encode(rows), rows.shape[1])


def test_every_codec_has_a_bound():
    assert set(BOUNDS) == set(codec_names())


@every_codec
@given(ROWS)
def test_an_entry_errs_by_no_more_than_is_said(codec, array):
    rows = torch.from_numpy(array)
    error = (round_trip(codec, rows).double() - rows.double()).abs()
    assert (error <= BOUNDS[codec.name](rows.double())).all()


@every_codec
@given(ROWS)
def test_codes_are_as_the_codec_declares_them(codec, array):
    n, k = array.shape
    codes, scale = codec.encode(torch.from_numpy(array))
    assert codes.dtype == codec.dtype
    assert codes.shape == (n, codec.width(k))
    assert codes.nbytes == n * codec.row_bytes(k)
    assert (scale is not None) == codec.has_scale
    assert codec.nbytes(n, k) == codes.nbytes + (0 if scale is None else scale.nbytes)
    if codes.is_floating_point():
        assert torch.isfinite(codes).all()
    empty = codec.empty(n, k)
    assert (empty.codes.shape, empty.codes.dtype) == (codes.shape, codes.dtype)
    assert (empty.scale is None) == (scale is None)


@every_codec
def test_what_was_never_written_is_told_from_rows(codec):
    """By the fill value of the codes, or where any byte can be a code, by that of the scales."""
    codes, scale = codec.encode(random_rows(50, 20))
    fill = ArraySpec((50, codec.width(20)), codec.array_type, 50).fill_value
    missing = torch.full_like(codes, fill)
    if scale is not None:
        assert torch.isfinite(scale).all()
        scale = torch.full_like(scale, ArraySpec((50,), "float32", 50).fill_value)
    assert not torch.isfinite(codec.decode(missing, scale, 20)).any()
    if codes.dtype != torch.uint8:
        assert not (codes == fill).any()


@every_codec
def test_zarr_knows_the_type(codec):
    array = zarr.create_array({}, shape=(2, 3), dtype=codec.array_type)
    assert array[...].dtype == codec.encode(torch.ones(2, 3)).codes.numpy().dtype


@every_codec
def test_batches_are_encoded_row_by_row(codec):
    rows = random_rows(6, 5)
    whole = codec.encode(rows)
    known = codec.encode(rows, codec.row_sizes(rows))
    for i in range(6):
        codes, scale = codec.encode(rows[i : i + 1])
        assert torch.equal(codes[0], whole.codes[i])
        assert torch.equal(codes[0], known.codes[i])
        assert (scale is None and whole.scale is None) or scale[0] == whole.scale[i] == known.scale[i]


@every_codec
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("known", [False, True])
def test_a_row_that_is_not_finite_is_refused_by_name(codec, wrong, known):
    rows = random_rows(40, 7)
    rows[17, 3] = rows[39, 6] = wrong
    with pytest.raises(GradientError, match=rf"rows \[17, 39\] of the 40 to be stored as {codec.name}"):
        codec.encode(rows, codec.row_sizes(rows) if known else None)
    codec.encode(rows[:17])


@every_codec
def test_decoded_rows_belong_to_the_caller(codec):
    codes, scale = codec.encode(torch.ones(2, 3))
    kept = codes.clone()
    codec.decode(codes, scale, 3).zero_()
    assert torch.equal(codes, kept)


@every_codec
def test_products_are_those_of_the_decoded_rows(codec):
    rows, queries = random_rows(40, 24), random_rows(3, 24, seed=1)
    encoded = codec.encode(rows)
    decoded = codec.decode(*encoded, 24)
    exact = queries.double() @ decoded.double().T
    bound = 40 * torch.finfo(torch.float32).eps * (queries.abs().double() @ decoded.abs().double().T)
    products = codec.multiply(queries, *encoded)
    assert ((products.double() - exact).abs() <= bound).all()
    strongest = Strongest(3, 5)
    for start in (0, 15):
        stop = 15 if start == 0 else 40
        part = EncodedRows(encoded.codes[start:stop], None if encoded.scale is None else encoded.scale[start:stop])
        codec.search(strongest, queries, *part, first=start)
    values, places = strongest.result()
    assert ((values - products.gather(1, places)).abs() <= bound.gather(1, places)).all()
    assert (values[:, -1:] >= products.topk(6).values[:, 5:] - bound.amax()).all()


@every_codec
@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1.0, 1e12])
def test_the_size_of_a_row_costs_no_accuracy(codec, factor):
    rows = random_rows(4, 64)
    largest = rows.abs().amax()
    plain = BOUNDS[codec.name](rows.double()).amax() / largest  # of the largest entry, at size 1
    error = (round_trip(codec, rows * factor) - rows * factor).abs().amax(dim=1) / (rows * factor).abs().amax(dim=1)
    assert (error <= plain * (1 + 1e-4)).all()


@every_codec
@pytest.mark.parametrize("power", [-90, -3, 1, 100])
def test_powers_of_two_change_the_scale_alone(codec, power):
    rows = random_rows(5, 19)
    codes, scale = codec.encode(rows)
    others, scaled = codec.encode(rows * 2.0**power)
    factor = 2.0**power if scale is None else 1
    assert torch.equal(others.double(), codes.double() * factor)
    assert scale is None or torch.equal(scaled, scale * 2.0**power)


@every_codec
def test_decoded_rows_are_encoded_to_themselves(codec):
    once = round_trip(codec, random_rows(20, 75))
    torch.testing.assert_close(round_trip(codec, once), once, rtol=2e-6, atol=2e-6)


@every_codec
def test_rows_of_zeros_stay_zero(codec):
    rows = random_rows(3, 21)
    rows[1] = 0
    assert (round_trip(codec, rows)[1] == 0).all()
    assert (round_trip(codec, rows)[0] != 0).any()


def test_halves_round_to_even_and_zero_rows_stay_zero():
    codes, scale = find_codec("int8").encode(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0]


def test_names_are_listed_by_bytes_and_others_refused():
    assert [find_codec(name).name for name in codec_names()] == list(codec_names())
    sizes = [find_codec(name).row_bytes(4096) for name in codec_names()]
    assert sizes == sorted(sizes)
    for name in ("int3", "float64", None, ["int8"], ""):
        with pytest.raises(ValueError, match="storage must be one of int1, int2, int4, int8, float16, float32, got"):
            find_codec(name)


@given(st.integers(1, 1 << 15), st.sampled_from(["tensor", "sparse", "rademacher", "kronecker"]))
def test_by_default_rows_have_the_most_bits_that_fit_into_4096_bytes(k, kind):
    """Of int8, int4 and int2; two bits where none does."""
    chosen, room = find_codec(storage_of(None, Sketch(k, kind).spec(), k + 1)), 4096
    fitting = [codec for codec in map(find_codec, ("int8", "int4", "int2")) if codec.row_bytes(k) <= room]
    assert chosen is (fitting[0] if fitting else find_codec("int2"))


@given(st.integers(1, 1 << 15), st.integers(0, 1 << 15))
def test_rows_without_a_projection_to_less_are_int8_by_default_and_a_name_is_taken_as_it_is(d, more):
    assert storage_of(None, Sketch(d, "identity").spec(), d) == "int8"
    assert storage_of(None, Sketch(d + more).spec(), d) == "int8"
    assert [storage_of(name, Sketch(1 << 14).spec(), d) for name in codec_names()] == list(codec_names())
