"""Gram matrices of stored rows on every backend, against a plain product in float64."""

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scoring_backends import native

from source_proj.kernels import gram
from source_proj.kernels.gram import HEIGHT, gram_panels, mirrored, packed, packed_size, unpacked, upper_panels
from source_proj.kernels.native import native_library

EPS = torch.finfo(torch.float32).eps
BACKENDS = [
    pytest.param("torch", None, id="torch"),
    *(pytest.param("native", level, id=f"native-{level}", marks=native) for level in (0, 1, 2)),
]
TYPES = (torch.float32, torch.float16, torch.int8)


def stored(n, dim, dtype, seed=0):
    """Rows of a type, whose sizes differ by orders of magnitude as losses do, and their factors."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        rows = torch.randint(-127, 128, (n, dim), generator=generator, dtype=torch.int8)
    else:
        rows = torch.randn(n, dim, generator=generator).to(dtype)
    return rows, torch.randn(n, generator=generator).mul(3).exp()


def naive(rows, factor):
    plain = rows.double() if factor is None else rows.double() * factor.double()[:, None]
    return plain.T @ plain, plain.abs().T @ plain.abs()


def assert_equal_to_rounding(panels, rows, factor):
    """An entry errs by at most what n + 2 roundings of float32 make of the sum of its terms' sizes."""
    exact, sizes = naive(rows, factor)
    error = (mirrored(panels).double() - exact).abs()
    assert bool((error <= (len(rows) + 2) * EPS * sizes).all())


@pytest.mark.parametrize(("backend", "level"), BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "dim"), [(0, 3), (1, 1), (7, 5), (3, 191), (129, 193), (127, 384), (130, 385), (260, 601), (40, 1000)]
)
def test_a_gram_matrix_is_the_product(backend, level, dtype, weighted, n, dim, at_level):
    at_level(level)
    rows, factor = stored(n, dim, dtype)
    factor = factor if weighted else None
    panels = gram_panels(rows, factor, backend=backend)
    assert [panel.shape for panel in panels] == [
        (min(HEIGHT, dim - start), dim - start) for start in range(0, dim, HEIGHT)
    ]
    assert_equal_to_rounding(panels, rows, factor)


@settings(max_examples=25)
@given(n=st.integers(1, 300), dim=st.integers(1, 420), dtype=st.sampled_from(TYPES), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=native)])
def test_any_shape(backend, n, dim, dtype, seed):
    rows, factor = stored(n, dim, dtype, seed)
    assert_equal_to_rounding(gram_panels(rows, factor, backend=backend), rows, factor)


@native
@pytest.mark.parametrize("level", [0, 1, 2])
def test_small_integers_are_exact(level, at_level):
    """Sums below 2^24 are exact in any order: whatever is missing, or counted twice, is seen."""
    at_level(level)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-3, 4, (1000, 450), generator=generator, dtype=torch.int8)
    factor = 2.0 ** torch.randint(-1, 2, (1000,), generator=generator)
    assert torch.equal(mirrored(gram_panels(rows, factor, backend="native")).double(), naive(rows, factor)[0])


@native
def test_bits_do_not_depend_on_threads_or_neighbours():
    rows, factor = stored(300, 700, torch.int8)
    alone = mirrored(gram_panels(rows, factor))
    torch.set_num_threads(3)  # the fixture of these tests sets it back
    assert torch.equal(mirrored(gram_panels(rows, factor)), alone)
    some = torch.tensor([0, 5, 191, 192, 400, 699])
    assert torch.equal(mirrored(gram_panels(rows[:, some], factor)), alone[some][:, some])


@pytest.fixture
def by_integers(monkeypatch):
    """Products of whole numbers, however few they are."""
    if native_library() is None or not native_library().sp_integers():
        pytest.skip("this processor, or the compiled extension, has no instructions for them (AVX-512 VNNI)")
    monkeypatch.setattr(gram, "_WORTH_INTEGERS", 0)


