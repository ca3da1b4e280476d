"""What a batch holds as one number, by which it is compared between checkpoints."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["batch_hash"]


def batch_hash(batch: Any) -> bytes:
    """SHA-256 over all of a batch: types, shapes and bytes of its tensors, keys and places of its entries.

    Raises:
        TypeError: an entry is neither tensor, array, string, number, None, nor a list, tuple or mapping of them.
    """
    digest = hashlib.sha256()
    _update(digest, batch)
    return digest.digest()


def _update(digest: Any, entry: Any) -> None:
    if isinstance(entry, np.generic):
        entry = entry.item()
    elif isinstance(entry, np.ndarray):
        entry = entry.tolist() if entry.dtype.kind in "USO" else torch.from_numpy(np.ascontiguousarray(entry))
    if isinstance(entry, Tensor):
        if entry.layout != torch.strided:
            raise TypeError(f"a batch holds a tensor of layout {entry.layout}; make it dense in collate_fn")
        values = entry.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(f"tensor {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(entry, Mapping):
        digest.update(f"mapping {len(entry)}\n".encode())
        for key, value in entry.items():
            digest.update(f"key {key!r}\n".encode())
            _update(digest, value)
    elif isinstance(entry, tuple | list):
        digest.update(f"sequence {len(entry)}\n".encode())
        for value in entry:
            _update(digest, value)
    elif entry is None or isinstance(entry, str | bytes | bool | int | float):
        digest.update(f"{type(entry).__name__} {entry!r}\n".encode())
    else:
        raise TypeError(
            f"a batch holds a {type(entry).__name__}; its content cannot be compared between checkpoints: "
            "make it a tensor, string or number in collate_fn"
        )
