"""Models whose parameters are sharded over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Every process holds a slice of each parameter as a DTensor. While a unit runs, FSDP puts the whole parameters into its
modules: these are what autograd sees, always the same objects. All passes are collectives, so that the processes of a
model must make equally many of them; on which examples is up to each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from source_proj._errors import SourceProjError
from source_proj.trajectory.placement.base import Live, Placement, State, entries_to_load, requiring_only
from source_proj.trajectory.placement.lockstep import Lockstep
from source_proj.trajectory.placement.refused import refuse_placements

__all__ = ["Sharded", "is_sharded"]


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard`, or anything else that makes DTensors, was applied to the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


class Sharded(Placement):
    """A slice of each parameter is here, and the model runs together with the other processes.

    Args:
        model: after `fully_shard`.

    Raises:
        SourceProjError: parameters are split by tensor or expert parallelism, or over different groups of processes.
    """

    is_copied = False
    is_whole = False
    kind = "sharded over processes (FSDP2)"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._live: dict[str, nn.Parameter] = {}
        self._rest()
        sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        inside = {id(p) for unit in self._units for p in unit.parameters()}
        for name, p in sharded.items():
            refuse_placements(name, p, of_fsdp=id(p) in inside)
        meshes = list(dict.fromkeys(p.device_mesh for p in sharded.values()))
        if len(meshes) > 1:
            raise SourceProjError(
                f"the parameters are sharded over {len(meshes)} different meshes ({meshes[:3]}), as expert parallelism "
                "does: apply fully_shard with one mesh for all"
            )
        (mesh,) = meshes
        self._mesh_type = mesh.device_type
        if mesh.ndim == 1:
            group: Any = mesh.get_group()
        elif mesh.size() == dist.get_world_size():
            group = dist.group.WORLD
        else:
            raise SourceProjError(
                f"the mesh {mesh} has {mesh.ndim} dimensions and not all of the {dist.get_world_size()} processes: "
                "replicate over all of them, or shard along one dimension"
            )
        self.lockstep = Lockstep(group, self.device)

    @property
    def device(self) -> torch.device:
        """The process's own GPU, or the CPU."""
        if self._mesh_type == "cpu":
            return torch.device("cpu")
        return torch.device(self._mesh_type, torch.get_device_module(self._mesh_type).current_device())

    def devices(self, names: Collection[str]) -> list[torch.device]:
        """One: layers run where the process does."""
        return [self.device] if names else []

    def spacing(self, names: Collection[str]) -> float:
        """As for whole models, of the parameters as they are while the model runs."""
        return max(torch.finfo(p.dtype).eps for p in self._whole(names).values())

    def load(self, state: State) -> None:
        """The leader reads, and sends each process its slices, one parameter after the other."""
        self._rest()
        own = self.model.state_dict(keep_vars=True)
        held: dict[str, Tensor] = {}

        def read() -> list[str]:
            held.update(entries_to_load(state(), self.model))
            return list(held)

        for name in self.lockstep.from_leader(read):
            entry = own[name]
            whole = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")  # not new_empty, whose result is sharded
            value = (held[name].detach() if self.lockstep.leads else whole).to(self.device, entry.dtype)
            with torch.no_grad():
                if isinstance(entry, DTensor):
                    slices = distribute_tensor(value, entry.device_mesh, entry.placements)
                    entry.to_local().copy_(slices.to_local())
                else:
                    entry.copy_(self.lockstep.tensor_from_leader(value))

    @contextmanager
    def running(self, names: Collection[str]) -> Iterator[Live]:
        """As for whole models: FSDP passes on the flags of the slices, which are in their places before and after."""
        self._rest()
        live: Live = {name: [p] for name, p in self._whole(names).items()}
        with requiring_only(self.model, names):
            try:
                yield live
            finally:
                self._rest()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The model's own slices are kept in the memory of the machine meanwhile."""
        self._rest()
        slices = {name: _local(p).detach().to("cpu", copy=True) for name, p in self._tensors()}
        flags = [(module, module.training) for module in self.model.modules()]
        try:
            yield
        finally:
            self._rest()
            with torch.no_grad():
                for name, p in self._tensors():
                    _local(p).copy_(slices[name])
            for module, flag in flags:
                module.training = flag

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.model.named_parameters(), *self.model.named_buffers()]

    def _rest(self) -> None:
        """Put the slices into all modules: a root keeps its parameters whole after a forward pass."""
        for unit in self._units:
            unit.reshard()

    def _whole(self, names: Collection[str]) -> dict[str, nn.Parameter]:
        """The parameters that autograd sees; gathered once, unit by unit, to learn which these are."""
        if not self._live.keys() >= set(names):
            self._rest()
            for unit in self._units:
                unit.unshard()
                present = self.model.named_parameters(remove_duplicate=False)
                self._live |= {name: p for name, p in present if not isinstance(p, DTensor)}
                unit.reshard()
            for name, p in self.model.named_parameters():
                if name in names and name not in self._live:  # still split where FSDP gathered what it had split
                    refuse_placements(name, p, of_fsdp=False)
        return {name: self._live[name] for name in names}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
