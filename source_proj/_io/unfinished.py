"""Outputs that are made block by block: what is done outlives a kill, and the whole appears at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from source_proj._io.files import PARTIAL, walk, write_file
from source_proj._io.locks import FolderLock

__all__ = ["Unfinished"]


class Unfinished:
    """The folder beside an output in which it is made; whoever makes the same output next goes on with it.

    Args:
        path: where the output will be.
        description: all that the folder's content depends on besides the blocks' own digests; JSON-able. What was begun
            under another description is thrown away.

    Raises:
        FileExistsError: another process is making this output, or something else has the folder's name.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self.folder = path.with_name(f".{path.name}.unfinished")
        self._description = description
        self._lock = FolderLock(self.folder, "lock")

    @property
    def content(self) -> Path:
        """What is made."""
        return self.folder / "content"

    def __enter__(self) -> Unfinished:
        if self._is_foreign():
            raise FileExistsError(f"{self.folder} is in the way, and no output in the making: remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._lock.acquire():
            raise FileExistsError(f"another process is writing in {self.folder}: wait for it, or give another path")
        try:
            if self._begun() != self._description:
                self._clear()
                write_file(self.folder / "begun.json", json.dumps(self._description).encode())
            (self.folder / "blocks").mkdir(exist_ok=True)
            self._sweep()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _is_foreign(self) -> bool:
        """Whether something has the folder's name; it may be empty, as a process leaves it that is killed here."""
        if not self.folder.exists() or (self.folder / "lock").is_file():
            return False
        return not self.folder.is_dir() or any(self.folder.iterdir())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def is_done(self, block: int, digest: str) -> bool:
        """Whether a block was committed with just this digest."""
        try:
            return self._marker(block).read_text(encoding="ascii") == digest
        except FileNotFoundError:
            return False

    def begin(self, block: int) -> None:
        """Forget what was committed of a block, before it is written anew."""
        self._marker(block).unlink(missing_ok=True)

    def commit(self, block: int, digest: str) -> None:
        """Note that a block is whole and on the disk."""
        write_file(self._marker(block), digest.encode("ascii"))

    def _marker(self, block: int) -> Path:
        return self.folder / "blocks" / str(block)

    def _begun(self) -> Any:
        try:
            return json.loads((self.folder / "begun.json").read_bytes())
        except (OSError, ValueError):
            return None

    def _sweep(self) -> None:
        """Remove files that a killed process was about to rename, also as zarr does: they would be in the output."""
        for file in walk(self.folder):
            if file.name.endswith(PARTIAL):
                file.unlink()

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
