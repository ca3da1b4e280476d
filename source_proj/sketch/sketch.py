"""The sketch: a random projection of gradients whose matrix is a pure function of seed, coordinate and column."""

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from numpy.typing import NDArray
from torch import Tensor

from source_proj import kernels
from source_proj.sketch.checks import check_range, check_types, check_windows, checked_scale, floating_tensor, integer

__all__ = ["Sketch"]

_PORTABLE = "portable"  # in a spec: the matrix that every backend makes
_CONVERTED = 1 << 16  # coordinates that are converted to float32 at once
_SCALED_TILE = 1 << 18  # numbers of a tile of scaled gradients


_Arguments = ParamSpec("_Arguments")


def _plain(method: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Without a graph, and in full precision also where the caller's model runs under autocast."""

    @functools.wraps(method)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        with torch.no_grad(), ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
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
        kind: ``"sparse"``: block-permutation CountSketch (`source_proj.kernels.sparse`), O(d) per gradient;
            ``"rademacher"``: dense signs, O(d k); ``"kronecker"``: two-sided per matrix parameter, cheapest for huge
            linear layers and less faithful (its vectors go through the sparse map); ``"identity"``: no projection,
            dim is then the number of parameters.
        seed: which matrix, in [0, 2^64). One seed for all that is compared; ensemble members take different ones.
        nnz: nonzeros per column of R for the sparse map; more than one serves gradients with few huge entries.
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
    kind: str = "sparse"
    seed: int = 0
    nnz: int = 1
    backend: str | None = None
    multiprocessors: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "seed", "nnz"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        if not 1 <= self.dim < 1 << 31:
            raise ValueError(f"dim is {self.dim}; give a number of columns from 1 to 2^31 - 1")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to 2^64 - 1")
        if not 1 <= self.nnz < 1 << 16:
            raise ValueError(f"nnz is {self.nnz}; give a number of nonzeros from 1 to 65535")
        self._check_backend()
        if self.nnz > 1 and self.kind in ("rademacher", "identity"):
            raise ValueError(f"nnz is {self.nnz}, but kind {self.kind!r} has no choice of nonzeros; leave nnz at 1")

    def _check_backend(self) -> None:
        if self.backend == "fast-jl" and self.kind == "rademacher":
            found = kernels.require_fast_jl(self.dim, self.multiprocessors)
            object.__setattr__(self, "multiprocessors", found.multiprocessors)
            return
        kernels.require_backend(self.kind, self.backend)
        if self.multiprocessors is not None:
            raise ValueError(
                f"multiprocessors is {self.multiprocessors}, but only the matrix of backend 'fast-jl' depends on them; "
                "leave it out"
            )

    @property
    def chosen_backend(self) -> str:
        """The backend that serves tensors in main memory, see :meth:`serving` for others."""
        return self.serving("cpu")

    def serving(self, device: str) -> str:
        """The backend that serves tensors on this type of device, such as "cuda".

        Raises:
            ValueError: the backend that was asked for cannot; the message lists those that can.
        """
        return kernels.choose_backend(self.kind, self.backend, device)

    @property
    def is_exact(self) -> bool:
        """Whether inner products are kept exactly: true of the identity alone."""
        return self.kind == "identity"

    def spec(self) -> dict[str, Any]:
        """What defines the matrix, JSON-able; ``"portable"`` says that any backend makes it.

        With backend ``"fast-jl"`` that is its name, and one more entry says for how many multiprocessors.

        >>> Sketch(dim=8).spec()
        {'kind': 'sparse', 'dim': 8, 'seed': 0, 'nnz': 1, 'backend': 'portable'}
        """
        found = {"kind": self.kind, "dim": self.dim, "seed": self.seed, "nnz": self.nnz, "backend": _PORTABLE}
        if self.multiprocessors is not None:
            found |= {"backend": self.backend, "multiprocessors": self.multiprocessors}
        return found

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Sketch":
        """The sketch of a `spec`, served by the fastest backend present.

        Raises:
            ValueError: an entry is missing or unknown, or names a backend whose matrix cannot be made here.
        """
        wanted = {"kind", "dim", "seed", "nnz", "backend"}
        if spec.get("backend") == "fast-jl":
            wanted.add("multiprocessors")
        if set(spec) != wanted:
            raise ValueError(f"sketch spec has entries {sorted(spec)}; expected {sorted(wanted)}")
        if "multiprocessors" in spec:
            integer("multiprocessors", spec["multiprocessors"])  # None would mean those of this device
        return cls(**{**spec, "backend": None if spec["backend"] == _PORTABLE else spec["backend"]})

    def __call__(self, x: Tensor | NDArray[Any], offset: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """R[:, offset : offset + n] x.

        Args:
            x: (..., n) floating point numbers, the coordinates [offset, offset + n) of any number of vectors.
            offset: absolute coordinate of the first of them.
            shape: for ``"kronecker"``, the shape of the one parameter whose flattened gradients these are.

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
    def add_(self, out: Tensor, rows: Tensor, offset: int = 0, shape: tuple[int, ...] | None = None) -> None:
        """Add R[:, offset : offset + n] rows to out, in place.

        Args:
            out: (B, dim) float32, where to add; its last axis contiguous.
            rows: (B, n), gradients of any floating point type, one example a row, of any strides.
            offset: absolute coordinate of the first column of rows.
            shape: for ``"kronecker"``, the shape of the one parameter whose flattened gradients the rows are; without
                it, and for shapes of fewer than two axes, the rows go through the sparse map.

        Raises:
            ValueError: shapes, devices or coordinates do not fit.
            TypeError: rows are not floating point or out is not float32.
        """
        self._check(out, rows, 2, "rows (B, n)")
        batch, count = rows.shape
        check_range(offset, count)
        if shape is not None and math.prod(shape) != count:
            raise ValueError(f"shape {tuple(shape)} has {math.prod(shape)} coordinates, but rows have {count}")
        if batch == 0 or count == 0:
            return
        if self.kind == "identity":
            self._check_identity(offset, count)
            out[:, offset : offset + count] += rows
        elif self.kind == "kronecker" and shape is not None and len(shape) > 1:
            matrix = (shape[0], count // shape[0])
            kernels.kronecker_add_(out, rows.float(), offset, matrix, seed=self.seed, backend=self._serving(out))
        elif rows.dtype == torch.float32 or self._serving(out) == "triton":
            self._add_rows(out, rows, offset)
        elif self.backend == "fast-jl":  # whose pieces cost as much as whole blocks
            self._add_rows(out, rows.float(), offset)
        else:
            for start in range(0, count, _CONVERTED):
                self._add_rows(out, rows[:, start : start + _CONVERTED].float(), offset + start)

    def _add_rows(self, out: Tensor, rows: Tensor, offset: int) -> None:
        backend = self._serving(out)
        if self.kind == "rademacher":
            kernels.rademacher_add_(
                out, rows, offset, seed=self.seed, backend=backend, multiprocessors=self.multiprocessors
            )
        else:
            kernels.sparse_add_(out, rows, offset, seed=self.seed, nnz=self.nnz, backend=backend)

    @_plain
    def add_outer_(self, out: Tensor, left: Tensor, right: Tensor, offset: int, scale: Tensor | None = None) -> None:
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
        backend = self._serving(out)
        if backend != "triton" or self.kind != "sparse":
            left, right = left.float(), right.float()
        if self.kind == "identity":
            self._check_identity(offset, count)
            out[:, offset : offset + count] += kernels.scaled((left.transpose(1, 2) @ right).flatten(1), 0, scale)
        elif self.kind == "sparse":
            options: dict[str, Any] = {"seed": self.seed, "nnz": self.nnz, "backend": backend}
            kernels.sparse_add_outer_(out, left, right, offset, scale=scale, **options)
        elif scale is not None:
            self._add_scaled_outer(out, left, right, offset, scale)
        elif self.kind == "kronecker":
            kernels.kronecker_add_outer_(out, left, right, offset, seed=self.seed, backend=backend)
        else:
            kernels.rademacher_add_outer_(
                out, left, right, offset, seed=self.seed, backend=backend, multiprocessors=self.multiprocessors
            )

    def _add_scaled_outer(self, out: Tensor, left: Tensor, right: Tensor, offset: int, scale: Tensor) -> None:
        """The product tile by tile; whole matrices, of few examples, for the two-sided kind."""
        shape = (left.shape[2], right.shape[2])
        if self.kind == "kronecker":
            step = max(1, _SCALED_TILE // math.prod(shape))
            for b in range(0, len(left), step):
                some = slice(b, b + step)
                whole = (left[some].transpose(1, 2) @ right[some]).flatten(1)
                self.add_(out[some], kernels.scaled(whole, 0, scale), offset, shape)
            return
        for some, start, tile in kernels.outer_tiles(left, right, _SCALED_TILE):
            self.add_(out[some], kernels.scaled(tile, start, scale), offset + start)

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
        backend = self._serving(out)
        if backend != "triton":
            left, right = left.float(), right.float()
        if self.kind == "sparse":
            kernels.sparse_add_windows_(
                out, left, right, taps, windows, offset, seed=self.seed, nnz=self.nnz, backend=backend, scale=scale
            )
            return
        for some, columns in kernels.window_columns(right, taps, windows):
            self.add_outer_(out[some], left[some].transpose(1, 2), columns, offset, scale)

    @_plain
    def add_at_(self, out: Tensor, rows: Tensor, examples: Tensor, offsets: Tensor) -> None:
        """Add R[:, offsets[r] : offsets[r] + n] rows[r] to out[examples[r]] for every row r, in place.

        For gradients that touch few of many coordinates, such as an embedding's: one row per token, at the offset of
        that token's vector. A pair of example and offset may occur again; ``"kronecker"`` uses its sparse map here.

        Args:
            out: (B, dim) float32, where to add; its last axis contiguous.
            rows: (M, n) of any floating point type.
            examples: (M,) int64, from 0 to B - 1.
            offsets: (M,) int64, absolute coordinate of each row's first entry.

        Raises:
            ValueError: shapes, devices, examples or coordinates do not fit.
            TypeError: rows are not floating point, out is not float32, or an index is not int64.
        """
        check_types(out, rows, 2, "rows (M, n)")
        self._check_out(out)
        for name, index in (("examples", examples), ("offsets", offsets)):
            if index.dtype != torch.int64:
                raise TypeError(f"{name} is {index.dtype}; give torch.int64")
            if index.shape != rows.shape[:1] or index.device != rows.device:
                raise ValueError(
                    f"{name} is {tuple(index.shape)} on {index.device} for rows {tuple(rows.shape)} on {rows.device}; "
                    "give one entry per row"
                )
        if rows.numel() == 0:
            return
        ends = torch.stack([*examples.aminmax(), *offsets.aminmax()])
        first, last, lowest, highest = ends.tolist()  # waits for a GPU once
        if first < 0 or last >= out.shape[0]:
            raise ValueError(f"examples run from {first} to {last}; out has {out.shape[0]}")
        check_range(lowest, 0)
        check_range(highest, rows.shape[1])
        if self.kind in ("sparse", "kronecker"):
            backend = self._serving(out)
            kernels.sparse_add_at_(out, rows.float(), examples, offsets, seed=self.seed, nnz=self.nnz, backend=backend)
            return
        if self.backend == "fast-jl":
            kernels.fast_jl_add_at_(
                out, rows.float(), examples, offsets, seed=self.seed, multiprocessors=self.multiprocessors
            )
            return
        for offset in torch.unique(offsets).tolist():
            here = offsets == offset
            out.index_add_(0, examples[here], self(rows[here], offset))

    def matrix(self, start: int, stop: int, shape: tuple[int, ...] | None = None) -> Tensor:
        """R[:, start : stop] as a dense (dim, stop - start) tensor, for tests and small models.

        >>> Sketch(dim=3, kind="identity").matrix(1, 3)
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]])
        """
        if stop < start:
            raise ValueError(f"stop is {stop}, before start {start}")
        device = None
        if self.backend == "fast-jl":
            device = kernels.require_fast_jl(self.dim, self.multiprocessors).device
        return self(torch.eye(stop - start, device=device), start, shape).T.cpu().contiguous()

    def _serving(self, out: Tensor) -> str:
        return self.serving(out.device.type)

    def _check(self, out: Tensor, rows: Tensor, axes: int, name: str) -> None:
        check_types(out, rows, axes, name)
        self._check_out(out)
        if out.shape[0] != rows.shape[0]:
            raise ValueError(f"out has {out.shape[0]} examples, but {name} is {tuple(rows.shape)}")

    def _check_out(self, out: Tensor) -> None:
        if out.ndim != 2 or out.shape[1] != self.dim:
            raise ValueError(f"out is {tuple(out.shape)}; give (B, {self.dim})")
        if out.numel() and ((out.stride(1) != 1 and self.dim > 1) or (out.stride(0) < self.dim and out.shape[0] > 1)):
            raise ValueError(f"out has strides {out.stride()}; give rows that are contiguous and do not overlap")

    def _check_identity(self, offset: int, count: int) -> None:
        if offset + count > self.dim:
            raise ValueError(
                f"coordinates {offset} to {offset + count} do not fit identity of dim {self.dim}; "
                "set dim to the number of attributed parameters"
            )
