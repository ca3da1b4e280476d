"""Dense random signs, O(d k) per gradient (`kernels/rademacher.py` has the definition)."""

from torch import Tensor

from source_proj import kernels
from source_proj.sketch.projections.base import Projection

__all__ = ["Rademacher"]


class Rademacher(Projection, kind="rademacher"):
    """Every entry is ±1/√k, made tile by tile and never kept."""

    def _add_rows_(self, out: Tensor, rows: Tensor, offset: int) -> None:
        kernels.rademacher_add_(out, rows, offset, seed=self.seed, backend=self.serving(out.device.type))