def rounding_of_integers(rows, factor):
    """Half of 1/255 of its group's largest f² for each code that meets a rounded one."""
    squares, order = factor.double().square().sort(descending=True, stable=True)
    exact, codes = len(rows) // gram._EXACT, rows.double().abs()[order]
    largest = torch.cat(
        [torch.zeros(exact), *(g[:1].expand(len(g)) for g in squares[exact:].split(gram._INTEGER_STEPS))]
    )
    return codes.T @ (largest / 255 / 2).expand(rows.shape[1], -1).T


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 600), dim=st.integers(1, 420), spread=st.sampled_from([0, 1, 3]), seed=st.integers(0, 10**6))
@pytest.mark.usefixtures("by_integers")
def test_products_of_integers_err_by_their_rounding(n, dim, spread, seed):
    rows, factor = stored(n, dim, torch.int8, seed)
    factor = factor.log().div(3).mul(spread).exp()
    exact, sizes = naive(rows, factor)
    error = (mirrored(gram_panels(rows, factor)).double() - exact).abs()
    rounded = rounding_of_integers(rows, factor)
    assert bool((error <= torch.maximum(rounded, rounded.T) * 1.0001 + (n + 8) * EPS * sizes).all())


@pytest.mark.usefixtures("by_integers")
@pytest.mark.parametrize("n", [1, 128, 1000])
def test_products_of_integers_without_factors_are_exact_to_a_float(n):
    rows, _ = stored(n, 450, torch.int8)
    assert_equal_to_rounding(gram_panels(rows), rows, None)


@pytest.mark.usefixtures("by_integers")
def test_products_of_integers_leave_curvature_as_it_is_beside_damping():
    """Its eigenvalues move by a thousandth of tr(Ĥ)/k at most, whatever the sizes of rows."""
    for spread in (0, 1, 3):
        rows, factor = stored(2000, 300, torch.int8, seed=spread)
        factor = factor.log().div(3).mul(spread).exp()
        exact, _ = naive(rows, factor)
        moved = torch.linalg.matrix_norm(mirrored(gram_panels(rows, factor)).double() - exact, 2)
        assert moved < 1e-3 * exact.trace() / 300


@pytest.mark.usefixtures("by_integers")
def test_bits_of_products_of_integers_do_not_depend_on_threads_or_neighbours():
    rows, factor = stored(700, 700, torch.int8)
    alone = mirrored(gram_panels(rows, factor))
    torch.set_num_threads(3)
    assert torch.equal(mirrored(gram_panels(rows, factor)), alone)
    some = torch.tensor([0, 5, 191, 192, 400, 699])
    assert torch.equal(mirrored(gram_panels(rows[:, some], factor)), alone[some][:, some])


@pytest.mark.usefixtures("by_integers")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(value):
    rows, factor = stored(300, 5, torch.int8)
    factor[123] = value
    assert not mirrored(gram_panels(rows, factor)).isfinite().any()


@native
def test_rows_may_lie_apart():
    rows, factor = stored(60, 500, torch.int8)
    panels = gram_panels(rows.T.contiguous().T, torch.stack([factor, factor], 1)[:, 0])
    assert all(map(torch.equal, map(torch.triu, panels), map(torch.triu, gram_panels(rows, factor))))


@pytest.mark.parametrize("dim", [1, 5, 384, 385, 900])
def test_the_upper_part_says_all(dim):
    matrix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0)).triu()
    values = packed(upper_panels(matrix))
    assert values.shape == (packed_size(dim),)
    assert torch.equal(mirrored(unpacked(values, dim)), matrix + matrix.triu(1).T)


@native
def test_both_sides_agree_on_the_block():
    names = ("sp_gram_side", "sp_gram_steps", "sp_integer_steps")
    sizes = [ctypes.c_int.in_dll(native_library(), name).value for name in names]
    assert sizes == [gram._SIDE, gram._STEPS, gram._INTEGER_STEPS]
    assert HEIGHT % gram._SIDE == 0


def test_what_cannot_be_multiplied_is_refused():
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        gram_panels(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"torch\.float64"):
        gram_panels(torch.zeros(2, 3), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="backend 'triton' cannot serve"):
        gram_panels(torch.zeros(2, 3), backend="triton")
