"""Random projections whose matrices are pure functions of a seed: plain references, fast paths and their launchers."""

from .backends import BACKENDS, available_backends, choose_backend
from .fast_jl import fast_jl_add_, fast_jl_add_at_, fast_jl_add_outer_, require_fast_jl
from .kronecker import kronecker_add_, kronecker_add_outer_, kronecker_split
from .likelihood import label_likelihood
from .norms import channel_sums, row_sums
from .philox import philox4x32
from .products_native import HeldProducts
from .rademacher import rademacher_add_, sign_tile
from .small_rows import Piece
from .sparse import sparse_add_, sparse_add_at_, sparse_add_outer_, sparse_add_windows_
from .sparse_map import signs_negative, sparse_map
from .tensor import tensor_add_, tensor_add_at_, tensor_add_outer_, tensor_add_windows_
from .tensor_held import HeldSums
from .tensor_map import TensorMap
from .tiles import outer_tiles, scaled, window_columns

__all__ = [
    "BACKENDS",
    "HeldProducts",
    "HeldSums",
    "Piece",
    "TensorMap",
    "available_backends",
    "channel_sums",
    "choose_backend",
    "fast_jl_add_",
    "fast_jl_add_at_",
    "fast_jl_add_outer_",
    "kronecker_add_",
    "kronecker_add_outer_",
    "kronecker_split",
    "label_likelihood",
    "outer_tiles",
    "philox4x32",
    "rademacher_add_",
    "require_fast_jl",
    "row_sums",
    "scaled",
    "sign_tile",
    "signs_negative",
    "sparse_add_",
    "sparse_add_at_",
    "sparse_add_outer_",
    "sparse_add_windows_",
    "sparse_map",
    "tensor_add_",
    "tensor_add_at_",
    "tensor_add_outer_",
    "tensor_add_windows_",
    "window_columns",
]
