"""Law 2, for every kind of sketch on every backend: R is linear, a function of the seed alone, and keeps geometry."""

import json
import math
import re

import numpy as np
import pytest
import torch

from source_proj import kernels
from source_proj.sketch import Sketch

SHAPE = (12, 25)  # of the one parameter that most vectors here are gradients of
D = SHAPE[0] * SHAPE[1]
OFFSETS = [0, 1000, 2**31 - 100, 2**40 + 7]

KINDS = {
    "sparse": {"dim": 64},
    "sparse, two nonzeros": {"dim": 64, "nnz": 2},
    "sparse, k > d": {"dim": 1000},
    "rademacher": {"dim": 64, "kind": "rademacher"},
    "rademacher, ragged": {"dim": 70, "kind": "rademacher"},
    "kronecker": {"dim": 64, "kind": "kronecker"},
    "kronecker, prime": {"dim": 61, "kind": "kronecker"},
    "identity": {"dim": 2000, "kind": "identity"},
}
INTERPRETED = ("sparse", "sparse, two nonzeros", "rademacher, ragged")  # Triton's interpreter takes its time
SKETCHES = [
    pytest.param({**options, "backend": backend}, id=f"{name} on {backend}")
    for name, options in KINDS.items()
    for backend in kernels.available_backends(options.get("kind", "sparse"))
    if backend != "triton" or name in INTERPRETED
]
over_sketches = pytest.mark.parametrize("options", SKETCHES)
# What holds of a matrix in the mean over seeds is told of the one that all backends make, bit for bit.
over_random_sketches = pytest.mark.parametrize(
    "options", [s for s in SKETCHES if "identity" not in s.id and "triton" not in s.id]
)


