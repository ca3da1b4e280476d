"""From what users call a place to its store."""

from __future__ import annotations

import os
import re
from pathlib import Path

from source_proj._errors import BankError
from source_proj._io.outputs import from_home
from source_proj.bank.store.base import Store
from source_proj.bank.store.local import LocalStore

__all__ = ["is_url", "open_store"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[^/]*)?://")
_URL_AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")


def is_url(path: str | Path) -> bool:
    """Whether a place is named by a URL; anything else is a folder."""
    return isinstance(path, str) and _URL.match(path) is not None


def open_store(path: str | Path) -> Store:
    """Open the store of a folder or a URL: ``s3://``, ``gs://``, ``az://``, ``memory://``, or one of fsspec to read.

    Raises:
        BankError: the place cannot be opened, is a file, or its URL lacks a slash or holds what must not be printed.
        TypeError: it is neither a string nor a path.
        ImportError: a package is missing; names the extra.

    Example:
        >>> open_store("banks/mnist").location("zarr.json").endswith("banks/mnist/zarr.json")
        True
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"a bank is named by a folder or a URL, as a string or a Path, got {path!r:.80}")
    if not os.fspath(path):
        raise BankError("the name of a bank is empty; give its folder, or '.' for this one")
    if not is_url(path):
        if _URL_AS_PATH.match(Path(path).as_posix()):
            raise BankError(f"{path} is a URL of one slash, as a Path leaves it: give it as a string, with '://'")
        return _local(from_home(path))
    url = str(path)
    scheme = url.partition("://")[0].lower()
    if scheme == "file":
        return _local(Path(url.partition("://")[2]))
    if any(sign in url for sign in "?#@"):
        raise BankError(
            f"the {scheme}:// URL of a bank holds a query, a fragment or a user, which would be printed: leave them "
            "out, and give credentials by environment variables"
        )
    from source_proj.bank.store.objects import SCHEMES, open_object_store
    from source_proj.bank.store.remote import open_remote_store

    try:
        return open_object_store(url) if scheme in SCHEMES else open_remote_store(url)
    except OSError as error:
        raise BankError(str(error)) from None


def _local(folder: Path) -> LocalStore:
    for place in (folder.absolute(), *folder.absolute().parents):
        if os.path.isfile(place):  # a name that is too long is refused where it is used
            raise BankError(f"{place} is a file, and a bank is a folder; give another path")
    return LocalStore(folder)
