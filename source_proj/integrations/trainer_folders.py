"""What a Trainer of transformers leaves in its output folder: ``checkpoint-N``, one folder for each saved step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from source_proj._errors import MismatchError
from source_proj._io.outputs import from_home
from source_proj.integrations.trainer_folder import TrainerFolder
from source_proj.integrations.trainer_splices import splice
from source_proj.trajectory.recording.run_files import recorders_own

__all__ = ["trainer_folders"]


def trainer_folders(
    dir: str | Path, steps: Sequence[int] | None = None
) -> tuple[list[TrainerFolder], list[TrainerFolder]]:
    """Read the ``checkpoint-N`` folders of a run, in order of steps.

    Args:
        dir: the Trainer's ``output_dir``.
        steps: the steps to use; default: all.

    Returns:
        The checkpoints to use; and all of the same run, up to the last of those.

    Raises:
        FileNotFoundError: no such directory, or no checkpoint in it.
        MismatchError: two of the checkpoints to use come from different runs.
    """
    directory = from_home(dir).absolute()
    found = {
        int(match[1]): path
        for path in (directory.iterdir() if directory.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    if not found:
        where = f"{str(directory)!r} {'holds no folder checkpoint-N' if directory.exists() else 'does not exist'}"
        raise FileNotFoundError(
            recorders_own(directory) or f"{where}: give a Trainer's output_dir (not one of its checkpoints)"
        )
    chosen = sorted(found if steps is None else set(steps))
    if not chosen or not set(chosen) <= set(found):
        raise FileNotFoundError(f"steps={steps}: {str(directory)!r} has checkpoints of the steps {sorted(found)} alone")
    folders = [TrainerFolder.read(found[step], step) for step in sorted(found) if step <= chosen[-1]]
    run, problems = _one_run(folders)
    for step in chosen:
        if step in problems:
            raise MismatchError(
                f"{problems[step]}: they come from different runs in one output_dir. Choose one run's checkpoints by "
                f"steps= (those of {folders[-1].path.name!r} are {[folder.step for folder in run]}), or move the other "
                "run's to a folder of their own"
            )
    return [f for f in folders if f.step in chosen], run


def _one_run(folders: Sequence[TrainerFolder]) -> tuple[list[TrainerFolder], dict[int, str]]:
    """The checkpoints that can be of the last one's run, in order; and by step, what says that another cannot."""
    run, problems = [folders[-1]], {}
    for folder in reversed(folders[:-1]):
        problem = splice(folder, run[0])
        if problem is None:
            run.insert(0, folder)
        else:
            problems[folder.step] = problem
    return run, problems
