"""Gram matrices of stored rows, Σ_i f_i² rows_iᵀ rows_i: what a Hessian is made of.

Rows ``(n, k)`` are float32, float16 or int8, with or without a float32 factor f a row. Products are summed in float32;
of many int8 rows, by instructions for whole numbers, f² rows_i is first rounded to sixteen bits.
Of the symmetric matrix only the part on and above the diagonal is made, half of the operations, in panels of `HEIGHT`
rows: panel p has the columns from p · `HEIGHT` on, and what lies in it below the diagonal is of no meaning.

Backends, which differ by rounding alone:

* native: converts rows as they are packed for the registers, skips what lies below the diagonal, and leaves a block of
  the result in the cache while all rows pass by. Where it pays and the processor can (`_takes_integers`), products are
  of whole numbers.
* torch: the library's product of converted rows, a panel at a time; the plain reference on any device.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .backends import choose_backend
from .native import give_back, require_library, run_jobs, taken

__all__ = ["HEIGHT", "gram_panels", "mirrored", "packed", "packed_size", "panel_count", "unpacked", "upper_panels"]

HEIGHT = 384  # rows of a panel: whole blocks of the compiled code

_SIDE, _STEPS = 192, 64  # of a block: GRAM and GRAM_STEPS of native.c
_INTEGER_STEPS = 128  # INTEGER_STEPS of native.c
_EXACT = 16  # of how many rows the largest one is not rounded to whole numbers
_WORTH_INTEGERS = 1 << 32  # products, half of which are computed, from which on whole numbers are worth their rounding
_TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2}


def gram_panels(rows: Tensor, factor: Tensor | None = None, *, backend: str | None = None) -> list[Tensor]:
    """The upper part of Σ_i f_i² rows_iᵀ rows_i, in panels.

    Args:
        rows: ``(n, k)`` float32, float16 or int8.
        factor: f, ``(n,)`` float32, or None for 1.
        backend: "native" or "torch"; default: the faster one that is present.

    Returns:
        float32 panels ``(HEIGHT, k)``, ``(HEIGHT, k - HEIGHT)``, …; the last one has the rows that are left.

    Raises:
        ValueError: the backend cannot serve on this device.
        TypeError: the types are others.

    Example:
        >>> gram_panels(torch.tensor([[1, 2], [0, 3]], dtype=torch.int8), torch.tensor([2.0, 1.0]))[0].triu().tolist()
        [[4.0, 8.0], [0.0, 25.0]]
    """
    if rows.dtype not in _TYPES or (factor is not None and factor.dtype != torch.float32):
        raise TypeError(
            f"rows must be float32, float16 or int8 and their factors float32, got {rows.dtype} and "
            f"{None if factor is None else factor.dtype}"
        )
    chosen = choose_backend(backend, rows.device.type, ("native", "torch"), "Gram matrices")
    return _native(rows, factor) if chosen == "native" else _torch(rows, factor)


def mirrored(panels: Sequence[Tensor]) -> Tensor:
    """The symmetric matrix ``(k, k)`` of its panels, of their type."""
    dim = panels[0].shape[1]
    matrix = panels[0].new_empty(dim, dim)
    for start, panel in zip(range(0, dim, HEIGHT), panels, strict=True):
        stop = start + len(panel)
        square = panel[:, : len(panel)]
        matrix[start:stop, start:stop] = square.triu() + square.triu(1).T
        matrix[start:stop, stop:] = panel[:, len(panel) :]
        matrix[stop:, start:stop] = panel[:, len(panel) :].T
    return matrix


def upper_panels(matrix: Tensor) -> list[Tensor]:
    """The panels of a matrix ``(k, k)``, which share its memory."""
    return [matrix[start : start + HEIGHT, start:] for start in range(0, len(matrix), HEIGHT)]


def panel_count(dim: int) -> int:
    """Number of panels of a matrix ``(k, k)``.

    >>> panel_count(384), panel_count(385)
    (1, 2)
    """
    return len(_shapes(dim))


def packed(panels: Sequence[Tensor]) -> Tensor:
    """The panels of a matrix one after the other, one-dimensional: little more than half of it."""
    return torch.cat([panel.flatten() for panel in panels])


def packed_size(dim: int) -> int:
    """Numbers that `packed` has of a matrix ``(k, k)``.

    >>> packed_size(3), packed_size(384 + 1)
    (9, 147841)
    """
    return sum(high * wide for high, wide in _shapes(dim))


def unpacked(values: Tensor, dim: int) -> list[Tensor]:
    """The panels that `packed` put together; they share its memory."""
    shapes = _shapes(dim)
    parts = values.split([high * wide for high, wide in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _shapes(dim: int) -> list[tuple[int, int]]:
    return [(min(HEIGHT, dim - start), dim - start) for start in range(0, dim, HEIGHT)]


def _torch(rows: Tensor, factor: Tensor | None) -> list[Tensor]:
    plain = rows.float() if factor is None else rows.float().mul(factor[:, None])
    return [plain[:, start : start + HEIGHT].T @ plain[:, start:] for start in range(0, plain.shape[1], HEIGHT)]


def _native(rows: Tensor, factor: Tensor | None) -> list[Tensor]:
    n, dim = rows.shape
    # Zeros, as what no block is written to is stored, too.
    panels = [torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in _shapes(dim)]
    exact = n  # rows whose products are of floats
    strips = [rows[:, start : start + _SIDE] for start in range(0, dim, _SIDE)]
    if _takes_integers(rows, factor):
        exact = 0
        if factor is not None:
            # Rounding is beside the largest factor of a group: groups are of one size, and the largest rows exact.
            factor, order = factor.abs().sort(descending=True, stable=True)
            strips, exact = [strip.index_select(0, order) for strip in strips], n // _EXACT
    strips = [strip.contiguous() for strip in strips]
    factor = None if factor is None else factor.contiguous()

    def make(row: int) -> None:
        """The blocks of a strip's columns with those at its place and after it."""
        work = taken(_SIDE * (_SIDE + 2 * _STEPS))
        above, start = divmod(row * _SIDE, HEIGHT)
        panel = panels[above][start:, start:]
        for place, right in enumerate(strips[row:]):
            _multiply(panel[:, place * _SIDE :], strips[row], right, factor, exact, work)
        give_back(work)

    run_jobs([partial(make, row) for row in range(len(strips))], 0.012 * n * dim**2)
    return panels


