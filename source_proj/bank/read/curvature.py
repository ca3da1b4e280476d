"""The curvature of captured segments, which a bank holds itself: no rows are left to make it of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from source_proj._errors import BankError
from source_proj._io.hashing import hash_float32
from source_proj.bank.layout import curvature_array, flat_objects, group_document
from source_proj.bank.read.objects import read_flat
from source_proj.bank.store import Store
from source_proj.kernels.gram import packed_size, unpacked
from source_proj.sketch.columns import Columns

__all__ = ["curvature_objects", "curvature_size", "panels_of", "read_curvature"]


def read_curvature(store: Store, digest: str) -> Tensor:
    """Ĥ of a captured segment, by its hash: its numbers float32, flat; see :func:`panels_of`.

    Raises:
        BankError: it is missing or damaged.
    """
    values = torch.from_numpy(read_flat(store, f"curvature/{digest}", curvature_array))
    if hash_float32(values) != digest:
        where = store.location(f"curvature/{digest}")
        raise BankError(f"the curvature in {where} was altered: its hash is another; make the bank of the capture anew")
    return values


def curvature_size(blocks: Sequence[Columns]) -> int:
    """How many numbers Ĥ has as it is kept: little more than half of those of each block of columns."""
    return sum(packed_size(columns.width) for columns in blocks)


def panels_of(flat: Tensor, blocks: Sequence[Columns]) -> list[list[Tensor]]:
    """The panels of each block's Ĥ (`source_proj.kernels.gram`), which lie in a tensor one behind the other.

    Raises:
        BankError: there are more or fewer numbers.

    Example:
        >>> from source_proj.sketch.columns import blocks_of
        >>> [[panel.shape for panel in panels] for panels in panels_of(torch.zeros(8), blocks_of(4, 2))]
        [[torch.Size([2, 2])], [torch.Size([2, 2])]]
    """
    if curvature_size(blocks) != len(flat):
        raise BankError(
            f"the curvature has {len(flat)} numbers, and that of {len(blocks)} blocks of {blocks[0].dim} columns has "
            f"{curvature_size(blocks)}: it was captured by another version; capture the run anew"
        )
    parts = flat.split([packed_size(columns.width) for columns in blocks])
    return [unpacked(part, columns.width) for part, columns in zip(parts, blocks, strict=True)]


def curvature_objects(curvature: Mapping[str, Tensor]) -> Iterator[dict[str, bytes]]:
    """The curvature of segments, flat and by hash, as the objects to write."""
    for digest, flat in curvature.items():
        yield flat_objects(f"curvature/{digest}", curvature_array(len(flat)), flat.numpy())
    if curvature:
        yield {"curvature/zarr.json": group_document({})}
