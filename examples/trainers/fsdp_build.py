"""A bank of a model that no process holds whole: FSDP2 shards it, and each process makes its own share of the rows.

    torchrun --nproc-per-node 2 examples/trainers/fsdp_build.py             (gloo, on a laptop)
    torchrun --nproc-per-node 8 examples/trainers/fsdp_build.py --layers 48 --width 6144 --tokens 1024 --offload

Prints how many bytes of the parameters each process holds, at rest and at most while it runs, beside the whole
model's; with ``--compare`` also how far the rows are from those of one process with the whole model.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.utils.data import TensorDataset

import source_proj as sp

VOCABULARY = 256
TASK = sp.CausalLM(shift=False)


class Layer(nn.Module):
    """Attention over the tokens before, and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → the same."""
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in parts)  # heads of 16
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        fed: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return x + fed


def decoder(layers: int, width: int, seed: int) -> nn.Sequential:
    """A small language model."""
    torch.manual_seed(seed)
    blocks = (Layer(width) for _ in range(layers))
    return nn.Sequential(nn.Embedding(VOCABULARY, width), *blocks, nn.Linear(width, VOCABULARY))


def watched(model: nn.Module) -> list[int]:
    """Bytes of all parameters that are in memory when a unit of the model runs: filled in as it does."""
    seen: list[int] = []

    def look(*_: object) -> None:
        seen.append(held(model))

    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.register_forward_pre_hook(look)
    return seen


def held(model: nn.Module) -> int:
    """Bytes of the parameters that this process has, of slices and of those that are whole at the moment."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in model.parameters())


def main() -> None:
    """Build a bank, and say what each process held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="of an example")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--offload", action="store_true", help="slices stay in the machine's memory")
    parser.add_argument("--compare", action="store_true", help="build with the whole model too")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    model: Any = decoder(args.layers, args.width, seed=0).to("cuda" if cuda and not args.offload else "cpu")
    whole = held(model)
    policy = CPUOffloadPolicy(pin_memory=cuda) if args.offload else OffloadPolicy()
    for block in model[1:-1]:
        fully_shard(block, offload_policy=policy)
    fully_shard(model, offload_policy=policy)
    seen = watched(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (args.examples, args.tokens), generator=generator)
    data = TensorDataset(tokens, tokens)
    run = sp.Trajectory([sp.Checkpoint(decoder(args.layers, args.width, seed=1).state_dict(), step=100, lr=0.1)])
    options: Any = {"sketch": sp.Sketch(dim=1024), "batch_size": args.batch_size, "parameters": ["*"]}
    options |= {"shard_rows": 2 * args.batch_size, "storage": "float32", "progress": False}
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    bank = sp.build(model, TASK, run, data, Path(folder[0]) / "bank", **options)
    shares = torch.tensor([held(model), max(seen)], dtype=torch.int64, device="cuda" if cuda else "cpu")
    gathered = [torch.zeros_like(shares) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, shares)
    if dist.get_rank() == 0:
        print(f"{len(gathered)} processes, {whole / 1e6:.2f} MB of parameters in all, {bank.n_rows} rows")
        for rank, (rest, most) in enumerate(share.tolist() for share in gathered):
            print(f"process {rank}: {rest / 1e6:.2f} MB at rest ({rest / whole:.2f} of all), {most / 1e6:.2f} at most")
        if args.compare:
            device = "cuda" if cuda else "cpu"
            other = decoder(args.layers, args.width, seed=0).to(device)
            alone = sp.build(other, TASK, run, data, Path(folder[0]) / "whole", **options)
            print(f"rows differ from those of one process by {distance(bank, alone):.1e} (relative)")
    dist.barrier()
    dist.destroy_process_group()


def distance(bank: sp.Bank, other: sp.Bank) -> float:
    """Relative difference of the rows of two banks."""
    first, second = (torch.cat([block.rows for block in each.stages[0].iter_rows(0)]) for each in (bank, other))
    return float((first - second).norm() / second.norm())


if __name__ == "__main__":
    main()
