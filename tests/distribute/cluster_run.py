"""A run and a module for the command line, and how to start workers of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

REPOSITORY = Path(__file__).parents[2]

MODULE = """
import os
import torch
from torch import nn
from torch.utils.data import TensorDataset

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
inputs, labels = torch.randn(240, 6, generator=generator), torch.randint(0, 3, (240,), generator=generator)

class Slow(nn.Sequential):
    # some milliseconds a batch, so that there is time to stop a build
    def forward(self, x):
        for _ in range(int(os.environ.get("SLOW", "0"))):
            torch.linalg.svdvals(torch.ones(200, 200))
        return super().forward(x)

def model():
    torch.manual_seed(0)
    return Slow(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))

def train_set():
    return TensorDataset(inputs, labels)
"""

ARGUMENTS = ["--model", "cluster_module:model", "--data", "cluster_module:train_set", "--lr", "0.1"]
ARGUMENTS += ["--checkpoint", "10=first.pt", "--checkpoint", "20=second.pt", "--batch-size", "8"]
ARGUMENTS += ["--sketch-dim", "64", "--shard-rows", "16", "--no-progress"]


def write_run(folder: Path) -> None:
    """Checkpoints and the module, in a folder from which commands are run."""
    (folder / "cluster_module.py").write_text(MODULE)
    for seed, name in enumerate(("first.pt", "second.pt")):
        torch.manual_seed(seed)
        torch.save(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)).state_dict(), folder / name)


def environment(**variables: str) -> dict[str, str]:
    """Of a worker with one thread, without what this process's own launcher said."""
    said = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "PMI_", "OMPI_", "SUBMITIT_", "SOURCE_PROJ_SHARD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(said)}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-c", "from source_proj.cli import main; main()", *arguments]


def torchrun(folder: Path, processes: int, *arguments: str) -> None:
    """Run a command under torchrun, without its agent's port being taken by another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend"]
    launched += ["c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--no-python", *command(*arguments)]
    done = subprocess.run(
        launched, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
