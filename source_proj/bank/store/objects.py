"""Buckets of S3, Google Cloud and Azure, and memory, as stores: by obstore, which signs and retries requests."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from source_proj.bank.store.base import ObjectInfo, Store, checked_key

__all__ = ["SCHEMES", "ObjectStore", "open_object_store"]

SCHEMES = ("s3", "gs", "az", "memory")

_T = TypeVar("_T")
_TRIES = 4  # of what obstore has given up, and of what it does not repeat itself, such as a put that timed out
_RANGE = 8 << 20  # bytes of a larger object that are asked for at once
_AT_ONCE = 8  # requests
_SECRET = re.compile(
    r"\?[^\s\"')]*|(?<=://)[^/@\s]+@|(?i:(key|token|secret|signature|sig|password)[\w-]*\s*[=:]\s*\S+)"
)
_PLAIN = {  # what the services' own words mean, and what to do
    "NoSuchBucket|ContainerNotFound|bucket does not exist": "there is no such bucket: make it, or correct its name",
    # The machine's role was asked last, at an address that only clouds answer.
    "/latest/api/token|computeMetadata|/metadata/identity": (
        "no credentials were found: set them in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
        "(profiles in ~/.aws are not read)"
    ),
}
_MEMORY: dict[str, Any] = {}  # a store of this process for each memory://name


class ObjectStore(Store):
    """Objects below a URL.

    Args:
        client: one of obstore's stores, which keys are relative to.
        url: what people call it.
    """

    def __init__(self, client: Any, url: str) -> None:
        self._client = client
        self._url = url.rstrip("/")

    def __repr__(self) -> str:
        return f"ObjectStore({self._url!r})"

    def get(self, key: str) -> bytes:  # noqa: D102
        path = checked_key(key)

        def read() -> bytes:
            answer = self._client.get(path)
            size, tag = answer.meta["size"], answer.meta["e_tag"]
            if size <= _RANGE:
                return bytes(answer.bytes())
            same = {} if tag is None else {"if_match": tag}  # else it was exchanged meanwhile: once more

            def read_range(start: int) -> Any:
                return self._client.get(path, options={"range": (start, min(size, start + _RANGE)), **same}).bytes()

            return b"".join(_each(read_range, range(0, size, _RANGE)))

        return self._repeated(key, read)

    def put(self, contents: Mapping[str, bytes]) -> None:  # noqa: D102
        def write(key: str) -> None:
            path = checked_key(key)
            self._repeated(key, lambda: self._client.put(path, contents[key], use_multipart=False))

        _each(write, contents)

    def put_if_absent(self, contents: Mapping[str, bytes]) -> set[str]:  # noqa: D102
        taken = _each(lambda key: self._taken(key, contents[key]), contents)
        return {key for key, was_there in zip(contents, taken, strict=True) if was_there}

    def copy(self, sources: Mapping[str, str]) -> None:  # noqa: D102
        def write(key: str) -> None:
            source, target = checked_key(sources[key]), checked_key(key)
            self._repeated(sources[key], lambda: self._client.copy(source, target))

        _each(write, sources)

    def keys(self, prefix: str = "") -> Iterable[str]:  # noqa: D102
        path = checked_key(prefix) if prefix else None
        return self._repeated(prefix, lambda: [meta["path"] for page in self._client.list(path) for meta in page])

    def delete(self, key: str) -> None:  # noqa: D102
        path = checked_key(key)
        try:
            self._repeated(key, lambda: self._client.delete(path))
        except FileNotFoundError:
            return

    def stat(self, key: str) -> ObjectInfo | None:  # noqa: D102
        path = checked_key(key)
        try:
            meta = self._repeated(key, lambda: self._client.head(path))
        except FileNotFoundError:
            return None
        version = (path, meta["e_tag"], meta["version"], meta["last_modified"].isoformat(), meta["size"])
        return ObjectInfo(meta["size"], "-".join(map(str, version)))

    def location(self, key: str = "") -> str:  # noqa: D102
        return f"{self._url}/{key}" if key else self._url

    def above(self) -> Iterable[Store]:  # noqa: D102
        scheme, _, path = self._url.partition("://")
        if scheme.lower() == "memory":  # each name has a store of its own
            return
        bucket, *folders = filter(None, path.split("/"))
        for count in reversed(range(len(folders))):
            yield open_object_store(f"{scheme}://{'/'.join([bucket, *folders[:count]])}")

    def _taken(self, key: str, content: bytes) -> bool:
        """Put an object where there is none: whether there was one.

        An answer that was lost leaves open who wrote what is there. It counts as written here if it is what was to be
        written: writers that must know themselves apart write their names.
        """
        from obstore.exceptions import AlreadyExistsError

        path = checked_key(key)

        def write() -> bool:
            try:
                self._client.put(path, content, mode="create")
            except AlreadyExistsError:
                return bytes(self._client.get(path).bytes()) != content
            return False

        return self._repeated(key, write, gone_is_passing=True)

    def _repeated(self, key: str, request: Callable[[], _T], *, gone_is_passing: bool = False) -> _T:
        """Make a request that may be made twice, with growing and random pauses if it fails.

        Raises:
            FileNotFoundError: the object is not there.
            OSError: it fails again and again, or is not allowed; without the words of the request.
        """
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        for tries in range(1, _TRIES + 1):
            try:
                return request()
            except FileNotFoundError:
                if not gone_is_passing or tries == _TRIES:
                    raise FileNotFoundError(f"{self.location(key)} is not there") from None
            except (BaseError, OSError) as error:
                if tries == _TRIES or isinstance(error, PermissionDeniedError | UnauthenticatedError):
                    # Not from the error: the words of a request can hold what signs it.
                    raise OSError(f"{self.location(key)}: {_said(error)}") from None
            time.sleep(random.uniform(0, 0.05 * 4**tries))
        raise AssertionError("unreachable")


def open_object_store(url: str) -> ObjectStore:
    """Open a bucket, or a folder in one.

    Credentials and endpoints come from the environment, as the vendors' own tools have them (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_NAME``, …), or from the machine's
    role.

    Raises:
        ImportError: obstore is not installed; names the extra.
        OSError: what the environment says does not do.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url
    except ImportError as error:
        raise ImportError(f'{urlsplit(url).scheme}:// needs obstore: pip install "source-proj[cloud]"') from error
    if url.startswith("memory://"):
        return ObjectStore(_MEMORY.setdefault(url.rstrip("/"), MemoryStore()), url)
    try:
        client = from_url(
            url,
            client_options={
                "timeout": timedelta(seconds=120),
                "connect_timeout": timedelta(seconds=10),
                "allow_http": True,  # where an endpoint is set by hand as http://, such as a server of one's own
            },
            retry_config={
                "max_retries": 8,
                "retry_timeout": timedelta(seconds=180),
                "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
            },
        )
    except (BaseError, ValueError) as error:
        raise OSError(f"{url} cannot be opened: {_said(error)}") from None
    return ObjectStore(client, url)


def _each(work: Callable[[Any], _T], items: Iterable[Any]) -> list[_T]:
    """Work on many at once; in order."""
    all_items = list(items)
    if len(all_items) < 2:
        return [work(item) for item in all_items]
    with ThreadPoolExecutor(min(_AT_ONCE, len(all_items))) as threads:
        return list(threads.map(work, all_items))


def _said(error: BaseException) -> str:
    """An error in one line, without queries, users or whatever looks like a secret."""
    first = str(error).split("\n\n")[0]
    for said, meaning in _PLAIN.items():
        if re.search(said, first):
            return meaning
    return f"{type(error).__name__}: {_SECRET.sub('…', ' '.join(first.split()))[:500]}"
