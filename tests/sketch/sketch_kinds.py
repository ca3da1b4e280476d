"""The table of sketches that every law is asked of: a kind's options, and its matrix entry by entry."""

import math

import numpy as np
import pytest
import torch

from source_proj import kernels
from source_proj.sketch import Sketch
from source_proj.sketch.projections import projection_class

SHAPE = (9, 16)  # of the one parameter that most vectors here are gradients of: more than a group of 128 signs
D = SHAPE[0] * SHAPE[1]
OFFSETS = [0, 1000, 2**31 - 100, 2**40 + 7]
FEW_OFFSETS = OFFSETS[2:]


def bit(i, column, tag, seed):
    words = kernels.philox4x32(i % 2**32, i // 2**32, column // 128, tag, seed=seed)
    return int(words[column % 128 // 32]) >> (column % 32) & 1


def identity(sketch, offset, shape):
    matrix = np.zeros((sketch.dim, math.prod(shape)))
    matrix[np.arange(math.prod(shape)) + offset, np.arange(math.prod(shape))] = 1
    return matrix


def rademacher(sketch, offset, shape):
    entries = [
        [1 - 2 * bit(offset + p, c, 0x44454E53, sketch.seed) for p in range(math.prod(shape))]
        for c in range(sketch.dim)
    ]
    return np.array(entries) / math.sqrt(sketch.dim)


def kronecker(sketch, offset, shape):
    k = sketch.dim
    k_o = max(x for x in range(1, k + 1) if k % x == 0 and x * x <= k)
    left = [[1 - 2 * bit(offset + c, r, 0x4C454654, sketch.seed) for c in range(shape[0])] for r in range(k_o)]
    right = [[1 - 2 * bit(offset + c, r, 0x52474854, sketch.seed) for c in range(shape[1])] for r in range(k // k_o)]
    return np.kron(np.array(left), np.array(right)) / math.sqrt(k)


def sparse(sketch, offset, shape):
    d = math.prod(shape)
    matrix = np.zeros((sketch.dim, d))
    for copy in range(sketch.nnz):
        columns, negative = kernels.sparse_map(offset, offset + d, dim=sketch.dim, seed=sketch.seed, copy=copy)
        np.add.at(matrix, (columns, np.arange(d)), np.where(negative, -1, 1) / math.sqrt(sketch.nnz))
    return matrix


def tensor(sketch, offset, shape):
    """Entry (o, i) goes to (rank of o's word in its block + the same of i) mod k, with the product of two signs."""
    k, count = sketch.dim, (shape[0], math.prod(shape[1:]))
    words = [int(w) for w in kernels.philox4x32(offset % 2**32, offset // 2**32, 0, 0x53494445, seed=sketch.seed)]
    matrix, sides = np.zeros((k, *count)), []
    for n, seed in zip(count, (words[0] + words[1] * 2**32, words[2] + words[3] * 2**32), strict=True):
        ranks, signs = [], []
        for e in range(n):
            block = [kernels.philox4x32(x, 0, 0, 0x52414E4B, seed=seed) for x in range(e // k * k, e // k * k + k)]
            block = [int(w[0]) + int(w[1]) * 2**32 for w in block]
            ranks.append(sum(word < block[e % k] for word in block))
            signs.append(
                1 - 2 * (int(kernels.philox4x32(e // 128, 0, 0, 0x5349474E, seed=seed)[e % 128 // 32]) >> e % 32 & 1)
            )
        sides.append((ranks, signs))
    (left, left_signs), (right, right_signs) = sides
    for o in range(count[0]):
        for i in range(count[1]):
            matrix[(left[o] + right[i]) % k, o, i] = left_signs[o] * right_signs[i]
    return matrix.reshape(k, -1)


# For each row: its options, and R[:, offset : offset + prod(shape)] entry by entry from the definition.
KINDS = {
    "sparse": ({"kind": "sparse", "dim": 64}, sparse),
    "sparse, two nonzeros": ({"kind": "sparse", "dim": 64, "nnz": 2}, sparse),
    "sparse, k > d": ({"kind": "sparse", "dim": 1000}, sparse),
    "rademacher": ({"dim": 64, "kind": "rademacher"}, rademacher),
    "rademacher, ragged": ({"dim": 70, "kind": "rademacher"}, rademacher),
    "kronecker": ({"dim": 64, "kind": "kronecker"}, kronecker),
    "kronecker, prime": ({"dim": 61, "kind": "kronecker"}, kronecker),
    "tensor": ({"dim": 64, "kind": "tensor"}, tensor),
    "tensor, ragged": ({"dim": 7, "kind": "tensor"}, tensor),
    "tensor, prime": ({"dim": 13, "kind": "tensor"}, tensor),
    "identity": ({"dim": 2000, "kind": "identity"}, identity),
}
TAKE_WHOLE_PARAMETERS = ("kronecker", "tensor")  # kinds whose matrix depends on a parameter's shape
INTERPRETED = {  # Triton's interpreter takes its time: some kinds alone, and pieces at one offset each
    "sparse": FEW_OFFSETS[0],
    "sparse, two nonzeros": FEW_OFFSETS[1],
    "rademacher, ragged": FEW_OFFSETS[0],
    "tensor, prime": FEW_OFFSETS[1],
}


def backends(name):
    kind = KINDS[name][0].get("kind", "sparse")
    able = projection_class(kind, None).backends
    return [backend for backend in kernels.available_backends() if backend in able]


SKETCHES = [
    pytest.param(name, backend, id=f"{name} on {backend}")
    for name in KINDS
    for backend in backends(name)
    if backend != "triton" or name in INTERPRETED
]
over_sketches = pytest.mark.parametrize(("name", "backend"), SKETCHES)
# What holds of a matrix in the mean over seeds is told of the one that all backends make, bit for bit.
over_random_sketches = pytest.mark.parametrize(
    ("name", "backend"), [s for s in SKETCHES if "identity" not in s.id and "triton" not in s.id]
)


def make(name, backend=None, **options):
    return Sketch(**{**KINDS[name][0], "backend": backend, **options})


def usable(sketch, offset, count=D):
    """The offset, or one that fits: identity holds as many coordinates as columns; others go on without end."""
    return offset if not sketch.is_exact or offset + count <= sketch.dim else 500


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
