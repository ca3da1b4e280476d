"""Whatever fsspec can read, as a store that is not written to: web servers, archives, hubs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from source_proj.bank.store.base import ObjectInfo, Store, checked_key

__all__ = ["RemoteStore", "open_remote_store"]


class RemoteStore(Store):
    """Files below a URL of fsspec.

    Args:
        files: fsspec's file system.
        root: the folder in it.
        url: what people call it.
    """

    def __init__(self, files: Any, root: str, url: str) -> None:
        self._files = files
        self._root = root.rstrip("/")
        self._url = url.rstrip("/")

    def __repr__(self) -> str:
        return f"RemoteStore({self._url!r})"

    def get(self, key: str) -> bytes:  # noqa: D102
        if self.stat(key) is None:
            raise FileNotFoundError(f"{self.location(key)} is not there")
        with self._errors_of_the_place(key):
            return bytes(self._files.cat_file(self._path(key)))

    def put(self, contents: Mapping[str, bytes]) -> None:  # noqa: D102
        for key in contents:
            raise self._read_only(key)

    def put_if_absent(self, contents: Mapping[str, bytes]) -> set[str]:  # noqa: D102
        there = {key for key in contents if self.exists(key)}
        for key in contents.keys() - there:
            raise self._read_only(key)
        return there

    def copy(self, sources: Mapping[str, str]) -> None:  # noqa: D102
        for key in sources:
            raise self._read_only(key)

    def keys(self, prefix: str = "") -> Iterable[str]:  # noqa: D102
        folder = self._path(prefix) if prefix else self._root
        with self._errors_of_the_place(prefix):
            paths = self._files.find(folder) if self._files.isdir(folder) else []
        skipped = len(self._root) + 1 if self._root else 0
        return [path.lstrip("/")[skipped:] if not self._root else path[skipped:] for path in paths]

    def delete(self, key: str) -> None:  # noqa: D102
        if self.exists(key):
            raise self._read_only(key)

    def stat(self, key: str) -> ObjectInfo | None:  # noqa: D102
        try:
            with self._errors_of_the_place(key):
                info = self._files.info(self._path(key))
                version = self._files.ukey(self._path(key)) if info["type"] == "file" else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if version is None else ObjectInfo(int(info["size"]), f"{info['size']}-{version}")

    def location(self, key: str = "") -> str:  # noqa: D102
        return f"{self._url}/{key}" if key else self._url

    def _path(self, key: str) -> str:
        return f"{self._root}/{checked_key(key)}" if self._root else checked_key(key)

    @contextmanager
    def _errors_of_the_place(self, key: str) -> Iterator[None]:
        """A damaged archive, a server's refusal: each file system has exceptions of its own for them."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{self.location(key)}: {type(error).__name__}: {error}") from error

    def _read_only(self, key: str) -> OSError:
        return OSError(f"{self.location(key)} can only be read: write banks to a folder, s3://, gs:// or az://")


def open_remote_store(url: str) -> RemoteStore:
    """Open a folder of any file system that fsspec knows, for reading.

    Raises:
        ImportError: fsspec, or what it needs for this URL, is not installed; names the extra.
        OSError: there is no such file system, or it cannot be opened.
    """
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f'{url} needs fsspec: pip install "source-proj[cloud]"') from error
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError:
        raise
    except Exception as error:  # no such file system; or what it makes of a damaged archive, or of a server
        what = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise OSError(
            f"{url} cannot be opened ({what}): give a folder, s3://, gs://, az:// or a URL of fsspec, such as zip:// "
            "of a whole archive"
        ) from error
    return RemoteStore(files, root, url)
