"""How each kind of layer's per-example parameter gradient follows from its input x and its output's gradient g."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from source_proj import kernels
from source_proj.gradients import convolution
from source_proj.gradients.convolution import as_multiplied
from source_proj.gradients.sink import GradientSink

__all__ = ["Rule", "rule_for"]

# Of a normalised input at a time on a CPU: more would come as untouched pages, which cost more than the arithmetic.
_NORMALISED_BYTES = 8 * 2**20

Names = Mapping[str, str]  # attributed local parameter name ("weight") → full name ("blocks.0.mlp.weight")
Apply = Callable[[Any, Names, Tensor, Tensor, GradientSink], None]


@dataclass(frozen=True)
class Rule:
    """One kind of layer: the local names of parameters that it knows, and how it makes their gradients.

    `apply(module, names, x, g, sink)` takes the layer's input x and the gradient g of its output, both with the
    examples first and of any floating-point types, and hands every attributed parameter's per-example gradient to
    `sink`: products of halves as they are, all else in float32. `positional` layers act on
    the last dimension alone, so that all dimensions between it and the examples are alike.
    """

    parameters: frozenset[str]
    apply: Apply
    positional: bool

    def add(self, module: nn.Module, names: Names, x: Tensor, g: Tensor, sink: GradientSink, size: int) -> None:
        """The layer's pieces for a batch of `size` examples; x and g may hold r rows per example, (size · r, …)."""
        if g.shape[0] == size:
            self.apply(module, names, x, g, sink)
            return
        x, g = x.reshape(size, -1, *x.shape[1:]), g.reshape(size, -1, *g.shape[1:])
        if self.positional:
            self.apply(module, names, x, g, sink)
            return
        for r in range(g.shape[1]):
            self.apply(module, names, x[:, r], g[:, r], sink)


def _positions(tensor: Tensor) -> Tensor:
    """(B, …, n) → (B, T, n): all that lies between examples and features is one axis of positions."""
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor if tensor.dim() == 3 else tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _summed(g: Tensor) -> Tensor:
    """(B, T, n) → the sums over positions (B, n), float32."""
    return g[:, 0].float() if g.shape[1] == 1 else g.sum(1, dtype=torch.float32)


