"""What tests of scoring share: the backends, the functions at a backend's place, and naive twins."""

import functools
import importlib.util
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from source_proj.kernels import scoring
from source_proj.kernels.codes import PackedRows
from source_proj.kernels.native import native_library

EPS = torch.finfo(torch.float32).eps

native = pytest.mark.skipif(native_library() is None, reason="the compiled kernels were not built")
interpreted = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BACKENDS = [
    pytest.param("torch", None, id="torch"),
    *(pytest.param("native", level, id=f"native-{level}", marks=native) for level in (0, 1, 2)),
    pytest.param("triton", None, id="triton", marks=interpreted),
]


def place(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def moved(values, device):
    return [_moved(value, device) for value in values]


def _moved(value, device):
    if isinstance(value, PackedRows):
        return replace(value, codes=value.codes.to(device))
    return value.to(device) if isinstance(value, torch.Tensor) else value


def at_its_place(function):
    """The function for tensors in main memory, wherever the backend works."""

    @functools.wraps(function)
    def wrapped(*given_, backend=None):
        found = function(*moved(given_, place(backend)), backend=backend)
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(moved(found, "cpu"))

    return wrapped


score, top_k, bottom_k = (at_its_place(f) for f in (scoring.score, scoring.top_k, scoring.bottom_k))


class Strongest(scoring.Strongest):
    """For tensors in main memory, wherever the backend works."""

    def __init__(self, count, k, *, largest=True, backend=None):
        super().__init__(count, k, largest=largest, device=place(backend), backend=backend)
        self._place = place(backend)

    def add(self, *given_, first=0):
        super().add(*moved(given_, self._place), first=first)

    def result(self):
        return moved(super().result(), "cpu")


def exact_and_bound(queries, rows, scale):
    """Scores in float64, and what rounding of a float32 sum in any order, and of the scale, can change."""
    q = queries.double().numpy()
    r = rows if isinstance(rows, np.ndarray) else rows.double().numpy()
    s = 1.0 if scale is None else scale.double().numpy()
    return q @ r.T * s, (queries.shape[1] + 1) * EPS * (np.abs(q) @ np.abs(r).T) * np.abs(s)


def naive_strongest(scores, k, *, largest):
    """The k strongest of each row of a matrix, by sorting (score, row) pairs one query at a time."""
    rows = [sorted(range(scores.shape[1]), key=lambda r: (-q[r] if largest else q[r], r))[:k] for q in scores]
    rows = np.array(rows, dtype=np.int64).reshape(len(scores), k)
    return np.take_along_axis(np.asarray(scores), rows, axis=1), rows


def assert_strongest(kept, scores, k, *, largest):
    """What was kept, values and rows, are the k strongest of each row of a matrix."""
    values, rows = naive_strongest(scores, k, largest=largest)
    np.testing.assert_array_equal(kept[1], rows)
    np.testing.assert_array_equal(kept[0], values)


def spans(sizes):
    """Slices of rows that follow each other, so many in each."""
    bounds = np.cumsum([0, *sizes]).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
