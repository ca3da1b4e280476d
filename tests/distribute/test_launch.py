import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from source_proj.distribute import Worker, this_worker
from source_proj.distribute.launch import parse_shard

COUNTS = st.integers(1, 6)


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "a/b", "1/", "/2", ""])
def test_wrong_shards_are_refused(text):
    for call in (lambda: parse_shard(text, "--shard"), lambda: this_worker({"SOURCE_PROJ_SHARD": text})):
        with pytest.raises(ValueError, match=r"i/n"):
            call()


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        ("Slurm", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")),
        ("Open MPI", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")),
        ("submitit", ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")),
        ("MPI", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")),
    ],
)
def test_launchers_say_who_is_who(launcher, names):
    given = dict(zip(names, ("5", "8", "1"), strict=True))
    assert this_worker(given) == Worker(5, 8, 1, launcher)
    assert this_worker({names[0]: "5"}) == Worker(0, 1, 0, "")  # without a count nobody was launched
    with pytest.raises(ValueError, match=rf"{names[0]} is 8 and {names[1]} is 8"):
        this_worker({**given, names[0]: "8"})
    with pytest.raises(ValueError, match=rf"{names[0]} must be a number, got 'x'"):
        this_worker({**given, names[0]: "x"})


def test_a_process_that_nobody_launched_is_alone():
    assert this_worker({"SLURM_NTASKS": "4", "PATH": "/bin"}).shard == (0, 1)
    assert this_worker({}).device is None


def test_the_inner_launcher_counts_and_the_general_variable_most():
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
    torchrun = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}
    assert this_worker({**slurm, **torchrun}) == Worker(6, 8, 2, "torchrun")
    given = {**slurm, **torchrun, "SOURCE_PROJ_SHARD": "0/3"}
    assert this_worker(given) == Worker(0, 3, 2, "SOURCE_PROJ_SHARD")


@given(tasks=COUNTS, workers=COUNTS, begin=COUNTS, step=COUNTS)
def test_the_workers_of_an_array_are_numbered_without_gaps(tasks, workers, begin, step):
    shards = []
    for task in range(tasks):
        array = {
            "ID": begin + task * step,
            "COUNT": tasks,
            "MIN": begin,
            "MAX": begin + (tasks - 1) * step,
            "STEP": step,
        }
        variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        for worker in range(workers):
            variables |= {"SLURM_PROCID": str(worker), "SLURM_NTASKS": str(workers), "SLURM_LOCALID": str(worker)}
            shards.append(this_worker(variables).shard)
    assert shards == [(index, tasks * workers) for index in range(tasks * workers)]


def test_an_array_of_any_numbers_stays_in_range():
    for number in (3, 4, 17):  # sbatch --array=3,4,17
        names = {"ID": number, "COUNT": 3, "MIN": 3, "MAX": 17, "STEP": 1}
        index, count = this_worker({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}).shard
        assert count == 3
        assert 0 <= index < 3


@pytest.mark.parametrize("change", [{"COUNT": "0"}, {"STEP": "0"}, {"MIN": "9"}, {"ID": "?"}])
def test_an_array_that_makes_no_sense_is_refused(change):
    names = {"ID": "1", "COUNT": "2", "MIN": "0", "STEP": "1", **change}
    with pytest.raises(ValueError, match=r"SLURM_ARRAY_TASK_.*set SOURCE_PROJ_SHARD=i/n"):
        this_worker({f"SLURM_ARRAY_TASK_{name}": value for name, value in names.items()})


def test_devices_go_round(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Worker(4 + place, 8, place, "torchrun").device for place in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert this_worker({}).device is None
