"""Models whose parameters are not all there: split so that no process sees a whole gradient, or not made yet."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from source_proj._errors import SourceProjError

__all__ = ["refuse_parallelism", "refuse_placements", "require_shapes", "require_shapes_of"]

_REMEDY = "shard the plain model by torch.distributed.fsdp.fully_shard alone, or give it a device_map"


def refuse_parallelism(model: object) -> None:
    """Refuse pipeline schedules, FSDP1, DeepSpeed's ZeRO 3, and the tensor parallelism of Megatron and transformers.

    Raises:
        SourceProjError: names what it is, and the remedy.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else [model]
    for module in modules:
        kind = type(module)
        if kind.__module__.startswith("torch.distributed.pipelining"):
            raise SourceProjError(
                f"{kind.__name__} is a pipeline schedule of torch.distributed.pipelining, of which a process runs one "
                f"stage alone: {_REMEDY}"
            )
        if kind.__name__ == "FullyShardedDataParallel":
            raise SourceProjError(
                f"the model is wrapped by FSDP1 ({kind.__name__}), whose flat parameters are no layer's own: {_REMEDY}"
            )
    if isinstance(model, nn.Module):
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "ds_id"):
                raise SourceProjError(f"parameter {name!r} is partitioned by DeepSpeed's ZeRO stage 3: {_REMEDY}")
            if getattr(parameter, "tensor_model_parallel", False):
                raise SourceProjError(f"parameter {name!r} is split by Megatron's tensor parallelism: {_REMEDY}")
        size = getattr(model, "_tp_size", None)
        if isinstance(size, int) and size > 1:
            raise SourceProjError(
                f"the model is split by transformers' tensor parallelism (tp_plan, {size} processes): {_REMEDY}"
            )


def refuse_placements(name: str, parameter: Any, *, of_fsdp: bool) -> None:
    """Refuse a DTensor that is not split, or otherwise than by FSDP.

    Args:
        name: the parameter's.
        parameter: a DTensor.
        of_fsdp: whether it lies in a module that was given to ``fully_shard``.

    Raises:
        SourceProjError: names the parameter, its placements and the dimensions of its mesh.
    """
    split = [placement for placement in parameter.placements if not placement.is_replicate()]
    if not split and not of_fsdp:
        raise SourceProjError(
            f"parameter {name!r} is a DTensor that every process holds whole (placements "
            f"{tuple(parameter.placements)}), whose gradients are DTensors too: give the plain model, with "
            f"parameter.to_local() in its place, or {_REMEDY}"
        )
    if len(split) > of_fsdp:
        mesh = parameter.device_mesh
        raise SourceProjError(
            f"parameter {name!r} is split by tensor or expert parallelism (placements {tuple(parameter.placements)} on "
            f"the mesh dimensions {mesh.mesh_dim_names or mesh.ndim}), so that no process has a layer's whole "
            f"gradient: {_REMEDY}"
        )


def require_shapes(model: nn.Module) -> None:
    """Refuse a model of lazy modules that have not seen a batch yet.

    Raises:
        ValueError: names their parameters.
    """
    require_shapes_of(dict(chain(model.named_parameters(), model.named_buffers())))


def require_shapes_of(tensors: Mapping[str, Any]) -> None:
    """Refuse tensors of lazy modules that have not seen a batch yet, by name.

    Raises:
        ValueError: names them.
    """
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        more = f" and {len(lazy) - 10} more" if len(lazy) > 10 else ""
        raise ValueError(
            f"{lazy[:10]}{more} of the model have no shape yet, as those of lazy modules before their first batch: "
            "call the model on a batch first, model(inputs)"
        )