def usable(options, offset):
    """Identity holds as many coordinates as columns; others go on without end."""
    return options.get("kind") != "identity" or offset + D <= options["dim"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bit(i, column, tag, seed):
    words = kernels.philox4x32(i % 2**32, i // 2**32, column // 128, tag, seed=seed)
    return int(words[column % 128 // 32]) >> (column % 32) & 1


def naive_matrix(sketch, offset, shape):
    """R[:, offset : offset + prod(shape)] entry by entry from the definitions."""
    k, d = sketch.dim, math.prod(shape)
    matrix = np.zeros((k, d))
    if sketch.kind == "identity":
        matrix[np.arange(d) + offset, np.arange(d)] = 1
    elif sketch.kind == "rademacher":
        for p in range(d):
            for c in range(k):
                matrix[c, p] = (1 - 2 * bit(offset + p, c, 0x44454E53, sketch.seed)) / math.sqrt(k)
    elif sketch.kind == "kronecker":
        k_o = max(x for x in range(1, k + 1) if k % x == 0 and x * x <= k)
        left = [[1 - 2 * bit(offset + c, r, 0x4C454654, sketch.seed) for c in range(shape[0])] for r in range(k_o)]
        right = [
            [1 - 2 * bit(offset + c, r, 0x52474854, sketch.seed) for c in range(shape[1])] for r in range(k // k_o)
        ]
        matrix = np.kron(np.array(left), np.array(right)) / math.sqrt(k)
    else:
        for copy in range(sketch.nnz):
            columns, negative = kernels.sparse_map(offset, offset + d, dim=k, seed=sketch.seed, copy=copy)
            np.add.at(matrix, (columns, np.arange(d)), np.where(negative, -1, 1) / math.sqrt(sketch.nnz))
    return matrix


@over_sketches
@pytest.mark.parametrize("offset", OFFSETS)
def test_equals_the_naive_dense_matrix(options, offset):
    if not usable(options, offset):
        offset = 500
    sketch, shape = Sketch(**options, seed=2**40 + 3), (4, 9)
    matrix = naive_matrix(sketch, offset, shape)
    np.testing.assert_allclose(sketch.matrix(offset, offset + 36, shape).numpy(), matrix, rtol=1e-6)
    x = normal(3, 36)
    np.testing.assert_allclose(sketch(x, offset, shape).numpy(), x.double().numpy() @ matrix.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_same_bits_of_the_matrix_on_every_backend(name, offset):
    options = KINDS[name]
    if not usable(options, offset):
        offset = 500
    first, *others = [
        Sketch(**options, seed=5, backend=backend).matrix(offset, offset + D, SHAPE)
        for backend in kernels.available_backends(options.get("kind", "sparse"))
    ]
    for other in others:
        assert torch.equal(first, other)


@over_sketches
def test_linear(options):
    sketch = Sketch(**options)
    x, y = normal(20, D, seed=1), normal(20, D, seed=2)
    left = sketch(3 * x - 2 * y, 300, SHAPE)
    right = 3 * sketch(x, 300, SHAPE) - 2 * sketch(y, 300, SHAPE)
    assert (left - right).norm() <= 1e-6 * (left.norm() + right.norm())


@over_sketches
@pytest.mark.parametrize("offset", OFFSETS)
def test_pieces_sum_to_the_whole(options, offset):
    """By layer with a shape each, by batch, and for all but Kronecker, which takes whole parameters, by chunk."""
    if not usable(options, offset):
        offset = 500
    sketch = Sketch(**options, seed=1)
    x = normal(37, 2 * D)
    layers = sketch(x[:, :D], offset, SHAPE) + sketch(x[:, D:], offset + D, SHAPE)
    by_batch = torch.zeros(37, sketch.dim)
    for some in (slice(0, 16), slice(16, 17), slice(17, 37)):
        sketch.add_(by_batch[some], x[some, :D], offset, SHAPE)
        sketch.add_(by_batch[some], x[some, D:], offset + D, SHAPE)
    assert (by_batch - layers).norm() <= 1e-6 * layers.norm()
    if sketch.kind == "kronecker":
        layers = sketch(x, offset)
    chunks = torch.zeros(37, sketch.dim)
    for start, stop in [(0, 1), (1, 130), (130, 131), (131, 2 * D)]:
        sketch.add_(chunks, x[:, start:stop], offset + start)
    assert (chunks - layers).norm() <= 1e-6 * layers.norm()


@over_sketches
@pytest.mark.parametrize(("batch", "steps"), [(1, 5), (3, 1), (16, 1), (19, 40)])
@pytest.mark.parametrize("scaled", [False, True])
def test_outer_products_equal_the_gradient(options, batch, steps, scaled):
    sketch = Sketch(**options)
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
def test_rows_at_own_offsets_equal_rows_of_the_gradient(options):
    sketch = Sketch(**options)
    rows, examples = normal(50, 10), torch.arange(50) % 4
    offsets = 600 + 10 * (torch.arange(50) * 7 % 30)
    out = torch.zeros(4, sketch.dim)
    sketch.add_at_(out, rows, examples, offsets)
    gradient = torch.zeros(4, 300)
    for row, example, offset in zip(rows, examples.tolist(), offsets.tolist(), strict=True):
        gradient[example, offset - 600 : offset - 590] += row
    expected = sketch(gradient, 600)
    assert (out - expected).norm() <= 1e-6 * expected.norm()


@over_random_sketches
def test_number_of_threads_changes_no_bit(options):
    """Of the matrix for all kinds; of sums for those that do not end in a product by another library."""
    sketch = Sketch(**{**options, "dim": 256})
    x, left, right = normal(40, 60_000), normal(40, 4, 200), normal(40, 4, 300)
    index = torch.arange(40)

    def work(threads):
        torch.set_num_threads(threads)
        outer, at = torch.zeros(40, sketch.dim), torch.zeros(40, sketch.dim)
        if sketch.kind != "sparse":
            return [sketch.matrix(0, 400, (20, 20)), sketch.matrix(64, 65, (1, 1))]
        sketch.add_outer_(outer, left, right, 5)
        sketch.add_at_(at, x[:, :5000], index, 5000 * index)
        return [sketch(x), outer, at]

    for one, several in zip(work(1), work(3), strict=True):
        assert torch.equal(one, several)


SEEDS = [(0, 1), (1, 2**32), (7, 2**63 + 7), (2**64 - 1, 0), (123456, 123457)]


@over_random_sketches
def test_other_seeds_are_uncorrelated(options):
    for one, other in SEEDS:
        a = Sketch(**options, seed=one).matrix(0, 1200, (30, 40))
        b = Sketch(**options, seed=other).matrix(0, 1200, (30, 40))
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
    kind = KINDS[name].get("kind", "sparse")
    k = 256 if kind != "kronecker" else 1024
    variance = 2 / k
    if kind == "kronecker":
        k_o, k_i = kernels.kronecker_split(k)
        variance = 2 / k_o + 2 / k_i + 4 / k
    good = total = 0
    for seed in range(60):
        x = torch.nn.functional.normalize(INPUTS[inputs](seed))
        y = Sketch(**{**KINDS[name], "dim": k}, seed=seed)(x, 1000 * seed, (32, 40))
        error = (y @ y.T - x @ x.T).abs()[torch.triu(torch.ones(6, 6, dtype=torch.bool))]
        good += int((error <= 4 * math.sqrt(variance)).sum())
        total += error.numel()
    assert good >= 0.99 * total


@over_random_sketches
def test_unbiased(options):
    """The mean over seeds of the sketched inner product is the inner product, to 5 standard errors."""
    x = torch.nn.functional.normalize(normal(2, D))
    samples = []
    for seed in range(200):
        y = Sketch(**options, seed=seed)(x, 0, SHAPE)
        samples.append([float(y[0] @ y[0]) - 1, float(y[0] @ y[1]) - float(x[0] @ x[1])])
    values = np.array(samples)
    assert (np.abs(values.mean(0)) <= 5 * values.std(0) / math.sqrt(len(values)) + 1e-6).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # triton's interpreter is numpy
@over_sketches
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_numbers_pass_through(options, value):
    sketch = Sketch(**options)
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
def test_empty_inputs(options):
    sketch = Sketch(**options)
    assert sketch(torch.zeros(0, 7)).shape == (0, sketch.dim)
    assert torch.equal(sketch(torch.zeros(3, 0)), torch.zeros(3, sketch.dim))
    assert sketch(torch.zeros(2, 0, 5)).shape == (2, 0, sketch.dim)
    assert sketch.matrix(5, 5).shape == (sketch.dim, 0)
    out = torch.ones(2, sketch.dim)
    sketch.add_outer_(out, torch.zeros(2, 0, 3), torch.zeros(2, 0, 4), 0)
    sketch.add_outer_(out, torch.zeros(2, 5, 0), torch.zeros(2, 5, 4), 0)
    sketch.add_at_(out, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(out, torch.ones(2, sketch.dim))


@over_sketches
def test_strides_and_types(options):
    sketch = Sketch(**options)
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
def test_outer_products_of_any_stride(options):
    sketch = Sketch(**options)
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
def test_autocast_around_does_not_reach_in(options):
    sketch = Sketch(**options)
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
    sketch = Sketch(**KINDS[name])
    eye, x = torch.eye(D), normal(5, D)
    assert torch.equal(sketch(eye.cuda(), 500, SHAPE).cpu(), sketch(eye, 500, SHAPE))
    assert (sketch(x.cuda(), 500, SHAPE).cpu() - sketch(x, 500, SHAPE)).norm() <= 1e-5 * x.norm()
    left, right = normal(5, 3, SHAPE[0]), normal(5, 3, SHAPE[1], seed=1)
    there, here = torch.zeros(5, sketch.dim, device="cuda"), torch.zeros(5, sketch.dim)
    sketch.add_outer_(there, left.cuda(), right.cuda(), 500)
    sketch.add_outer_(here, left, right, 500)
    assert (there.cpu() - here).norm() <= 1e-5 * here.norm()


def test_kronecker_vectors_take_the_sparse_map():
    sparse, kronecker = Sketch(64), Sketch(64, "kronecker")
    x = normal(3, 40)
    assert torch.equal(kronecker(x, 5, (40,)), sparse(x, 5))
    assert torch.equal(kronecker(x, 5), sparse(x, 5))
    assert not torch.equal(kronecker(x, 5, (4, 10)), sparse(x, 5))
    kernel = normal(3, 4 * 2 * 5)
    assert torch.equal(kronecker(kernel, 5, (4, 2, 5)), kronecker(kernel, 5, (4, 10)))


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_spec_goes_around(kind):
    sketch = Sketch(dim=32, kind=kind, seed=2**64 - 1, nnz=2 if kind == "sparse" else 1)
    spec = json.loads(json.dumps(sketch.spec()))
    again = Sketch.from_spec(spec)
    assert again.spec() == spec
    assert torch.equal(again.matrix(0, 20, (4, 5)), sketch.matrix(0, 20, (4, 5)))
    assert sketch.chosen_backend == kernels.available_backends(kind)[0]
    assert sketch.is_exact == (kind == "identity")
    assert Sketch(dim=32, kind=kind, backend="torch").chosen_backend == "torch"


def test_backends_are_honoured_or_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"backend 'cuda' .* choose one of \("):
        Sketch(backend="cuda")
    with pytest.raises(ValueError, match=r"'fast-jl' cannot serve kind 'sparse'.*'torch'"):
        Sketch(backend="fast-jl")
    monkeypatch.setattr(kernels.backends, "native_library", lambda: None)
    left = kernels.available_backends("sparse")
    assert left in (("torch",), ("torch", "triton"))  # the latter where Triton's interpreter is on
    assert Sketch().chosen_backend == "torch"
    with pytest.raises(
        ValueError, match=rf"compiled extension, which was not built; choose one of {re.escape(str(left))}"
    ):
        Sketch(backend="native")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 2**31}, "dim is 2147483648"),
        ({"kind": "gaussian"}, "kind is 'gaussian'; known kinds are sparse"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"nnz": 0}, "nnz is 0"),
        ({"nnz": 2, "kind": "rademacher"}, "nnz is 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sketch(**options)
    with pytest.raises(TypeError, match=r"dim is 8\.5"):
        Sketch(dim=8.5)
    with pytest.raises(ValueError, match="entries"):
        Sketch.from_spec({"kind": "sparse", "dim": 8})


def test_bad_calls_are_refused():
    sketch, out = Sketch(8), torch.zeros(2, 8)
    one = torch.zeros(2, 3, 4)
    for message, call in {
        "single number": lambda: sketch(torch.tensor(1.0)),
        "-1 to 4": lambda: sketch(torch.zeros(5), -1),
        r"outside of 0 to": lambda: sketch(torch.zeros(5), 2**63 - 2),
        r"shape \(2, 3\) has 6 coordinates, but rows have 5": lambda: sketch(torch.zeros(5), 0, (2, 3)),
        r"out is \(2, 8\); give \(B, 9\)": lambda: Sketch(9).add_(out, torch.zeros(2, 5)),
        "out has 2 examples": lambda: sketch.add_(out, torch.zeros(3, 5)),
        "give 2 axes": lambda: sketch.add_(out, one),
        "give 3 axes": lambda: sketch.add_outer_(out, one, torch.zeros(2, 5), 0),
        "differ in their second axis": lambda: sketch.add_outer_(out, one, torch.zeros(2, 4, 5), 0),
        "do not overlap": lambda: sketch.add_(torch.zeros(1, 8).expand(2, 8), torch.zeros(2, 5)),
        "strides": lambda: sketch.add_(torch.zeros(8, 2).T, torch.zeros(2, 5)),
        "do not fit identity of dim 8": lambda: Sketch(8, "identity")(torch.zeros(5), 4),
        "examples run from 0 to 2": lambda: sketch.add_at_(out, one[0], torch.arange(3), torch.arange(3)),
        "give one entry per row": lambda: sketch.add_at_(out, one[0], torch.arange(2), torch.arange(3)),
        "before start": lambda: sketch.matrix(4, 3),
        r"scale is \(15,\) on cpu; give \(16,\) on cpu": lambda: sketch.add_outer_(out, one, one, 0, torch.ones(15)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"x is an array of int64"):
        sketch(np.arange(4))
    with pytest.raises(TypeError, match=r"rows \(B, n\) is torch.int64"):
        sketch(torch.arange(4))
    with pytest.raises(TypeError, match=r"out is torch.float64"):
        sketch.add_(out.double(), torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"scale is torch.float64"):
        sketch.add_outer_(out, one, one, 0, torch.ones(16).double())
    with pytest.raises(TypeError, match=r"offsets is torch.int32"):
        sketch.add_at_(out, one[0], torch.arange(3), torch.arange(3, dtype=torch.int32))
