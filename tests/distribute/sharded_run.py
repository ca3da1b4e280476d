"""Builds by the processes of one model, which FSDP2 shards; forks of a program, so that importing is done once.

    python tests/distribute/sharded_run.py FOLDER 2 plain thrifty

Writes the banks FOLDER/plain_2, ..., and from each process FOLDER/plain_2.<rank>.json: bytes of its slices and of all
parameters, and scores; and what it was refused.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing import start_processes
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj._errors import SourceProjError

N, LENGTH, VOCABULARY, WIDTH = 35, 7, 11, 16
TASK = sp.CausalLM(shift=False)


class Block(nn.Module):
    """Attention over the tokens before, and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        return x + self.down(nn.functional.gelu(self.up(x)))


class Decoder(nn.Module):
    """A language model with tied embeddings, and a buffer; on demand its activations are computed once more."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("scale", torch.ones(WIDTH))
        self.checkpointing = checkpointing

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x * self.scale)


def decoder(seed: int, **options: bool) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(**options)


def data(n: int = N) -> TensorDataset:
    tokens = torch.randint(0, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(0))
    return TensorDataset(tokens, tokens)


def run() -> sp.Trajectory:
    """Checkpoints of other weights than any model here begins with, and of other buffers."""
    states = [decoder(seed).state_dict() for seed in (1, 2)]
    states[1]["scale"] = torch.linspace(0.5, 2, WIDTH)
    return sp.Trajectory([sp.Checkpoint(state, step, lr=0.1) for step, state in zip((10, 20), states, strict=True)])


def build(model: nn.Module, path: Path, **options: object) -> sp.Bank:
    settings = {"sketch": sp.Sketch(dim=128), "batch_size": 4, "shard_rows": 8, "storage": "float32"} | options
    settings = {"parameter_weights": "agreement"} | settings  # measured by all processes together
    return sp.build(model, TASK, run(), data(), path, progress=False, parameters=["*"], **settings)


def sharded(offload: bool = False, **options: bool) -> nn.Module:
    model = decoder(0, **options)
    for block in model.blocks:
        fully_shard(block, offload_policy=CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy())
    return fully_shard(model)


VARIANTS = {"plain": {}, "thrifty": {"offload": True, "checkpointing": True}}


def worker(rank: int, folder: Path, processes: int, names: list[str]) -> None:
    """Build banks with sharded models, ask them, and write down what this process holds."""
    dist.init_process_group("gloo", f"file://{folder}/group_{processes}", rank=rank, world_size=processes)
    for name in names:
        model = sharded(**VARIANTS[name])
        before = {key: p.to_local().clone() for key, p in model.named_parameters()}
        path = folder / f"{name}_{processes}"
        bank = build(model, path, takeover=300.0 if name == "thrifty" else None)
        again = build(model, path)
        assert again.fingerprint == bank.fingerprint
        scores = sp.Source(bank, model=model, task=TASK).score(data(3)).to_numpy()
        assert all(torch.equal(p.to_local(), before[key]) for key, p in model.named_parameters())
        assert all(isinstance(p, DTensor) and p.grad is None and p.requires_grad for p in model.parameters())
        assert model.training
        held = sum(p.to_local().nbytes for p in model.parameters())
        facts = {"held": held, "whole": sum(p.nbytes for p in decoder(0).parameters()), "scores": scores.tolist()}
        Path(f"{path}.{rank}.json").write_text(json.dumps(facts))
    refusals(folder, rank, processes)
    dist.destroy_process_group()


def refusals(folder: Path, rank: int, size: int) -> None:
    """What a sharded model cannot do is said by all of its processes, in the same words."""
    said = [
        refusal(lambda: build(sharded(), folder / "refused", shard=(rank, size))),
        refusal(lambda: build(sharded(), folder / "refused", gradients="general")),
        refusal(lambda: build(split_by_tensors(), folder / "refused")),
        refusal(lambda: build(replicated(), folder / "refused")),
    ]
    (folder / f"refusals_{size}.{rank}.json").write_text(json.dumps(said))


def refusal(call: Callable[[], object]) -> str:
    """The words of an error that is raised on purpose."""
    try:
        call()
    except SourceProjError as error:
        return str(error)
    raise SystemExit("nothing was refused")


def split_by_tensors() -> nn.Module:
    """A model that is split by columns, as tensor parallelism does, and then sharded along the other dimension."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = decoder(0)
    parallelize_module(model.blocks[0], mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def replicated() -> nn.Module:
    """A model whose parameters are DTensors that every process holds whole."""
    return distribute_module(decoder(0), init_device_mesh("cpu", (dist.get_world_size(),)))


def main() -> None:
    """Run the processes."""
    torch.set_num_threads(1)
    folder, processes, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    start_processes(worker, (folder, processes, names), processes, start_method="fork")


if __name__ == "__main__":
    main()
