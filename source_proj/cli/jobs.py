"""Commands as jobs of a cluster, by submitit; preempted or timed out ones are requeued and go on."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from source_proj._errors import SourceProjError

__all__ = ["Command", "parse_options", "submit_job"]

_COMMANDS = ("build", "append", "finalize", "score", "top-k", "verify")


class Command:
    """A command line of source-proj that a job runs, in the directory that it was submitted from.

    Args:
        run: runs a command line and returns its exit code; a function that can be pickled.
        arguments: what stands behind ``source-proj``.
    """

    def __init__(self, run: Callable[[list[str]], int], arguments: Sequence[str]) -> None:
        self.run = run
        self.arguments = list(arguments)
        self.directory = os.getcwd()

    def __repr__(self) -> str:
        return f"Command({self.arguments})"

    def __call__(self) -> None:
        """Run it.

        Raises:
            SourceProjError: it failed; the log has its words.
        """
        os.chdir(self.directory)
        code = self.run(self.arguments)
        if code:
            raise SourceProjError(f"{self!r} ended with exit code {code}: the log of the job says why")

    def checkpoint(self) -> Any:
        """What submitit submits again when the job is preempted or its time is over: a build goes on where it was."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit_job(command: Command, folder: Path, parameters: Mapping[str, Any], *, local: bool) -> Any:
    """Submit a command line.

    Args:
        command: the command line.
        folder: of scripts and logs, which all machines see.
        parameters: of submitit's AutoExecutor; those that are None are left to Slurm.
        local: on this machine, without Slurm.

    Returns:
        submitit's job.

    Raises:
        ImportError: submitit is not installed; names the extra.
        ValueError: there is no command, or one that no job runs.
        SourceProjError: there is no Slurm.
    """
    name = command.arguments[:1]
    if not name or name[0] not in _COMMANDS:
        raise ValueError(f"submit needs a command, one of {', '.join(_COMMANDS)}, got {name}")
    try:
        import submitit
    except ImportError as error:
        raise ImportError('submit needs submitit: pip install "source-proj[cluster]"') from error
    given = {key: value for key, value in parameters.items() if value is not None}
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster="local" if local else "slurm")
    except RuntimeError as error:  # there is no srun
        raise SourceProjError(f"nothing can be submitted here ({error}): go where Slurm is, or give --local") from error
    executor.update_parameters(name=f"source-proj-{name[0]}", **given)
    return executor.submit(command)


def parse_options(pairs: Iterable[str]) -> dict[str, str]:
    """Read options of sbatch.

    Example:
        >>> parse_options(["account=us", "mail-type=FAIL"])
        {'account': 'us', 'mail_type': 'FAIL'}
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--option must be given as key=value, got {pair!r}")
        options[key.replace("-", "_")] = value
    return options
