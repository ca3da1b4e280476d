"""Law 2, for every kind of sketch on every backend: R is linear, a function of the seed alone, and keeps geometry."""

import math

import numpy as np
import pytest
import torch
from sketch_kinds import (
    FEW_OFFSETS,
    INTERPRETED,
    KINDS,
    OFFSETS,
    SHAPE,
    TAKE_WHOLE_PARAMETERS,
    D,
    backends,
    make,
    normal,
    over_random_sketches,
    over_sketches,
    usable,
)

from source_proj import kernels


@over_sketches
@pytest.mark.parametrize("offset", OFFSETS)
def test_equals_the_naive_dense_matrix(name, backend, offset):
    sketch, shape = make(name, backend, seed=2**40 + 3), (4, 9)
    offset = usable(sketch, offset)
    matrix = KINDS[name][1](sketch, offset, shape)
    np.testing.assert_allclose(sketch.matrix(offset, offset + 36, shape).numpy(), matrix, rtol=1e-6)
    x = normal(3, 36)
    np.testing.assert_allclose(sketch(x, offset, shape).numpy(), x.double().numpy() @ matrix.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_same_bits_of_the_matrix_on_every_backend(name, offset):
    able = [backend for backend in backends(name) if backend != "triton" or offset in FEW_OFFSETS]
    offset = usable(make(name), offset)
    first, *others = [make(name, backend, seed=5).matrix(offset, offset + D, SHAPE) for backend in able]
    for other in others:
        assert torch.equal(first, other)


@over_sketches
def test_linear(name, backend):
    sketch = make(name, backend)
    x, y = normal(20, D, seed=1), normal(20, D, seed=2)
    left = sketch(3 * x - 2 * y, 300, SHAPE)
    right = 3 * sketch(x, 300, SHAPE) - 2 * sketch(y, 300, SHAPE)
    assert (left - right).norm() <= 1e-6 * (left.norm() + right.norm())


@over_sketches
@pytest.mark.parametrize("offset", OFFSETS)
def test_pieces_sum_to_the_whole(name, backend, offset):
    """By layer with a shape each, by batch, and for all but Kronecker, which takes whole parameters, by chunk."""
    if backend == "triton" and offset != INTERPRETED[name]:
        pytest.skip("Triton's interpreter is slow: one offset")
    sketch = make(name, backend, seed=1)
    offset = usable(sketch, offset, 2 * D)
    x = normal(37, 2 * D)
    layers = sketch(x[:, :D], offset, SHAPE) + sketch(x[:, D:], offset + D, SHAPE)
    by_batch = torch.zeros(37, sketch.dim)
    for some in (slice(0, 16), slice(16, 17), slice(17, 37)):
        sketch.add_(by_batch[some], x[some, :D], offset, SHAPE)
        sketch.add_(by_batch[some], x[some, D:], offset + D, SHAPE)
    assert (by_batch - layers).norm() <= 1e-6 * layers.norm()
    if sketch.kind in TAKE_WHOLE_PARAMETERS:
        layers = sketch(x, offset)
    chunks = torch.zeros(37, sketch.dim)
    for start, stop in [(0, 1), (1, 130), (130, 131), (131, 2 * D)]:
        sketch.add_(chunks, x[:, start:stop], offset + start)
    assert (chunks - layers).norm() <= 1e-6 * layers.norm()


@over_sketches
@pytest.mark.parametrize(("batch", "steps"), [(1, 5), (3, 1), (16, 1), (19, 40)])
@pytest.mark.parametrize("scaled", [False, True])
def test_outer_products_equal_the_gradient(name, backend, batch, steps, scaled):
    if backend == "triton" and scaled == (batch in (1, 16)):
        pytest.skip("Triton's interpreter is slow: half of the cases")
    sketch = make(name, backend)
    left, right = normal(batch, steps, SHAPE[0]), normal(batch, steps, SHAPE[1], seed=1)
    gradient = left.transpose(1, 2) @ right
    out = torch.zeros(batch, sketch.dim)
    scale = 3 * normal(gradient[0].numel(), seed=2).abs() if scaled else None
    times = 1 if scale is None else scale
    sketch.add_outer_(out, left, right, 700, scale)
    expected = sketch(gradient.flatten(1) * times, 700, SHAPE)
    # The gradient itself is rounded, at the size of its terms.
    size = ((left.abs().transpose(1, 2) @ right.abs()).flatten(1) * times).norm()
    assert (out - expected).norm() <= 1e-6 * size


@over_sketches
def test_rows_of_a_table_equal_its_gradient(name, backend):
    sketch, shape = make(name, backend), (30, 10)
    number = torch.arange(24)
    values, examples, index = normal(24, 10), number * 3 % 4, number % 5 * 7  # some rows of an example twice
    out = torch.zeros(4, sketch.dim)
    sketch.add_at_(out, values, examples, index, 600, shape)
    table = torch.zeros(4, *shape)
    table.index_put_((examples, index), values, accumulate=True)
    expected = sketch(table.flatten(1), 600, shape)
    assert (out - expected).norm() <= 1e-6 * expected.norm()


@over_random_sketches
def test_number_of_threads_changes_no_bit(name, backend):
    """Of the matrix for all kinds; of sums for those that do not end in a product by another library."""
    sketch = make(name, backend, dim=256)
    x, left, right = normal(40, 60_000), normal(40, 4, 200), normal(40, 4, 300)
    index = torch.arange(40)

    def work(threads):
        torch.set_num_threads(threads)
        outer, at = torch.zeros(40, sketch.dim), torch.zeros(40, sketch.dim)
        if sketch.kind not in ("sparse", "tensor"):
            return [sketch.matrix(0, 400, (20, 20)), sketch.matrix(64, 65, (1, 1))]
        sketch.add_outer_(outer, left, right, 5)
        sketch.add_at_(at, x[:, :5000], index, index, 0, (40, 5000))
        return [sketch(x), outer, at]

    for one, several in zip(work(1), work(3), strict=True):
        assert torch.equal(one, several)


SEEDS = [(0, 1), (1, 2**32), (7, 2**63 + 7), (2**64 - 1, 0), (123456, 123457)]


@over_random_sketches
def test_other_seeds_are_uncorrelated(name, backend):
    for one, other in SEEDS:
        a = make(name, backend, seed=one).matrix(0, 1200, (30, 40))
        b = make(name, backend, seed=other).matrix(0, 1200, (30, 40))
        # k d products of mean 0: a sum of variance d / k.
        assert (a * b).sum().abs() <= 5 * math.sqrt(1200 / a.shape[0])


INPUTS = {
    "gaussian": lambda seed: normal(6, 32 * 40, seed=seed),
    "one-hot": lambda seed: torch.eye(32 * 40)[torch.randperm(1280, generator=torch.Generator().manual_seed(seed))[:6]],
    "low-rank": lambda seed: (normal(6, 32, 2, seed=seed) @ normal(6, 2, 40, seed=seed + 1)).flatten(1),
    "heavy-tailed": lambda seed: torch.from_numpy(
        np.random.default_rng(seed).standard_t(2.5, (6, 1280)).astype(np.float32)
    ),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "identity"])
