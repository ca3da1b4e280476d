"""Functions of torch by name, as they treat what is made of parameters."""

from __future__ import annotations

import torch

__all__ = [
    "ARGUMENTS",
    "ATTENTION",
    "BROADCASTING",
    "EXPANDING",
    "INTEGERS",
    "JOINING",
    "OTHER_NAMES",
    "REPEATING",
    "TYPING",
    "WITHOUT_GRADIENT",
]

# Functions of torch, by name, that treat numbers one by one and broadcast their arguments.
_BY_ENTRY = """
    add add_ sub sub_ subtract rsub mul mul_ multiply div div_ divide true_divide pow maximum minimum where lerp addcmul
    addcdiv __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__
    __rdiv__ __itruediv__ __pow__ __rpow__
"""
BROADCASTING = frozenset(_BY_ENTRY.split())
_NO_GRADIENT = """
    gt lt ge le eq ne greater less isclose __gt__ __lt__ __ge__ __le__ __eq__ __ne__
"""
WITHOUT_GRADIENT = frozenset(_NO_GRADIENT.split())  # by what examples meet with a parameter there
ATTENTION = "scaled_dot_product_attention"  # whose mask broadcasts
EXPANDING = frozenset(["expand", "broadcast_to", "repeat", "tile"])
REPEATING = frozenset(["repeat", "tile"])
JOINING = frozenset(["cat", "concat", "concatenate"])
TYPING = frozenset(["type_as", "to"])  # like another tensor, of which no number is taken
INTEGERS = frozenset([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
_OF_BAGS = """
    input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights include_last_offset
    padding_idx
"""
ARGUMENTS: dict[str, tuple[str, ...]] = {  # of functions with a way of their own
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "__matmul__": ("input", "other"),
    "mm": ("input", "other"),
    "addmm": ("input", "mat1", "mat2"),
    "__getitem__": ("input", "index"),
    "index_select": ("input", "dim", "index"),
    "embedding": ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    "embedding_bag": tuple(_OF_BAGS.split()),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "expand_as": ("input", "other"),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d"), ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    ),
}
OTHER_NAMES = {"self": "input", "tensor2": "other"}
