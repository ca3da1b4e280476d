"""Codes of a few bits: compiled code against torch's, and both against one number at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from source_proj.kernels.backends import available_backends
from source_proj.kernels.codes import encode_rows, unpack_rows
from source_proj.kernels.rotation import rotate, rotate_back

LEVELS = {1: (-0.8, 0.8), 2: (-1.5, -0.45, 0.45, 1.5), 4: tuple((i - 7.5) / 4 for i in range(16))}
ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-(2.0**40), 2.0**40, width=32),
)
every_size = pytest.mark.parametrize("bits", LEVELS)
PRESENT = [name for name in ("native", "torch") if name in available_backends()]
every_backend = pytest.mark.parametrize("backend", PRESENT)
every_level = pytest.mark.parametrize("level", [0, 1, 2])
native = pytest.mark.skipif("native" not in available_backends(), reason="the extension was not built")


def normal(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@every_size
@every_backend
@settings(max_examples=40)
@given(array=ROWS)
def test_codes_and_sums_are_those_of_the_definition(bits, backend, array):
    levels = np.array(LEVELS[bits], np.float32)
    packed = encode_rows(torch.from_numpy(array), LEVELS[bits], backend=backend)
    unpacked = unpack_rows(packed.codes, array.shape[1], LEVELS[bits], backend=backend).numpy()
    edges = (levels[1:] + levels[:-1]) / np.float32(2)
    for row, codes, length, along, back in zip(array, *(part.numpy() for part in packed), unpacked, strict=True):
        exact = row.astype(np.float64)
        assert length == pytest.approx(np.sqrt((exact**2).sum()), rel=1e-12)
        rms = np.float32(length / np.sqrt(len(row)))
        places = [int((value >= edges).sum()) for value in (row / rms if rms else 0 * row)]
        number = int.from_bytes(codes.tobytes(), "little")
        assert [number >> bits * j & 2**bits - 1 for j in range(len(row))] == places
        assert number >> bits * len(row) == 0
        assert np.array_equal(back, levels[places])
        assert along == pytest.approx(float((row * levels[places]).astype(np.float64).sum()), rel=1e-12)


@native
@every_level
@every_size
@pytest.mark.parametrize("k", [1, 7, 256, 257, 4096])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_codes_are_torch_s(bits, k, threads, level, at_level):
    at_level(level)
    rows, before = normal(41, k, seed=k), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compiled, plain = (encode_rows(rows, LEVELS[bits], backend=backend) for backend in ("native", "torch"))
        assert torch.equal(compiled.codes, plain.codes)
        for name in ("length", "along"):
            torch.testing.assert_close(getattr(compiled, name), getattr(plain, name), rtol=1e-13, atol=0)
        both = [unpack_rows(plain.codes, k, LEVELS[bits], backend=backend) for backend in ("native", "torch")]
        assert torch.equal(*both)
    finally:
        torch.set_num_threads(before)


@native
@every_level
@pytest.mark.parametrize("k", [1, 2, 3, 20, 64, 127, 256, 1000, 4096, 6144])
def test_compiled_rotations_have_torch_s_bits(k, level, at_level):
    at_level(level)
    vectors = normal(17, k, seed=k)
    for turn in (rotate, rotate_back):
        assert torch.equal(turn(vectors, backend="native"), turn(vectors, backend="torch"))
        assert torch.equal(turn(vectors[3:4], backend="native")[0], turn(vectors, backend="native")[3])
        assert turn(vectors[:0], backend="native").shape == (0, k)


@native
def test_strided_rows_are_read_as_they_are():
    rows = normal(40, 64)[::2, ::2]
    assert torch.equal(encode_rows(rows, LEVELS[2]).codes, encode_rows(rows.contiguous(), LEVELS[2]).codes)
    assert torch.equal(rotate(rows), rotate(rows.contiguous()))


@every_size
@every_backend
def test_no_rows_are_no_codes(bits, backend):
    packed = encode_rows(torch.zeros(0, 11), LEVELS[bits], backend=backend)
    assert packed.codes.shape == (0, -(-11 * bits // 8))
    assert unpack_rows(packed.codes, 11, LEVELS[bits], backend=backend).shape == (0, 11)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backend 'triton' cannot serve codes"):
        encode_rows(normal(2, 8), LEVELS[2], backend="triton")
    with pytest.raises(ValueError, match="backend 'fpga' cannot serve rotations"):
        rotate(normal(2, 8), backend="fpga")
