"""The sketch: a random projection of gradients whose matrix is a pure function of seed, coordinate and column."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from numpy.typing import NDArray
from torch import Tensor

from source_proj.sketch.checks import (
    check_index,
    check_out,
    check_range,
    check_types,
    check_windows,
    checked_scale,
    floating_tensor,
    integer,
)
from source_proj.sketch.modes import without_autocast
from source_proj.sketch.projections import HeldSketches, Projection, projection_class

__all__ = ["Sketch", "exact_sketch"]

_PORTABLE = "portable"  # in a spec: the matrix that every backend makes
_Arguments = ParamSpec("_Arguments")


def _plain(method: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Without a graph, and in full precision also where the caller's model runs under autocast."""

    @functools.wraps(method)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        with torch.no_grad(), without_autocast():
            method(*args, **kwargs)

    return wrapped


@dataclass(frozen=True)
class Sketch:
    """A random linear map R from d parameter coordinates to dim numbers, with E[R^T R] = I.

    R is never kept: its entries are functions of (seed, absolute coordinate, column), the same bits on every backend,
    for every split into layers, batches or tiles, and for any d. So sketches of pieces add up to that of the whole,
    and a bank made on one machine answers queries on another.

    Args:
        dim: numbers per sketch, k; inner products err by about sqrt(1/k) of the norms.
        kind: ``"tensor"``: TensorSketch per matrix parameter (`kernels/tensor_map.py`), of large layers without their
            weight gradients, fastest where dim is a power of two; vectors go through the sparse map. ``"sparse"``:
            block-permutation CountSketch (`kernels/sparse_map.py`), O(d) per gradient, as faithful. ``"rademacher"``:
            dense signs, O(d k). ``"kronecker"``: two-sided per matrix parameter, cheapest for huge linear layers and
            less faithful. ``"identity"``: no projection, dim is then the number of parameters, or more, which leaves
            columns of zeros.
        seed: which matrix, in [0, 2^64). One seed for all that is compared; ensemble members take different ones.
        nnz: nonzeros per column of R, for ``"sparse"``; more than one serves gradients with few huge entries.
        backend: ``"native"`` (CPU), ``"triton"`` (GPU), ``"torch"``, or None for the fastest present, none of which
            changes the matrix; or, for ``"rademacher"`` on CUDA devices, ``"fast-jl"``, which has a matrix of its own
            (`kernels/fast_jl.py`).
        multiprocessors: for ``"fast-jl"``, the device's number of them, on which that matrix depends; by default that
            of the current CUDA device. No other device may serve the sketch then.

    Raises:
        ValueError: an argument is out of range, or the backend is not present; the message lists those that are.

    >>> sketch = Sketch(dim=64, seed=1)
    >>> x = torch.arange(1.0, 101.0)
    >>> whole = sketch(x)
    >>> whole.shape
    torch.Size([64])
    >>> torch.equal(whole, sketch(x[:30]) + sketch(x[30:], offset=30))
    True
    """

    dim: int = 4096
    kind: str = "tensor"
    seed: int = 0
    nnz: int = 1
    backend: str | None = None
    multiprocessors: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "seed", "nnz"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        _require_dim(self.dim)
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to 2^64 - 1")
        if not 1 <= self.nnz < 1 << 16:
            raise ValueError(f"nnz is {self.nnz}; give a number of nonzeros from 1 to 65535")
        object.__setattr__(self, "multiprocessors", self._projection.multiprocessors)

    @functools.cached_property
    def _projection(self) -> Projection:
        chosen = projection_class(self.kind, self.backend)
        return chosen(self.dim, self.seed, self.nnz, self.backend, self.multiprocessors)

    @property
    def chosen_backend(self) -> str:
        """The backend that serves tensors in main memory, see :meth:`serving` for others."""
        return self.serving("cpu")

    def serving(self, device: str) -> str:
        """The backend that serves tensors on this type of device, such as "cuda".

        Raises:
            ValueError: the backend that was asked for cannot; the message lists those that can.
        """
        return self._projection.serving(device)

    @property
    def is_exact(self) -> bool:
        """Whether inner products are kept exactly: true of the identity alone."""
        return self._projection.is_exact

    def fuses_windows(self, device: str) -> bool:
        """Whether `add_windows_` costs no more than the arithmetic there, however many windows there are."""
        return self.serving(device) in self._projection.fusing_backends

    def accepts_half(self, device: str) -> bool:
        """Whether factors of half precision are best left as they are: tensor cores sum their products in float32."""
        return self.serving(device) in self._projection.half_backends

    def spec(self) -> dict[str, Any]:
        """What defines the matrix, JSON-able; ``"portable"`` says that any backend makes it.

        With backend ``"fast-jl"`` that is its name, and one more entry says for how many multiprocessors.

        >>> Sketch(dim=8).spec()
        {'kind': 'tensor', 'dim': 8, 'seed': 0, 'nnz': 1, 'backend': 'portable'}
        """
        spec = {"kind": self.kind, "dim": self.dim, "seed": self.seed, "nnz": self.nnz, "backend": _PORTABLE}
        if not self._projection.is_portable:
            spec |= {"backend": self.backend, "multiprocessors": self.multiprocessors}
        return spec

    @staticmethod
    def require_spec(spec: Mapping[str, Any]) -> None:
        """Refuse what is no `spec`, whether or not its matrix can be made here.

        Raises:
            ValueError: an entry is missing or unknown, or dim is out of range.
            TypeError: dim is no integer.
        """
        expected = {"kind", "dim", "seed", "nnz", "backend"}
        if spec.get("backend", _PORTABLE) != _PORTABLE:
            expected.add("multiprocessors")
        if set(spec) != expected:
            raise ValueError(f"sketch spec has entries {sorted(spec)}; expected {sorted(expected)}")
        _require_dim(integer("dim", spec["dim"]))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Sketch":
        """The sketch of a `spec`, served by the fastest backend present.

        Raises:
            ValueError: an entry is missing or unknown, or names a backend whose matrix cannot be made here.
        """
        cls.require_spec(spec)
        if "multiprocessors" in spec:
            integer("multiprocessors", spec["multiprocessors"])  # None would mean those of this device
        return cls(**{**spec, "backend": None if spec["backend"] == _PORTABLE else spec["backend"]})

    def __call__(self, x: Tensor | NDArray[Any], offset: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """R[:, offset : offset + n] x.

        Args:
            x: (..., n) floating point numbers, the coordinates [offset, offset + n) of any number of vectors.
            offset: absolute coordinate of the first of them.
            shape: for ``"kronecker"`` and ``"tensor"``, that of the one parameter whose flattened gradients these are.

        Returns:
            (..., dim) float32 on x's device, without a graph.

        Raises:
            ValueError: x has no axis, or the coordinates or the shape do not fit.
            TypeError: x is not floating point.
        """
        rows = floating_tensor(x)
        if rows.ndim == 0:
            raise ValueError("x is a single number; give vectors (..., n)")
        flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
        out = torch.zeros(flat.shape[0], self.dim, dtype=torch.float32, device=flat.device)
        self.add_(out, flat, offset, shape)
        return out.view(*rows.shape[:-1], self.dim)

    @_plain
    def add_(
        self,
        out: Tensor,
        rows: Tensor,
        offset: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Add R[:, offset : offset + n] rows to out, in place.

        Args:
            out: (B, dim) float32, where to add; its last axis contiguous.
            rows: (B, n), gradients of any floating point type, one example a row, of any strides.
            offset: absolute coordinate of the first column of rows.
            shape: for ``"kronecker"`` and ``"tensor"``, that of the one parameter whose flattened gradients the rows
                are; without it, and for shapes of fewer than two axes, the rows go through the sparse map.

        Raises:
            ValueError: shapes, devices or coordinates do not fit.
            TypeError: rows are not floating point or out is not float32.
        """
        self._check(out, rows, 2, "rows (B, n)")
        batch, count = rows.shape
        check_range(offset, count)
        if shape is not None and math.prod(shape) != count:
            raise ValueError(f"shape {tuple(shape)} has {math.prod(shape)} coordinates, but rows have {count}")
        if not batch or not count:
            return
        self._projection.add_(out, rows, offset, shape)

    def hold(self, out: Tensor) -> HeldSketches | None:
        """What may take gradients of all layers for out (B, dim) in place of `add_`, `add_outer_`, `add_windows_`.

        Some are cheaper together: with ``"tensor"`` all layers share a transform; on a CPU small parameters, and
        products of one step, share a call. Its methods say whether they took what they were given, which must fit and
        must not change until `finish_` adds it; neither autograd nor autocast may be on. None where nothing is gained.
        """
        check_out(out, self.dim)
        return self._projection.hold(out)

    @_plain
    def add_outer_(
        self,
        out: Tensor,
        left: Tensor,
        right: Tensor,
        offset: int,
        scale: Tensor | None = None,
    ) -> None:
        """Add R vec(sum_t left_t (x) right_t) to out, in place, without making the B x d matrix.

        This is the gradient of a linear layer's weight (o, i), in C order, when left holds output gradients and right
        inputs.

        Args:
            out: (B, dim) float32, where to add; its last axis contiguous.
            left: (B, T, o) of any floating point type.
            right: (B, T, i).
            offset: absolute coordinate of the weight's first entry.
            scale: (o i,) float32, what each coordinate counts times, a metric's diagonal; None for ones.

        Raises:
            ValueError: shapes, devices or coordinates do not fit.
            TypeError: left or right is not floating point, or out or scale is not float32.
        """
        self._check(out, left, 3, "left (B, T, o)")
        self._check(out, right, 3, "right (B, T, i)")
        if left.shape[1] != right.shape[1]:
            raise ValueError(f"left {tuple(left.shape)} and right {tuple(right.shape)} differ in their second axis, T")
        count = left.shape[2] * right.shape[2]
        check_range(offset, count)
        scale = checked_scale(scale, count, out)
        if 0 in (*left.shape, *right.shape):
            return
        self._projection.add_outer_(out, left, right, offset, scale)

    @_plain
    def add_windows_(
        self,
        out: Tensor,
        left: Tensor,
        right: Tensor,
        taps: Tensor,
        windows: Tensor,
        offset: int,
        scale: Tensor | None = None,
    ) -> None:
        """Add R vec(G), G[o, c, j] = sum_l left[o, l] right[c, taps[j] + windows[l]], to out, in place.

        This is the gradient of a convolution's weight (o, c, J), in C order, when left holds output gradients and right
        the padded input, both with their spatial dimensions flattened: window l and tap j are offsets into a channel.

        Args:
            out: (B, dim) float32, where to add; its last axis contiguous.
            left: (B, o, L) of any floating point type.
            right: (B, c, plane).
            taps: (J,) integers, the offset of each position of the kernel, best in main memory.
            windows: (L,) integers, the offset of each output position, where the taps are.
            offset: absolute coordinate of the weight's first entry.
            scale: (o c J,) float32, what each coordinate counts times, a metric's diagonal; None for ones.

        Raises:
            ValueError: shapes, devices or coordinates do not fit, or a window reaches out of its channel.
            TypeError: left or right is not floating point, out is not float32, or taps or windows are no integers.
        """
        self._check(out, left, 3, "left (B, o, L)")
        self._check(out, right, 3, "right (B, c, plane)")
        check_windows(left, right, taps, windows)
        count = left.shape[1] * right.shape[1] * len(taps)
        check_range(offset, count)
        scale = checked_scale(scale, count, out)
        if 0 in (*left.shape, *right.shape, len(taps)):
            return
        self._projection.add_windows_(out, left, right, taps, windows, offset, scale)

    @_plain
    def add_at_(
        self, out: Tensor, values: Tensor, examples: Tensor, index: Tensor, offset: int, shape: tuple[int, int]
    ) -> None:
        """Add the sketch of a table whose row index[r] holds values[r] to out[examples[r]] for every r, in place.

        For gradients that touch few rows of many, such as an embedding's: one row per token. A pair of example and
        index may occur again.

        Args:
            out: (B, dim) float32, where to add; its last axis contiguous.
            values: (M, n) of any floating point type.
            examples: (M,) int64, from 0 to B - 1.
            index: (M,) int64, which row of the table each value belongs to.
            offset: absolute coordinate of the table's first entry.
            shape: (rows, n), of the table, the one parameter that this is the gradient of.

        Raises:
            ValueError: shapes, devices, examples, index or coordinates do not fit.
            TypeError: values are not floating point, out is not float32, or an index is not int64.
        """
        check_types(out, values, 2, "values (M, n)")
        check_out(out, self.dim)
        if len(shape) != 2 or shape[1] != values.shape[1]:
            raise ValueError(f"shape is {tuple(shape)} for values {tuple(values.shape)}; give (rows, n) of the table")
        check_range(offset, shape[0] * shape[1])
        if values.numel() == 0:
            return
        check_index(values, {"examples": (examples, out.shape[0]), "index": (index, shape[0])})
        self._projection.add_at_(out, values, examples, index, offset, (shape[0], shape[1]))

    def matrix(self, start: int, stop: int, shape: tuple[int, ...] | None = None) -> Tensor:
        """R[:, start : stop] as a dense (dim, stop - start) tensor, for tests and small models.

        >>> Sketch(dim=3, kind="identity").matrix(1, 3)
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]])
        """
        if stop < start:
            raise ValueError(f"stop is {stop}, before start {start}")
        identity = torch.eye(stop - start, device=self._projection.device(), dtype=torch.float32)
        return self(identity, start, shape).T.cpu().contiguous()

    def _check(self, out: Tensor, rows: Tensor, axes: int, name: str) -> None:
        check_types(out, rows, axes, name)
        check_out(out, self.dim)
        if out.shape[0] != rows.shape[0]:
            raise ValueError(f"out has {out.shape[0]} examples, but {name} is {tuple(rows.shape)}")


def _require_dim(dim: int) -> None:
    if not 1 <= dim < 1 << 31:
        raise ValueError(f"dim is {dim}; give a number of columns from 1 to 2^31 - 1")


def exact_sketch(size: int) -> str:
    """What to say where a sketch has as many numbers as gradients, or more."""
    options = f"--sketch-dim {size} --sketch-kind identity"
    return f'Sketch({size}, "identity") (on the command line {options}) is exact, and no larger'