def _linear(_module: nn.Linear, names: Names, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    """∂/∂W = Σ_t g_t ⊗ x_t, ∂/∂b = Σ_t g_t."""
    g = _positions(g)
    if "weight" in names:
        sink.outer(names["weight"], g, as_multiplied(_positions(x), g))
    if "bias" in names:
        sink.add(names["bias"], _summed(g))


def _transposed_linear(_module: nn.Module, names: Names, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    """The `Conv1D` of transformers: y = x W + b with W (in, out), so ∂/∂W = Σ_t x_t ⊗ g_t."""
    g = _positions(g)
    if "weight" in names:
        sink.outer(names["weight"], as_multiplied(_positions(x), g), g)
    if "bias" in names:
        sink.add(names["bias"], _summed(g))


def _embedding(module: nn.Embedding, names: Names, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    """Row x_t receives g_t; the padding row receives nothing."""
    if "weight" in names:
        index = x.reshape(x.shape[0], -1)
        g = g.reshape(*index.shape, -1)
        if module.padding_idx is not None:
            g = g.masked_fill((index == module.padding_idx).unsqueeze(-1), 0.0)
        sink.scatter(names["weight"], index, g)


def _affine(
    names: Names, normalise: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, sink: GradientSink, keep: int
) -> None:
    """Where y = weight · x̂ + bias: ∂/∂weight = Σ g x̂, ∂/∂bias = Σ g, over all but the parameters' own dims.

    These are the last `keep` dims, or the channels, dim 1, for keep = 0.
    """
    dims = [d for d in range(1, g.dim()) if (d < g.dim() - keep if keep else d != 1)]

    def summed(tensor: Tensor) -> Tensor:
        return tensor.sum(dims, dtype=torch.float32) if dims else tensor

    if "weight" in names:
        step = max(1, _NORMALISED_BYTES // (4 * g[0].numel())) if g.device.type == "cpu" else len(g)
        parts = (slice(start, start + step) for start in range(0, len(g), step))
        sink.add(names["weight"], torch.cat([summed(normalise(x[part].float()).mul_(g[part])) for part in parts]))
    if "bias" in names:
        sink.add(names["bias"], summed(g))


def _add_sums(names: Names, sums: tuple[Tensor, Tensor], sink: GradientSink) -> None:
    """What a kernel summed for the weight and the bias."""
    for local, total in zip(("weight", "bias"), sums, strict=True):
        if local in names:
            sink.add(names[local], total)


def _along_rows(
    names: Names, shape: list[int], eps: float, x: Tensor, g: Tensor, sink: GradientSink, *, centred: bool
) -> None:
    """Layers that normalise along the last dims, of this shape."""
    sums = kernels.row_sums(x, g, len(shape), eps, centred=centred)
    if sums is not None:
        _add_sums(names, sums, sink)
    elif centred:
        _affine(names, lambda x: F.layer_norm(x, shape, eps=eps), x, g, sink, len(shape))
    else:
        _affine(names, lambda x: F.rms_norm(x, shape, eps=eps), x, g, sink, len(shape))


def _layer_norm(module: nn.LayerNorm, names: Names, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    _along_rows(names, list(module.normalized_shape), module.eps, x, g, sink, centred=True)


def _rms_norm(module: nn.RMSNorm, names: Names, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    precise = torch.promote_types(module.weight.dtype, torch.float32)  # torch computes halves in float32
    eps = torch.finfo(precise).eps if module.eps is None else module.eps
    _along_rows(names, list(module.normalized_shape), eps, x, g, sink, centred=False)


def _named_rms_norm(module: nn.Module, names: Names, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    """Those of transformers; where y = (1 + weight) · x̂ the gradient is the same."""
    shape, eps = list(cast(Tensor, module.weight).shape), cast(float, _epsilon(module))
    _along_rows(names, shape, eps, x, g, sink, centred=False)


def _group_norm(module: nn.GroupNorm, names: Names, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    _affine(names, lambda x: F.group_norm(x, module.num_groups, eps=module.eps), x, g, sink, 0)


def _batch_norm(
    module: nn.modules.batchnorm._BatchNorm, names: Names, x: Tensor, g: Tensor, sink: GradientSink
) -> None:
    """In evaluation mode x̂ = (x − running mean)/√(running variance + ε): no example sees another."""
    mean, variance = (cast(Tensor, statistic).float() for statistic in (module.running_mean, module.running_var))
    sums = kernels.channel_sums(x, g, mean, variance, module.eps)
    if sums is not None:
        _add_sums(names, sums, sink)
        return
    _affine(names, lambda x: F.batch_norm(x, mean, variance, eps=module.eps), x, g, sink, 0)


def _instance_norm(
    module: nn.modules.instancenorm._InstanceNorm, names: Names, x: Tensor, g: Tensor, sink: GradientSink
) -> None:
    """Each channel of each example by itself, or in evaluation mode by running statistics where it keeps them."""
    if module.training or module.running_mean is None or module.running_var is None:
        _affine(names, lambda x: F.instance_norm(x, eps=module.eps), x, g, sink, 0)
        return
    mean, variance = module.running_mean.float(), module.running_var.float()
    _affine(names, lambda x: F.batch_norm(x, mean, variance, eps=module.eps), x, g, sink, 0)


def _prelu(module: nn.PReLU, names: Names, x: Tensor, g: Tensor, sink: GradientSink) -> None:
    """∂/∂a = Σ g min(x, 0), for each channel or for all."""
    if "weight" in names:
        below = (x.float().clamp(max=0) * g).reshape(len(g), g.shape[1] if g.dim() > 1 else 1, -1).sum(2)
        sink.add(names["weight"], below if module.num_parameters > 1 else below.sum(1, keepdim=True))


_WEIGHT_BIAS = frozenset({"weight", "bias"})
_RULES: dict[type[nn.Module], Apply] = {
    nn.Linear: _linear,
    nn.Conv1d: convolution.apply,
    nn.Conv2d: convolution.apply,
    nn.Conv3d: convolution.apply,
    nn.ConvTranspose1d: convolution.apply_transposed,
    nn.ConvTranspose2d: convolution.apply_transposed,
    nn.ConvTranspose3d: convolution.apply_transposed,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,  # in evaluation, as any other
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.PReLU: _prelu,
}
_POSITIONAL = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def rule_for(module: nn.Module) -> Rule | str:
    """The rule that covers this module, or the reason why none does."""
    kind = type(module)
    if "forward" in vars(module) and not _is_dispatched(module):
        return f"{kind.__name__} has a forward of its own on the instance"
    for base, apply in _RULES.items():
        if isinstance(module, base) and kind.forward is base.forward:
            return _obstacle(module) or Rule(_WEIGHT_BIAS, apply, positional=base in _POSITIONAL)
    if _is_transposed_linear(module):
        return Rule(_WEIGHT_BIAS, _transposed_linear, positional=True)
    if _is_named_rms_norm(module):
        return Rule(frozenset({"weight"}), _named_rms_norm, positional=True)
    return f"no rule covers {kind.__name__}"


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "Embedding with max_norm renormalises its weight in place"
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        return "Embedding with scale_grad_by_freq divides gradients by counts over the batch"
    return None


# transformers is no dependency of ours, so its layers are known by name and shape. What a name promises is proven on
# two examples before any rule is trusted.


def _is_transposed_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    width = getattr(module, "nf", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and weight.shape[1] == cast(int, width)
    )


def _is_named_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    return named and isinstance(weight, Tensor) and weight.dim() == 1 and _epsilon(module) is not None


def _is_dispatched(module: nn.Module) -> bool:
    """Whether accelerate moves inputs, and weights, before it calls the forward of the module's class."""
    before = vars(module).get("_old_forward")
    return hasattr(module, "_hf_hook") and getattr(before, "__func__", None) is type(module).forward


def _epsilon(module: nn.Module) -> float | None:
    value = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return value if isinstance(value, float) else None
