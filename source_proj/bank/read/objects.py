"""A bank's objects, each refused with its name and the cause where it is not as it must be."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from source_proj._errors import BankError
from source_proj.bank.layout import ArraySpec
from source_proj.bank.store import ObjectInfo, Store

__all__ = [
    "list_objects",
    "object_info",
    "read_document",
    "read_flat",
    "read_group",
    "read_object",
    "read_shard",
    "require_array",
]

_DOCUMENT_BYTES = 64 << 20  # of metadata: a run of 10⁵ checkpoints has a tenth of it


def list_objects(store: Store, prefix: str = "") -> Sequence[str]:
    """Keys of all objects below a key.

    Raises:
        BankError: they cannot be listed, or one is a link.
    """
    try:
        return store.list(prefix)
    except OSError as error:
        raise BankError(f"{store.location(prefix)} cannot be read ({error})") from error


def object_info(store: Store, key: str) -> ObjectInfo | None:
    """Size and version of an object; None where there is none.

    Raises:
        BankError: it cannot be told.
    """
    try:
        return store.stat(key)
    except OSError as error:
        raise BankError(f"{store.location(key)} cannot be read ({error})") from error


def read_object(store: Store, key: str) -> bytes:
    """Read an object.

    Raises:
        BankError: it is missing or cannot be read.
    """
    try:
        return store.get(key)
    except (FileNotFoundError, NotADirectoryError):
        raise BankError(f"{store.location(key)} is missing") from None
    except OSError as error:
        raise BankError(f"{store.location(key)} cannot be read ({error})") from error


def read_document(store: Store, node: str) -> bytes:
    """Read the metadata of a node; ``""`` is the root.

    Raises:
        BankError: they are missing, or cannot be read.
    """
    key = f"{node}/zarr.json" if node else "zarr.json"
    info = object_info(store, key)
    if info is None:
        raise BankError(f"{store.location(node)} is missing from the bank, or is no zarr v3 node (it has no zarr.json)")
    if info.size > _DOCUMENT_BYTES:
        raise BankError(f"the metadata of {store.location(node)} cannot be read: they have {info.size} bytes")
    return read_object(store, key)


def read_group(store: Store, node: str) -> dict[str, Any]:
    """Read the attributes of a group.

    Raises:
        BankError: it is missing, damaged, or an array.
    """
    content = read_document(store, node)
    try:
        document = json.loads(content)
        if not isinstance(document, dict) or document.get("zarr_format") != 3:
            raise ValueError("they are not those of a zarr v3 node")
        if document.get("node_type") not in ("group", "array"):
            raise ValueError(f"their node_type is {document.get('node_type')!r}")
        if not isinstance(document.get("attributes", {}), dict):
            raise ValueError("their attributes are no object")
    except (ValueError, RecursionError) as error:
        raise BankError(f"the metadata of {store.location(node)} cannot be read ({error})") from error
    if document["node_type"] == "array":
        raise BankError(f"{store.location(node)} is a zarr array and must be a group")
    attributes: dict[str, Any] = document.get("attributes", {})
    return attributes


def require_array(store: Store, node: str, spec: ArraySpec) -> None:
    """Hold an array's metadata to the layout.

    Raises:
        BankError: they differ, or cannot be read; says what was found.
    """
    content = read_document(store, node)
    where = store.location(node)
    try:
        if json.loads(content)["node_type"] == "group":
            raise BankError(f"{where} is a zarr group and must be an array")
        difference = spec.difference(content)
    except BankError:
        raise
    except Exception as error:  # whatever zarr and JSON raise about metadata
        raise BankError(f"the metadata of {where} cannot be read ({type(error).__name__}: {error})") from error
    if difference:
        raise BankError(f"the array {where} is not as the bank's settings want it: its {difference}")


def read_shard(
    store: Store, node: str, spec: ArraySpec, shard: int, place: Callable[[], str] | None = None
) -> np.ndarray:
    """Read a shard of an array.

    Args:
        store: the bank's.
        node: the array.
        spec: its layout.
        shard: index of the shard.
        place: says in words what the shard is.

    Raises:
        BankError: it is missing, truncated, altered or cannot be read; names it.
    """
    key = f"{node}/{spec.key(shard)}"
    try:
        info, (low, high) = object_info(store, key), spec.size_range(shard)
        if info is None:
            raise BankError(f"{store.location(key)} is missing")
        if info.size == 0:
            raise BankError(f"{store.location(key)} is truncated to nothing")
        if not low <= info.size <= high:
            wanted = f"{low}" if low == high else f"{low} to {high}" if high < 1 << 62 else f"{low} or more"
            raise BankError(f"{store.location(key)} is truncated or altered (it has {info.size} bytes, not {wanted})")
        return _decoded(store, key, spec, shard)
    except BankError as error:
        if place is None:
            raise
        raise BankError(f"{error}: {place()}") from error


def read_flat(store: Store, node: str, make_spec: Callable[[int], ArraySpec]) -> np.ndarray:
    """Read an array of one axis whose length its own metadata say, ``make_spec`` being its layout for a length.

    Raises:
        BankError: it is missing, truncated, altered or cannot be read; names it.
    """
    content = read_document(store, node)
    try:
        (count,) = json.loads(content)["shape"]
        spec = make_spec(int(count))
        shards = range(spec.n_shards)
    except Exception as error:  # whatever may stand there
        raise BankError(
            f"the metadata of {store.location(node)} cannot be read, as those of an array of one axis ({error!r})"
        ) from error
    if not shards or len(shards) > len(list_objects(store, node)):  # before anything is made for them
        raise BankError(f"{store.location(node)} is truncated: its metadata say {count} entries")
    require_array(store, node, spec)
    return np.concatenate([read_shard(store, node, spec, shard) for shard in shards])


def _decoded(store: Store, key: str, spec: ArraySpec, shard: int) -> np.ndarray:
    content = read_object(store, key)
    try:
        return spec.decode(shard, content)
    except Exception as error:  # checksum, decompressor, shard index: each has its own kind
        raise BankError(f"{store.location(key)} is truncated or altered ({error})") from error
