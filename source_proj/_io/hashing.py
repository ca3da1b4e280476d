"""SHA-256 of files and of numbers, in hex."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

__all__ = ["hash_file", "hash_float32"]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_float32(values: Tensor, kind: str = "") -> str:
    """SHA-256 of float32 numbers, little-endian on every machine, after a word for what they are."""
    digest = hashlib.sha256(kind.encode())
    digest.update(values.contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
