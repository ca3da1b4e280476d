"""Launches the compiled kernels of the tensor map (`tensor_map.py`) by the cheaper of its two routes.

* outer: the kernels of the sparse map, which take a tensor map's tables as well (`sparse_native.py`);
* spectral: for k a power of two, one complex transform of length k for every step and one back, an example at a time
  (`native_spectral.c`). The way back is linear, so all layers share one.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from math import inf, log2

import torch
from torch import Tensor

from .native import (
    Addition,
    NativeMap,
    NativeProduct,
    aligned_scratch,
    give_back,
    require_library,
    run_additions,
    run_jobs,
    taken,
)
from .sparse_native import (
    add_at_native_,
    add_native_,
    add_outer_native_,
    add_windows_native_,
    address,
    last_contiguous,
    product_nanoseconds,
)
from .tensor_map import TensorMap

__all__ = [
    "HELD",
    "NativeSpectra",
    "add_tensor_at_native_",
    "add_tensor_native_",
    "add_tensor_outer_native_",
    "add_tensor_windows_native_",
    "has_transform",
    "numbers_held",
    "spectral_is_cheaper",
    "spectral_nanoseconds",
]

_FEWEST, _MOST = 8, 16  # powers of two between which k has a transform here
_JOBS = 8  # that a large sum is split into, at least
_PART_STEPS = 16  # of a part at least: each has sums of its own
_SHARE = 8  # examples that a thread takes at once
_TOGETHER = 4  # of native.c
HELD = 1 << 24  # numbers of sums that are held at one time
# Nanoseconds of a step of an example's transform: for each k log2 k, each entry of the factors (of windows, which are
# gathered), and to begin. By lanes, beside the products' of `sparse_native.py`; those for 16 and 4 are scaled.
_TRANSFORM, _BEGIN = {16: 0.038, 8: 0.09, 4: 0.08}, 100.0
_ENTRY, _WINDOW_ENTRY = 1.0, 2.3

# add(sums, whether they are fresh, first example, last, part): adds a part of the steps of some examples
_Add = Callable[[Tensor, bool, int, int, int], None]


def spectral_is_cheaper(
    batch: int, steps: int, o: int, i: int, dim: int, *, shared: bool = False, windows: bool = False
) -> bool:
    """Whether the transforms of so many steps cost less than the outer products of (o, i) coordinates.

    With `shared`, the way back costs nothing: other layers take it as well; with `windows`, the steps are those of a
    convolution.
    """
    alternative = product_nanoseconds(batch, steps, o, i, windows=windows)
    return spectral_nanoseconds(batch, steps, o + i, dim, shared=shared, windows=windows) < alternative


def spectral_nanoseconds(
    batch: int, steps: int, entries: int, dim: int, *, shared: bool, windows: bool = False
) -> float:
    """What the transforms of so many steps cost, whose two factors have so many entries; infinite for other k."""
    if not has_transform(dim):
        return inf
    placed = (_WINDOW_ENTRY if windows else _ENTRY) * entries
    return batch * ((steps + (not shared)) * _TRANSFORM[_width()] * dim * log2(dim) + steps * (_BEGIN + placed))


def has_transform(dim: int) -> bool:
    """Whether k is a power of two of the right size."""
    return dim & (dim - 1) == 0 and 1 << _FEWEST <= dim <= 1 << _MOST


def _require_transform(dim: int) -> None:
    if not has_transform(dim):
        raise ValueError(
            f"compiled transforms are of a power of two from {1 << _FEWEST} to {1 << _MOST} numbers, got {dim}; "
            "spectral=False takes the outer route"
        )


def add_tensor_native_(out: Tensor, rows: Tensor, offset: int, matrix: TensorMap) -> None:
    """Add R[:, offset : offset + n] rows (B, n), coordinates of the parameter, to out (B, k)."""
    add_native_(out, rows, offset, _native(matrix))


def add_tensor_at_native_(out: Tensor, values: Tensor, examples: Tensor, index: Tensor, matrix: TensorMap) -> None:
    """Add R vec(e_index[r] (x) values[r]) to out[examples[r]] for every r."""
    add_at_native_(out, values, examples, matrix.offset + matrix.shape[1] * index, _native(matrix))


class NativeSpectra:
    """Sums of products in the frequency domain, for all layers of a batch, until `finish_` adds them to out.

    Products of few steps are kept as they are, as sums of all examples would take more memory.

    Args:
        out: (B, k) float32.
    """

    def __init__(self, out: Tensor) -> None:
        self._out = out
        self._sums: Tensor | None = None  # of each example k pairs
        self._kept: list[NativeProduct] = []

    def add_outer(self, left: Tensor, right: Tensor, matrix: TensorMap) -> None:
        """Add R vec(sum_t left_t (x) right_t), for left (B, T, o) and right (B, T, i), unchanged until `finish_`."""
        _require_transform(matrix.dim)
        (batch, steps, o), i, dim = left.shape, right.shape[2], matrix.dim
        left, right, native = last_contiguous(left), last_contiguous(right), _native(matrix)
        if steps * (o + i) <= numbers_held(1, dim):
            self._kept.append(NativeProduct(left, right, native))
            return
        step, work = -(-steps // _parts(batch, steps)), 4 * dim + o + i
        twiddles = _twiddles(dim, _width())  # held here: threads that ask at once for the first time get their own

        def add(sums: Tensor, fresh: bool, first: int, last: int, part: int) -> None:
            begin = part * step
            require_library().sp_spectral_outer(
                sums.data_ptr(),
                aligned_scratch("spectral", work).data_ptr(),
                fresh,
                address(left, 0, 0) + 4 * begin * left.stride(1),
                left.stride(0),
                left.stride(1),
                address(right, 0, 0) + 4 * begin * right.stride(1),
                right.stride(0),
                right.stride(1),
                first,
                last,
                min(step, steps - begin),
                o,
                i,
                native,
                twiddles.data_ptr(),
            )

        self._add(-(-steps // step), _nanoseconds(batch, steps, dim), add)

    def add_windows(
        self,
        left: Tensor,
        right: Tensor,
        taps: Tensor,
        windows: Tensor,
        matrix: TensorMap,
        scale: Tensor | None = None,
    ) -> None:
        """Add R vec(G), G[b, o, c, j] = scale[c, j] sum_l left[b, o, l] right[b, c, taps[j] + windows[l]]."""
        _require_transform(matrix.dim)
        (batch, o, count), (_, c, plane), dim, j = left.shape, right.shape, matrix.dim, len(taps)
        left, right, native = left.contiguous(), right.contiguous(), _native(matrix)
        taps, windows = taps.int().contiguous(), windows.int().contiguous()
        scale = None if scale is None else scale.contiguous()
        step, twiddles = -(-count // _parts(batch, count)), _twiddles(dim, _width())
        work = 4 * dim + o + 2 * c * j + (o + _width()) * step

        def add(sums: Tensor, fresh: bool, first: int, last: int, part: int) -> None:
            require_library().sp_spectral_windows(
                sums.data_ptr(),
                aligned_scratch("spectral", work).data_ptr(),
                fresh,
                address(left, 0, 0),
                left.stride(0),
                count,
                address(right, 0, 0),
                right.stride(0),
                plane,
                taps.data_ptr(),
                windows.data_ptr(),
                first,
                last,
                o,
                part * step,
                min(part * step + step, count),
                c,
                j,
                None if scale is None else scale.data_ptr(),
                native,
                twiddles.data_ptr(),
            )

        self._add(-(-count // step), _nanoseconds(batch, count, dim), add)

    @property
    def begun(self) -> bool:
        """Whether there is anything to transform back."""
        return self._sums is not None or bool(self._kept)

    def finish_(self) -> None:
        """Transform back, all layers at once."""
        run_additions(len(self._out), self.addition())

    def addition(self) -> Addition | None:
        """What transforms back and adds all that is kept, and is not kept any more; None where there is nothing."""
        if not self.begun:
            return None
        out, sums, kept, (batch, dim) = self._out, self._sums, self._kept, self._out.shape
        self._sums, self._kept = None, []
        products = (NativeProduct * len(kept))(*kept)
        work = numbers_held(_TOGETHER, dim) + max((4 * dim + x.o + x.i for x in kept), default=0)
        twiddles = _twiddles(dim, _width())

        def add(first: int, last: int) -> None:
            require_library().sp_finish(
                out.data_ptr(),
                out.stride(0),
                None if sums is None else sums.data_ptr(),
                aligned_scratch("spectral", work).data_ptr(),
                products,
                len(kept),
                first,
                last,
                dim,
                twiddles.data_ptr(),
            )

        return Addition(add, _nanoseconds(batch, sum(x.steps for x in kept), dim), sums)

    def _add(self, parts: int, nanoseconds: float, add: _Add) -> None:
        """Each part but the first has sums of its own, which are added in order: no thread changes a bit."""
        fresh, size = self._sums is None, numbers_held(*self._out.shape)
        if self._sums is None:
            self._sums = taken(size)
        sums = [self._sums, *(taken(size) for _ in range(parts - 1))]
        jobs = [partial(add, own, fresh or part > 0, *some, part) for part, own in enumerate(sums)
                for some in self._shares()]  # fmt: skip
        run_jobs(jobs, nanoseconds)
        for own in sums[1:]:
            self._sums[:size].add_(own[:size])
            give_back(own)

    def _shares(self) -> list[tuple[int, int]]:
        """Ranges of examples."""
        batch = len(self._out)
        share = batch if torch.get_num_threads() == 1 else _SHARE
        return [(first, min(first + share, batch)) for first in range(0, batch, share)]


def numbers_held(batch: int, dim: int) -> int:
    """How many numbers the sums of so many examples are."""
    return batch * 2 * dim


def add_tensor_outer_native_(
    out: Tensor, left: Tensor, right: Tensor, matrix: TensorMap, *, spectral: bool, scale: Tensor | None
) -> None:
    """Add R vec(sum_t left_t (x) right_t), for left (B, T, o) and right (B, T, i), to out (B, k)."""
    if not spectral:
        add_outer_native_(out, left, right, matrix.offset, _native(matrix), scale)
        return
    for some in _rounds(len(out), left.shape[1], matrix.dim):
        spectra = NativeSpectra(out[some])
        spectra.add_outer(left[some], right[some], matrix)
        spectra.finish_()


def add_tensor_windows_native_(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    taps: Tensor,
    windows: Tensor,
    matrix: TensorMap,
    *,
    spectral: bool,
    scale: Tensor | None,
) -> None:
    """Add R vec(G), G[b, o, c, j] = sum_l left[b, o, l] right[b, c, taps[j] + windows[l]], to out (B, k)."""
    if not spectral:
        add_windows_native_(out, left, right, taps, windows, matrix.offset, _native(matrix), scale)
        return
    for some in _rounds(len(out), left.shape[2], matrix.dim):
        spectra = NativeSpectra(out[some])
        spectra.add_windows(left[some], right[some], taps, windows, matrix)
        spectra.finish_()


def _rounds(batch: int, steps: int, dim: int) -> Iterator[slice]:
    """Examples whose sums, of all parts, may be held at once."""
    count = max(1, HELD // (numbers_held(1, dim) * _parts(batch, steps)))
    return (slice(start, start + count) for start in range(0, batch, count))


def _parts(batch: int, steps: int) -> int:
    """How many parts the steps are split into, by shapes alone."""
    return max(1, min(-(-_JOBS // batch), steps // _PART_STEPS))


def _nanoseconds(batch: int, steps: int, dim: int) -> float:
    return batch * (steps + 1) * _TRANSFORM[_width()] * dim * log2(dim)


def _native(matrix: TensorMap) -> NativeMap:
    left, right = matrix.tables(torch.device("cpu"))
    return NativeMap(matrix.dim, offset=matrix.offset, left=left, right=right)


@functools.lru_cache(maxsize=16)
def _twiddles(dim: int, lanes: int) -> Tensor:  # noqa: ARG001, the order follows from them
    """exp(-2 pi i t / k), each rounded once, in the order in which the transforms over so many lanes use them."""
    angles = torch.arange(dim, dtype=torch.float64, device="cpu") * (-2 * torch.pi / dim)
    twiddles = torch.stack([angles.cos(), angles.sin()], dim=1).float().contiguous()  # (k, 2)
    table = torch.empty(2 * dim, dtype=torch.float32, device="cpu")
    require_library().sp_spectral_table(table.data_ptr(), twiddles.data_ptr(), dim)
    return table


def _width() -> int:
    lanes: int = require_library().sp_lanes()
    return lanes