def test_norms_and_inner_products_are_kept(name, inputs):
    """Within 4 sqrt(2/k) in 99 of 100 trials; for Kronecker, where k_o and k_i rows average apart, by its variance."""
    kind = KINDS[name][0].get("kind", "sparse")
    k = 256 if kind != "kronecker" else 1024
    variance = 2 / k
    if kind == "kronecker":
        k_o, k_i = kernels.kronecker_split(k)
        variance = 2 / k_o + 2 / k_i + 4 / k
    good = total = 0
    for seed in range(60):
        x = torch.nn.functional.normalize(INPUTS[inputs](seed))
        y = make(name, dim=k, seed=seed)(x, 1000 * seed, (32, 40))
        error = (y @ y.T - x @ x.T).abs()[torch.triu(torch.ones(6, 6, dtype=torch.bool))]
        good += int((error <= 4 * math.sqrt(variance)).sum())
        total += error.numel()
    assert good >= 0.99 * total


@over_random_sketches
def test_unbiased(name, backend):
    """The mean over seeds of the sketched inner product is the inner product, to 5 standard errors."""
    x = torch.nn.functional.normalize(normal(2, D))
    samples = []
    for seed in range(200):
        y = make(name, backend, seed=seed)(x, 0, SHAPE)
        samples.append([float(y[0] @ y[0]) - 1, float(y[0] @ y[1]) - float(x[0] @ x[1])])
    values = np.array(samples)
    assert (np.abs(values.mean(0)) <= 5 * values.std(0) / math.sqrt(len(values)) + 1e-6).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # triton's interpreter is numpy
@over_sketches
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_numbers_pass_through(name, backend, value):
    sketch = make(name, backend)
    x = normal(18, D)
    x[3, 7] = value
    left, right = normal(18, 3, SHAPE[0]), normal(18, 3, SHAPE[1])
    left[3, 1, 2] = value
    out = torch.zeros(18, sketch.dim)
    sketch.add_outer_(out, left, right, 0)
    for y in (sketch(x, 0, SHAPE), out):
        finite = y.isfinite().all(1)
        assert finite.tolist() == [b != 3 for b in range(18)]


