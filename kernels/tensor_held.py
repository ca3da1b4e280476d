"""What is cheaper for all layers of a batch together: one transform back, and one call for all small parameters."""

import torch
from torch import Tensor

from .native import run_additions
from .products_native import HeldProducts, held_nanoseconds
from .small_rows import MOST_COORDINATES, Piece, SmallRows, add_by_table_
from .tensor_map import TensorMap
from .tensor_native import HELD, NativeSpectra, has_transform, numbers_held, spectral_is_cheaper, spectral_nanoseconds
from .tensor_spectral import TorchSpectra, spectral_pays

__all__ = ["HeldSums", "is_spectral"]

_MOST_ROWS = 1 << 22  # numbers of small parameters that are kept at one time


class HeldSums:
    """Small parameters, and products that go the spectral route, of all layers of a batch until `finish_`.

    Args:
        out: (B, k) float32, where `finish_` adds.
        backend: "native", "triton" or "torch".
        seed: of the sparse map.
    """

    def __init__(self, out: Tensor, backend: str, seed: int) -> None:
        self._out, self._backend, self._seed = out, backend, seed
        self._small = SmallRows()
        self._products = HeldProducts(out) if backend == "native" else None
        self._spectra = NativeSpectra(out) if backend == "native" else TorchSpectra(out, backend)
        batch, dim = out.shape
        self._may_transform = backend != "native" or (has_transform(dim) and numbers_held(batch, dim) <= HELD)

    def takes_rows(self, rows: Tensor, start: int, matrix: TensorMap | None = None) -> bool:
        """Keep rows (B, n) of a small parameter, under the sparse map or a tensor map; False where it is not small."""
        piece = Piece(start, rows.shape[1], self._out.shape[1], self._seed, matrix)
        if self._products is not None:
            return self._products.takes_rows(rows, piece)
        if rows.shape[1] > MOST_COORDINATES:
            return False
        self._small.take(rows, piece)
        if len(self._small) > _MOST_ROWS:
            self._add_small_()
        return True

    def takes_outer(self, left: Tensor, right: Tensor, matrix: TensorMap) -> bool:
        """Keep sum_t left_t (x) right_t, as `tensor_add_outer_` adds it; False where that costs less."""
        if self._takes_product(left, right, matrix):
            return True
        if matrix.shape[0] * matrix.shape[1] <= MOST_COORDINATES:
            return self.takes_rows(_product(left.float(), right.float()), matrix.offset, matrix)
        if not self._may_transform or not is_spectral(self._backend, left, right.shape[2], matrix.dim, shared=True):
            return False
        self._spectra.add_outer(left, right, matrix)
        return True

    def takes_windows(
        self,
        left: Tensor,
        right: Tensor,
        taps: Tensor,
        windows: Tensor,
        matrix: TensorMap,
        scale: Tensor | None = None,
    ) -> bool:
        """Keep a convolution's gradient, as `tensor_add_windows_` adds it; False where that costs less.

        With a scale (c J,), each column of the gradient times its entry.
        """
        (batch, o, count), i = left.shape, matrix.shape[1]
        if not self._may_transform:
            return False
        if isinstance(self._spectra, NativeSpectra):
            pays = spectral_is_cheaper(batch, count, o, i, matrix.dim, shared=True, windows=True)
        else:
            pays = is_spectral(self._backend, left.transpose(1, 2), i, matrix.dim)
        if pays:
            self._spectra.add_windows(left, right, taps, windows, matrix, scale)
        return pays

    def finish_(self) -> None:
        """Add all that is kept."""
        if isinstance(self._spectra, NativeSpectra) and self._products is not None:
            run_additions(len(self._out), self._products.addition(), self._spectra.addition())
            return
        self._add_small_()
        self._spectra.finish_()

    def _takes_product(self, left: Tensor, right: Tensor, matrix: TensorMap) -> bool:
        """Keep the product of one step with those of other layers, where no transform costs less."""
        (batch, steps, o), i = left.shape, right.shape[2]
        if not isinstance(self._spectra, NativeSpectra) or self._products is None or steps > 1:
            return False
        if self._may_transform:
            spectral = spectral_nanoseconds(batch, 1, o + i, matrix.dim, shared=self._spectra.begun)
            if spectral < held_nanoseconds(batch, o, i):
                return False
        piece = Piece(matrix.offset, o * i, matrix.dim, self._seed, matrix)
        return self._products.takes_product(left.squeeze(1), right.squeeze(1), piece)

    def _add_small_(self) -> None:
        if (given := self._small.give()) is not None:
            add_by_table_(self._out, *given)


def is_spectral(backend: str, left: Tensor, i: int, dim: int, *, shared: bool = False) -> bool:
    """Whether transforms cost less than the product; `shared`: the way back is another layer's, too."""
    batch, steps, o = left.shape
    if backend == "native":
        return spectral_is_cheaper(batch, steps, o, i, dim, shared=shared)
    return spectral_pays(backend, batch, steps, o, i, dim, half=left.dtype != torch.float32)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """sum_t left_t (x) right_t, (B, o i)."""
    if left.shape[1] == 1:  # a batched product of so few numbers would cost its calls
        return (left[:, 0, :, None] * right[:, 0, None, :]).flatten(1)
    return (left.transpose(1, 2) @ right).flatten(1)
