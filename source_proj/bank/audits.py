"""What was audited of a shard's rows, as the bank keeps it: JSON of at most 1,024 bytes, with spaces behind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from source_proj._errors import BankError

__all__ = ["AUDIT_BYTES", "decode_audit", "encode_audit", "total"]

AUDIT_BYTES = 1024
_REASONS = 4  # and the rest counted together


def encode_audit(summary: Mapping[str, Any]) -> np.ndarray:
    """Bytes ``(1, 1024)`` uint8 of a summary (`source_proj.gradients.proof.Proof.summary`); long reasons are cut."""
    reasons: dict[str, int] = summary["general"]
    kept = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    for length in (160, 80, 40, 10):
        general: Counter[str] = Counter()
        for place, (reason, count) in enumerate(kept):
            general[reason[:length] if place < _REASONS else "other reasons"] += count
        text = json.dumps({**summary, "general": dict(general)}, sort_keys=True).encode()
        if len(text) <= AUDIT_BYTES:
            break
    return np.frombuffer(text.ljust(AUDIT_BYTES), np.uint8)[None]


def decode_audit(values: np.ndarray) -> dict[str, Any]:
    """The summary again.

    Raises:
        BankError: the bytes are none.
    """
    try:
        return dict(json.loads(values.tobytes()))
    except (TypeError, ValueError) as error:
        raise BankError(f"an audit is damaged: {error}") from error


def total(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the summaries of shards; the error is the largest.

    Example:
        >>> shard = {"examples": 4, "audited_batches": 1, "audited_examples": 2, "worst_error": 1e-7, "general": {}}
        >>> total([shard, shard])["audited_examples"]
        4
    """
    found: dict[str, Any] = {"examples": 0, "audited_batches": 0, "audited_examples": 0, "worst_error": 0.0}
    general: Counter[str] = Counter()
    for summary in summaries:
        for name in ("examples", "audited_batches", "audited_examples"):
            found[name] += summary[name]
        found["worst_error"] = max(found["worst_error"], summary["worst_error"])
        general.update(summary["general"])
    return {**found, "general": dict(general)}
