"""The curvature of captured segments, which a bank holds itself: no rows are left to make it of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt

import torch
from torch import Tensor

from source_proj._errors import BankError
from source_proj._io.hashing import hash_float32
from source_proj.bank.layout import curvature_array, flat_objects, group_document
from source_proj.bank.read.objects import read_flat
from source_proj.bank.store import Store

__all__ = ["curvature_objects", "read_curvature"]


def read_curvature(store: Store, digest: str) -> Tensor:
    """Ĥ ``(k, k)`` float32 of a captured segment, by its hash.

    Raises:
        BankError: it is missing or damaged.
    """
    values = torch.from_numpy(read_flat(store, f"curvature/{digest}", curvature_array))
    if hash_float32(values) != digest:
        where = store.location(f"curvature/{digest}")
        raise BankError(f"the curvature in {where} was altered: its hash is another; make the bank of the capture anew")
    dim = isqrt(len(values))
    return values.view(dim, dim)


def curvature_objects(matrices: Mapping[str, Tensor]) -> Iterator[dict[str, bytes]]:
    """The curvature of segments, by hash, as the objects to write."""
    for digest, matrix in matrices.items():
        flat = matrix.reshape(-1).numpy()
        yield flat_objects(f"curvature/{digest}", curvature_array(len(flat)), flat)
    if matrices:
        yield {"curvature/zarr.json": group_document({})}
