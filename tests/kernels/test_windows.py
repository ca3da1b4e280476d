"""Convolution windows: every route gives the sketch of the gradient that its definition spells out."""

import numpy as np
import pytest
import torch

from source_proj.kernels import sparse_native
from source_proj.kernels.native import native_library
from source_proj.kernels.sparse import sparse_add_windows_
from source_proj.sketch import Sketch
from source_proj.sketch.projections import kinds

ROUTES = (
    [("torch", None)] if native_library() is None else [("torch", None), *(("native", level) for level in range(3))]
)
native = pytest.mark.skipif(native_library() is None, reason="the compiled kernels were not built")


def problem(batch, o, c, taps, windows, plane):
    generator = torch.Generator().manual_seed(o)
    left = torch.randn(batch, o, windows, generator=generator)
    right = torch.randn(batch, c, plane, generator=generator)
    tap = torch.randperm(plane // 2, generator=generator)[:taps]
    window = torch.randint(0, plane - plane // 2, (windows,), generator=generator)
    return left, right, tap, window


def gradient(left, right, taps, windows):
    """G[b, o, c, j] = sum_l left[b, o, l] right[b, c, taps[j] + windows[l]], one tap after the other, in float64."""
    pieces = [np.einsum("bol,bcl->boc", left.double(), right.double()[:, :, tap + windows]) for tap in taps]
    return torch.from_numpy(np.stack(pieces, axis=-1).reshape(len(left), -1))


@pytest.mark.parametrize(("backend", "level"), ROUTES)
@pytest.mark.parametrize("nnz", [1, 3, 70])
@pytest.mark.parametrize(
    ("batch", "o", "c", "taps", "windows", "plane"),
    [
        (1, 5, 3, 9, 16, 36),
        (16, 33, 2, 9, 49, 81),
        (29, 17, 5, 3, 300, 450),  # steps in three chunks; a second group with empty lanes
        (19, 64, 3, 1, 7, 30),  # one tap; parts; a rest through columns
        (16, 6, 70, 9, 4, 36),  # several tables a row
        (8, 2, 3, 5, 1, 12),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_is_the_sketch_of_the_gradient(batch, o, c, taps, windows, plane, nnz, backend, level, at_level, scaled):
    at_level(level)
    arguments = problem(batch, o, c, taps, windows, plane)
    scale = torch.rand(o * c * taps, generator=torch.Generator().manual_seed(3)) if scaled else None
    times = 1 if scale is None else scale
    expected, sketch = gradient(*arguments) * times, Sketch(96, "sparse", seed=2, nnz=nnz, backend="torch")
    out = torch.ones(batch, 96)
    sparse_add_windows_(out, *arguments, 2**31 - 50, seed=2, nnz=nnz, backend=backend, scale=scale)
    wanted = 1 + sketch(expected, 2**31 - 50)
    sizes = (gradient(*(x.abs() for x in arguments[:2]), *arguments[2:]) * times).norm(dim=1)
    assert ((out - wanted).norm(dim=1) <= 1e-6 * (sizes + 10)).all()


@native
@pytest.mark.parametrize(
    ("name", "value"), [("_LANES_DIM", 32), ("_WINDOW_ROWS", 4), ("_WINDOW_WORK", (8, 1)), ("_PART", 1)]
)
def test_other_routes_give_the_same_sums(name, value, monkeypatch):
    arguments = problem(37, 40, 6, 9, 30, 64)

    def sums():
        out = torch.zeros(37, 64)
        sparse_add_windows_(out, *arguments, 7, seed=2, backend="native")
        return out

    usual = sums()
    monkeypatch.setattr(sparse_native, name, value)
    assert (sums() - usual).norm() <= 1e-6 * usual.norm()


@native
def test_threads_change_no_bit():
    arguments, threads = problem(33, 64, 6, 9, 30, 64), torch.get_num_threads()
    sums = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            sums.append(torch.zeros(33, 64))
            sparse_add_windows_(sums[-1], *arguments, 7, seed=2, backend="native")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*sums)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dim", [48, 64])
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_sketches_the_gradient_of_a_convolution(kind, dim, scaled):
    arguments = problem(17, 4, 2, 6, 10, 40)
    sketch, scale = Sketch(dim, kind, seed=1), torch.rand(48, generator=torch.Generator().manual_seed(3))
    out = torch.zeros(17, dim)
    sketch.add_windows_(out, *arguments, 0, scale if scaled else None)
    expected = gradient(*arguments) * (scale if scaled else 1)
    assert (out - sketch(expected, shape=(4, 2, 6))).norm() <= 1e-5 * out.norm()


def test_what_does_not_fit_is_named():
    sketch, (left, right, taps, windows) = Sketch(8), problem(2, 3, 2, 4, 5, 20)
    out = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="has 5 windows, but 4 offsets"):
        sketch.add_windows_(out, left, right, taps, windows[:4], 0)
    with pytest.raises(ValueError, match="windows reach from 20 to 34; a channel of right has 20 entries"):
        sketch.add_windows_(out, left, right, taps + 20, windows, 0)
    with pytest.raises(TypeError, match="give a vector of integers"):
        sketch.add_windows_(out, left, right, taps.float(), windows, 0)
    sketch.add_windows_(out, left[:, :0], right, taps, windows, 0)
    assert (out == 0).all()
