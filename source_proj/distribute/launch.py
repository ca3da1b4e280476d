"""Which worker of how many this process is, as its launcher says."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["SHARD_VARIABLE", "Worker", "parse_shard", "this_worker"]

SHARD_VARIABLE = "SOURCE_PROJ_SHARD"
"""Says "i/n" for any other launcher, and goes before what they say."""


@dataclass(frozen=True)
class _Launcher:
    """The variables of a launcher: this process's number, how many there are, and its number on its machine."""

    name: str
    index: str
    count: str
    local_index: str


# Whoever started the process itself goes before whoever started that one: torchrun runs within a Slurm task.
_LAUNCHERS = [
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    _Launcher("submitit", "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID"),
    _Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    _Launcher("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    _Launcher("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
]


@dataclass(frozen=True)
class Worker:
    """One of the processes that build a bank together.

    Attributes:
        index: its number, from 0.
        count: how many there are.
        local_index: its number among those of its machine.
        launcher: who said so, for people; "" where nobody did, and the process is alone.
    """

    index: int
    count: int
    local_index: int
    launcher: str

    @property
    def shard(self) -> tuple[int, int]:
        """``shard`` of :func:`source_proj.build`."""
        return self.index, self.count

    @property
    def device(self) -> str | None:
        """Its GPU, of those that this process sees; None where there is none, or nobody launched it."""
        if not self.launcher or not torch.cuda.is_available():
            return None
        return f"cuda:{self.local_index % torch.cuda.device_count()}"


def this_worker(environment: Mapping[str, str] | None = None) -> Worker:
    """Read from the environment which worker of how many this process is.

    Known are, in this order: ``SOURCE_PROJ_SHARD`` ("i/n", which any scheduler can be made to set), torchrun, local
    jobs of submitit, Open MPI, Slurm's tasks and MPI's process managers. A Slurm array multiplies: each of its tasks
    has as many workers as its launcher says.

    Args:
        environment: the variables; default: the process's own.

    Raises:
        ValueError: variables do not make sense; names them with their values.

    Example:
        >>> this_worker({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
        Worker(index=3, count=8, local_index=1, launcher='torchrun')
        >>> array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1",
        ...          "SLURM_ARRAY_TASK_STEP": "2"}  # sbatch --array=1-7:2
        >>> this_worker(array).shard, this_worker({**array, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}).shard
        ((3, 4), (7, 8))
    """
    given = os.environ if environment is None else environment
    if SHARD_VARIABLE in given:
        return Worker(*parse_shard(given[SHARD_VARIABLE], SHARD_VARIABLE), _local_index(given), SHARD_VARIABLE)
    launched = next((known for known in _LAUNCHERS if known.index in given and known.count in given), None)
    index, count, local_index, name = 0, 1, 0, ""
    if launched is not None:
        index, count = _numbered(given, launched.index, launched.count)
        local_index, name = _number(given, launched.local_index, 0), launched.name
    if "SLURM_ARRAY_TASK_COUNT" in given:
        array_index, array_count = _of_array(given)
        index, count, name = array_index * count + index, array_count * count, name or "a Slurm array"
    return Worker(index, count, local_index, name)


def parse_shard(text: str, what: str) -> tuple[int, int]:
    """Read ``i/n``, i counted from 0.

    Args:
        text: the text.
        what: what it was given as, for errors.

    Raises:
        ValueError: it is something else.

    Example:
        >>> parse_shard("0/4", "--shard")
        (0, 4)
    """
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise ValueError(f"{what} must be given as i/n with i from 0 to n-1, such as 0/4, got {text!r}")
    return int(index), int(count)


def _local_index(given: Mapping[str, str]) -> int:
    names = (known.local_index for known in _LAUNCHERS)
    return next((_number(given, name, 0) for name in names if name in given), 0)


def _numbered(given: Mapping[str, str], index_name: str, count_name: str) -> tuple[int, int]:
    index, count = _number(given, index_name), _number(given, count_name)
    if index >= count:
        raise ValueError(f"{index_name} is {index} and {count_name} is {count}: it must be one of 0 to {count - 1}")
    return index, count


def _of_array(given: Mapping[str, str]) -> tuple[int, int]:
    """Place of a task in its array, and how many there are.

    An array may be any list of numbers, of which a task knows its own, the first one and a step. Where they are not
    evenly spaced two tasks can come to begin with one share; claims keep them apart.
    """
    count, step = _number(given, "SLURM_ARRAY_TASK_COUNT"), _number(given, "SLURM_ARRAY_TASK_STEP", 1)
    offset = _number(given, "SLURM_ARRAY_TASK_ID") - _number(given, "SLURM_ARRAY_TASK_MIN", 0)
    if count < 1 or step < 1 or offset < 0:
        names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP")]
        shown = ", ".join(f"{name}={given[name]}" for name in names if name in given)
        raise ValueError(f"{shown} are those of no Slurm array: set {SHARD_VARIABLE}=i/n")
    return offset // step % count, count


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}: correct it, or set {SHARD_VARIABLE}=i/n")
    return int(text)
