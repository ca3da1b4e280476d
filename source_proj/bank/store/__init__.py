"""Where a bank's objects lie, behind a handful of operations."""

from source_proj.bank.store.base import ObjectInfo, Store
from source_proj.bank.store.local import LocalStore
from source_proj.bank.store.opened import is_url, open_store

__all__ = ["LocalStore", "ObjectInfo", "Store", "is_url", "open_store"]
