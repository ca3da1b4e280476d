"""No projection, for tests and small models."""

from torch import Tensor

from source_proj import kernels
from source_proj.sketch.projections.base import Projection

__all__ = ["Identity"]


class Identity(Projection, kind="identity"):
    """R = I: one column per coordinate."""

    backends = ("torch",)
    is_exact = True

    def add_(self, out: Tensor, rows: Tensor, offset: int, shape: tuple[int, ...] | None) -> None:  # noqa: ARG002
        """Of any floating-point type, without a copy in float32."""
        self._add_rows_(out, rows, offset)

    def _add_rows_(self, out: Tensor, rows: Tensor, offset: int) -> None:
        end = offset + rows.shape[1]
        if end > self.dim:
            raise ValueError(
                f"coordinates {offset} to {end} do not fit identity of dim {self.dim}; "
                "set dim to the number of attributed parameters"
            )
        out[:, offset:end] += rows

    def add_outer_(self, out: Tensor, left: Tensor, right: Tensor, offset: int, scale: Tensor | None) -> None:
        """In one product, as the columns hold the whole gradient anyway."""
        gradient = (left.float().transpose(1, 2) @ right.float()).flatten(1)
        self._add_rows_(out, kernels.scaled(gradient, 0, scale), offset)