def _takes_integers(rows: Tensor, factor: Tensor | None) -> bool:
    """Whether products are of whole numbers: 1.6 times as fast with AVX-512's instructions for them (VNNI).

    That is on one core of Zen 4, at k = 1,024 and 4,096. The rounding of f² rows to sixteen bits moves Ĥ by 10⁻⁴ of
    tr(Ĥ)/k or less, whether rows are of one size or log-normal ones, as the largest sixteenth of them is not rounded.
    """
    return (
        rows.dtype == torch.int8
        and rows.shape[0] * rows.shape[1] ** 2 >= _WORTH_INTEGERS
        and bool(require_library().sp_integers())
        and (factor is None or bool(factor.isfinite().all()))
    )


def _multiply(out: Tensor, left: Tensor, right: Tensor, factor: Tensor | None, exact: int, work: Tensor) -> None:
    """A block of the result, of two strips without gaps: of so many rows by floats, then by whole numbers."""
    library, block = require_library(), (out.data_ptr(), out.stride(0))
    n, own = len(left), None if factor is None else factor.data_ptr()
    if exact:
        library.sp_gram(
            *block, left.data_ptr(), left.shape[1], right.data_ptr(), right.shape[1], own, exact, _TYPES[left.dtype],
            work.data_ptr(),
        )  # fmt: skip
    if exact < n:
        library.sp_gram_integer(
            *block, left[exact:].data_ptr(), left.shape[1], right[exact:].data_ptr(), right.shape[1],
            None if factor is None else factor[exact:].data_ptr(), n - exact, work.data_ptr(),
        )  # fmt: skip
