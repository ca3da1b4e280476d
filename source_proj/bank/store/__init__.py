"""Where a bank's objects lie, behind a handful of operations."""

from source_proj.bank.store.base import ObjectInfo, Store
from source_proj.bank.store.local import LocalStore

__all__ = ["LocalStore", "ObjectInfo", "Store"]