@over_sketches
def test_empty_inputs(name, backend):
    sketch = make(name, backend)
    assert sketch(torch.zeros(0, 7)).shape == (0, sketch.dim)
    assert torch.equal(sketch(torch.zeros(3, 0)), torch.zeros(3, sketch.dim))
    assert sketch(torch.zeros(2, 0, 5)).shape == (2, 0, sketch.dim)
    assert sketch.matrix(5, 5).shape == (sketch.dim, 0)
    out = torch.ones(2, sketch.dim)
    sketch.add_outer_(out, torch.zeros(2, 0, 3), torch.zeros(2, 0, 4), 0)
    sketch.add_outer_(out, torch.zeros(2, 5, 0), torch.zeros(2, 5, 4), 0)
    nothing = torch.zeros(0, dtype=torch.int64)
    sketch.add_at_(out, torch.zeros(0, 4), nothing, nothing, 0, (3, 4))
    assert torch.equal(out, torch.ones(2, sketch.dim))


@over_sketches
def test_strides_and_types(name, backend):
    sketch = make(name, backend)
    x = normal(18, D)
    expected = sketch(x, 3, SHAPE)
    wide = torch.zeros(36, D + 9)
    wide[::2, 5 : D + 5] = x
    tight = 1e-6 * expected.norm()
    for same in (x.T.contiguous().T, wide[::2, 5 : D + 5], x.double(), x.clone().requires_grad_()):
        assert (sketch(same, 3, SHAPE) - expected).norm() <= tight
    for same in (x.numpy(), np.asfortranarray(x.double().numpy()), np.ascontiguousarray(x.numpy()[:, ::-1])[:, ::-1]):
        assert (sketch(same, 3, SHAPE) - expected).norm() <= tight
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    assert (sketch(read_only, 3, SHAPE) - expected).norm() <= tight
    for dtype in (torch.bfloat16, torch.float16):
        assert (sketch(x.to(dtype), 3, SHAPE) - sketch(x.to(dtype).float(), 3, SHAPE)).norm() <= tight
    assert torch.equal(sketch(x.view(3, 6, D), 3, SHAPE), expected.view(3, 6, sketch.dim))
    same_row = x[:1].expand(18, -1)
    assert (sketch(same_row, 3, SHAPE) - expected[:1]).norm() <= tight
    out = torch.zeros(36, sketch.dim + 5)
    sketch.add_(out[::2, 2:-3], x, 3, SHAPE)
    assert (out[::2, 2:-3] - expected).norm() <= tight
    out[::2, 2:-3] = 0
    assert not out.any()  # nothing beside the given rows was touched


@over_sketches
def test_outer_products_of_any_stride(name, backend):
    sketch = make(name, backend)
    left, right = normal(17, 6, SHAPE[0]), normal(17, SHAPE[1], 6).transpose(1, 2)
    expected, got = torch.zeros(17, sketch.dim), torch.zeros(17, sketch.dim)
    sketch.add_outer_(expected, left, right.contiguous(), 9)
    sketch.add_outer_(got, left.transpose(0, 1).contiguous().transpose(0, 1), right, 9)
    assert (got - expected).norm() <= 1e-6 * expected.norm()
    half, half_expected = torch.zeros(17, sketch.dim), torch.zeros(17, sketch.dim)
    sketch.add_outer_(half, left.bfloat16(), right.half(), 9)
    sketch.add_outer_(half_expected, left.bfloat16().float(), right.half().float(), 9)
    assert (half - half_expected).norm() <= 1e-6 * half_expected.norm()


@over_sketches
def test_autocast_around_does_not_reach_in(name, backend):
    sketch = make(name, backend)
    x, left, right = normal(3, D), normal(3, 4, SHAPE[0]), normal(3, 4, SHAPE[1], seed=1)
    outside, inside = torch.zeros(3, sketch.dim), torch.zeros(3, sketch.dim)
    sketch.add_outer_(outside, left, right, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sketch.add_outer_(inside, left, right, 0)
        within = sketch(x, 0, SHAPE)
    assert torch.equal(inside, outside)
    assert torch.equal(within, sketch(x, 0, SHAPE))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", KINDS)
def test_the_gpu_has_the_same_matrix(name):
    sketch = make(name)
    eye, x = torch.eye(D), normal(5, D)
    assert torch.equal(sketch(eye.cuda(), 500, SHAPE).cpu(), sketch(eye, 500, SHAPE))
    assert (sketch(x.cuda(), 500, SHAPE).cpu() - sketch(x, 500, SHAPE)).norm() <= 1e-5 * x.norm()
    left, right = normal(5, 3, SHAPE[0]), normal(5, 3, SHAPE[1], seed=1)
    there, here = torch.zeros(5, sketch.dim, device="cuda"), torch.zeros(5, sketch.dim)
    sketch.add_outer_(there, left.cuda(), right.cuda(), 500)
    sketch.add_outer_(here, left, right, 500)
    assert (there.cpu() - here).norm() <= 1e-5 * here.norm()
