"""What a recorder keeps beside a model: states that it is told of, and a companion with a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from source_proj._errors import MismatchError
from source_proj._io.loading import load_tensors
from source_proj.trajectory.recording.run_files import RecordedCheckpoint, capture_name, check_file

__all__ = ["Companion", "Stateful", "kept_content"]


class Stateful(Protocol):
    """Anything whose state can be taken and brought back."""

    def state_dict(self) -> Any:
        """Give the state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take the state."""


class Companion(Protocol):
    """What is recorded in step with a model: one more file with each checkpoint, brought back with it."""

    def content(self) -> dict[str, Any]:
        """Tensors and plain values to keep with a checkpoint."""

    def restart(self, content: dict[str, Any] | None) -> None:
        """Go on from what was kept; from nothing with None, at the beginning and after the end of a segment."""


def kept_content(directory: Path, checkpoint: RecordedCheckpoint) -> dict[str, Any] | None:
    """What the companion kept with a checkpoint and goes on from; None where it ended a segment.

    Raises:
        MismatchError: there was no companion, or its file was changed.
    """
    file = directory / capture_name(checkpoint.step)
    if checkpoint.capture is None:
        raise MismatchError(
            f"{str(directory)!r} holds a run that was recorded without capture=: go on without, or record anew in an "
            "empty directory"
        )
    if checkpoint.ends_segment:
        return None
    check_file(file, checkpoint.capture)
    content: dict[str, Any] = load_tensors(file, "record anew in an empty directory", mapped=True)
    return content
