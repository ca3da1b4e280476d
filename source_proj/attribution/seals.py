"""Facts and numbers in files under hashes, by which damage is noticed, and that a file was replaced by another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from source_proj._errors import MismatchError

__all__ = ["SEAL", "digest_of", "opened", "replaced_or_damaged", "seal_of", "sealed"]

SEAL = "sha256"
"""The name of the hash among the facts."""


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with their hash, which names them, too: two files with the same one hold the same."""
    return {**facts, SEAL: seal_of(facts)}


def opened(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Sealed facts, compared with their hash.

    Raises:
        ValueError: they are not as they were written.
    """
    if facts.get(SEAL) != seal_of(facts):
        raise ValueError("its description is not the one that was written")
    return dict(facts)


def seal_of(facts: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of facts besides their hash."""
    own = {name: value for name, value in facts.items() if name != SEAL}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def digest_of(*columns: np.ndarray | Sequence[Any]) -> str:
    """SHA-256, in hex, of numbers, and of ids as JSON has them."""
    digest = hashlib.sha256()
    for column in columns:
        if isinstance(column, np.ndarray):
            digest.update(np.ascontiguousarray(column.astype(column.dtype.newbyteorder("<"), copy=False)).data)
        else:
            digest.update(json.dumps(column).encode())
    return digest.hexdigest()


def replaced_or_damaged(
    what: str, path: Path | str, error: Exception, seal: str | None, now: str | None, remedy: str
) -> MismatchError:
    """The error of a file that does not hold what was expected.

    Args:
        what: "hits" or "scores".
        path: of the file.
        error: what went wrong while it was read.
        seal: the hash of the facts that it had when it was opened.
        now: the hash of those that it has now; None where these cannot be read.
        remedy: how to get it again.
    """
    if seal is not None and now is not None and now != seal:
        return MismatchError(
            f"other {what} were written to {str(path)!r} since it was opened, and what it held is gone: open it anew, "
            "and give each set of queries a path of its own"
        )
    lines = str(error).splitlines() or [""]
    return MismatchError(
        f"the {what} {str(path)!r} are damaged ({type(error).__name__}: {lines[0][:80]}): bring them back from a copy, "
        f"or {remedy}"
    )
