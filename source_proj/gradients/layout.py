"""Where the examples lie in every tensor of a forward pass, followed through autograd's own graph.

The hook path cuts what a layer saw into examples by position, so each layer's input must hold them in order, in front,
in equal shares. The graph that autograd keeps for the backward pass says which operations lie between the layers and
the values, with their dims and shapes, at no cost but the walk. The dim that holds the examples is followed through
all that moves dims and keeps rows; what places rows by *values* (masks, gathers, sorting, packing, routing) or is not
known ends the walk with its name, and then such a batch is proven by the law itself (`proof.py`).

What happens to the inputs before the first layer has no graph. But examples that were reordered there must be put back
in order behind the layers, for the values to be in order, and that is seen.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Call", "Node", "label", "walk", "where_examples_are_lost"]

Node: TypeAlias = Any  # torch.autograd.graph.Node: its saved dims are attributes by name, which no stub knows
Shape: TypeAlias = Sequence[int]


class Call(NamedTuple):
    """One call of a covered layer, as the graph has it.

    Attributes:
        tap: the node behind its output.
        inputs: the nodes that made its inputs, None where no graph leads there.
        place: of the dim that must hold the examples.
    """

    tap: Node
    inputs: tuple[Node | None, ...]
    place: int = 0


class _Child(NamedTuple):
    position: int  # of the dim that holds the examples
    shape: Shape
    place: int  # among the operation's inputs


class _Lost(Exception):
    """No dim is known to hold the examples in order."""


_Rule: TypeAlias = Callable[[Node, list[_Child], Shape, int], int]


def walk(roots: Iterable[Node], edges: Callable[[Node], Iterable[Node]]) -> list[Node]:
    """All nodes that edges lead to, each behind those that it leads to."""
    order: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node in seen:
            order[stack.pop()] = None  # a node that is there already keeps its place
        else:
            seen.add(node)
            stack.extend(edges(node))
    return list(order)


def label(node: Node) -> str:
    """A node's operation: "IndexBackward0" → "Index"."""
    return _operation(type(node).__name__)  # a custom function's node may have another name()


@functools.lru_cache(maxsize=1 << 10)
def _operation(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name)


def where_examples_are_lost(order: Sequence[Node], calls: Sequence[Call], root: Node, size: int) -> str | None:
    """Name the first operation behind which no dim is known to hold the `size` examples in order; None if all are.

    Args:
        order: the graph outside of the layers, from `walk`.
        calls: the calls of covered layers.
        root: the node of the values (B,).
        size: B, at least 2: one example cannot be mistaken for another.
    """
    positions: dict[Node, int] = {call.tap: call.place for call in calls}
    shapes: dict[Node, Shape] = {}
    inputs = {call.tap: call.inputs for call in calls}
    for node in order:
        if node in inputs:
            place = positions[node]
            if any(positions.get(made, place) != place for made in inputs[node] if made is not None):
                return "a layer that has other than the examples where they should be"
            continue
        if all(child not in positions for child, _ in node.next_functions):
            continue  # made of parameters that are not attributed: like the inputs, which have no graph
        try:
            positions[node] = _position(node, positions, shapes, size)
        except _Lost:
            return label(node)
    return None if positions.get(root) == 0 else label(root)


def _position(node: Node, positions: dict[Node, int], shapes: dict[Node, Shape], size: int) -> int:
    children = [
        _Child(positions[child], shapes[child] if output == 0 and child in shapes else _shape(child, output), place)
        for place, (child, output) in enumerate(node.next_functions)
        if child in positions
    ]
    rule = _rule_for(label(node))
    if rule is None:
        raise _Lost
    shape = shapes[node] = _shape(node, 0)
    position = rule(node, children, shape, size)
    if not 0 <= position < len(shape) or shape[position] % size:
        raise _Lost
    return position


def _shape(node: Node, output: int) -> Shape:
    shape: Shape = node._input_metadata[output].shape
    return shape


def _dims(node: Node, name: str, ndim: int) -> list[int]:
    """A saved dim or dims from 0 on; autograd keeps negative ones as unsigned numbers."""
    saved = getattr(node, name, None)
    if saved is None:
        return list(range(ndim))
    wrapped = (d - (1 << 64) if d >= 1 << 63 else d for d in (saved if isinstance(saved, tuple) else (saved,)))
    return [d % max(ndim, 1) for d in wrapped] or list(range(ndim))


def _broadcast(_node: Node, children: list[_Child], shape: Shape, _size: int) -> int:
    """Operations entry by entry; all inputs must agree, aligned at their last dims."""
    found = {len(shape) - len(child.shape) + child.position for child in children}
    if len(found) > 1:
        raise _Lost
    position = found.pop()
    if any(child.shape[child.position] != shape[position] for child in children):
        raise _Lost
    return position


def _same(_node: Node, children: list[_Child], shape: Shape, _size: int) -> int:
    """Layers and attention over whole examples: the first dim."""
    if any(child.position for child in children) or shape[0] != children[0].shape[0]:
        raise _Lost
    return 0


def _by_weight(node: Node, children: list[_Child], shape: Shape, size: int) -> int:
    """Layers with weights and biases of their own, which hold no examples however long they are."""
    if any(child.place > 0 for child in children):
        raise _Lost
    return _same(node, children, shape, size)


def _batch_norm(node: Node, children: list[_Child], shape: Shape, size: int) -> int:
    """By statistics that are there; by the batch's own each channel is apart, and so are examples along that dim."""
    if [child.position for child in children if child.place == 0] == [1] and len(children) == 1:
        return 1
    if node._saved_training:
        raise _Lost
    return _by_weight(node, children, shape, size)


def _along(node: Node, children: list[_Child], shape: Shape, size: int) -> int:
    """Operations along one dim, which must not be that of the examples."""
    (child,) = children[:1]
    if child.position in _dims(node, "_saved_dims" if hasattr(node, "_saved_dims") else "_saved_dim", len(child.shape)):
        raise _Lost
    return _broadcast(node, children, shape, size)


def _reduced(node: Node, children: list[_Child], shape: Shape, _size: int) -> int:
    (child,) = children
    dims = _dims(node, "_saved_dim", len(child.shape))
    if child.position in dims:
        raise _Lost
    return child.position if len(shape) == len(child.shape) else child.position - sum(d < child.position for d in dims)


def _removed(node: Node, children: list[_Child], _shape: Shape, _size: int) -> int:
    """`select` and `unbind`: a dim less."""
    (child,) = children
    (dim,) = _dims(node, "_saved_dim", len(child.shape))
    if dim == child.position:
        raise _Lost
    return child.position - (dim < child.position)


def _inserted(node: Node, children: list[_Child], shape: Shape, _size: int) -> int:
    """`unsqueeze` and `stack`: a dim more."""
    if len({child.position for child in children}) > 1:
        raise _Lost
    (dim,) = _dims(node, "_saved_dim", len(shape))
    return children[0].position + (dim <= children[0].position)


def _viewed(_node: Node, children: list[_Child], shape: Shape, size: int) -> int:
    """The same numbers in order: examples stay outermost behind as many numbers as before."""
    (child,) = children
    before = prod(child.shape[: child.position])
    for position in range(len(shape)):
        if prod(shape[:position]) == before and shape[position] % size == 0:
            return position
    raise _Lost


def _permuted(node: Node, children: list[_Child], _shape: Shape, _size: int) -> int:
    (child,) = children
    return _dims(node, "_saved_dims", len(child.shape)).index(child.position)


def _transposed(node: Node, children: list[_Child], _shape: Shape, _size: int) -> int:
    (child,) = children
    ndim = len(child.shape)
    swapped = [0, 1] if not hasattr(node, "_saved_dim0") else None
    first, second = swapped or (*_dims(node, "_saved_dim0", ndim), *_dims(node, "_saved_dim1", ndim))
    return {first: second, second: first}.get(child.position, child.position)


def _cut(_node: Node, children: list[_Child], shape: Shape, _size: int) -> int:
    """Slices and pieces along another dim, or slices of all."""
    position = children[0].position
    if any(child.position != position or child.shape[position] != shape[position] for child in children):
        raise _Lost
    return position


def _padded(node: Node, children: list[_Child], shape: Shape, size: int) -> int:
    """Numbers before or behind those of other dims; pairs of them are counted from the last dim on."""
    from_last = len(shape) - 1 - children[0].position
    if any(node._saved_pad[2 * from_last : 2 * from_last + 2]):
        raise _Lost
    return _cut(node, children, shape, size)


def _passed(_node: Node, children: list[_Child], _shape: Shape, _size: int) -> int:
    """A node that FSDP puts behind the inputs of a module, all of which hold the examples in one dim."""
    if len({child.position for child in children}) > 1:
        raise _Lost
    return children[0].position


def _multiplied(node: Node, children: list[_Child], shape: Shape, size: int) -> int:
    """A product of matrices: by a weight, or as many as there are examples; values may route what is summed over."""
    if len(shape) == 2 and any(child.place == len(node.next_functions) - 1 for child in children):
        raise _Lost
    if any(len(child.shape) < len(shape) for child in children):  # a bias
        raise _Lost
    return _same(node, children, shape, size)


def _indexed(node: Node, children: list[_Child], _shape: Shape, _size: int) -> int:
    """x[i, j, …]: whole in the examples' dim, or the b-th of each example b."""
    (child,) = children
    try:
        indices = list(node._saved_indices)
    except RuntimeError:  # changed in place since, or not kept, as under checkpointing
        raise _Lost from None
    used = [d for d, index in enumerate(indices) if index is not None]
    if child.position or not used or used != list(range(used[0], used[-1] + 1)):
        raise _Lost
    if used[0] > 0:
        return 0
    index: Tensor = indices[0]
    if index.dtype != torch.int64 or index.dim() == 0:  # a mask, or one example for all
        raise _Lost
    if index.dim() < max(indices[d].dim() for d in used):  # broadcast over something in front
        raise _Lost
    if child.shape[0] != len(index) or not index.numel():
        raise _Lost
    rows = index.reshape(len(index), -1)
    if not bool((rows == torch.arange(len(rows), device=rows.device)[:, None]).all()):
        raise _Lost
    return 0


_BY_ENTRY = """
    Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh Ceil Celu Clamp ClampMax ClampMin
    Clone Copysign Cos Cosh Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Floor Fmod Frac Gelu Hardshrink Hardsigmoid
    Hardswish Hardtanh HuberLoss LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp Logaddexp2
    Logit MaskedFill Maximum Minimum Mish MseLoss Mul NanToNum Neg Pow Prelu Reciprocal Relu Remainder Round
    Rsqrt Rsub Selu Sgn Sigmoid Sign Silu Sin Sinc Sinh SmoothL1Loss Softplus Softshrink Sqrt Square Sub Tan
    Tanh Threshold ToCopy Tril Triu Trunc Where Xlogy BinaryCrossEntropy BinaryCrossEntropyWithLogits Dropout
    Expand NativeDropout Repeat
"""
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_BY_ENTRY.split(), _broadcast),
    **dict.fromkeys(["Softmax", "LogSoftmax", "Cumsum", "Cumprod", "Sort", "Topk", "Gather", "IndexSelect"], _along),
    **dict.fromkeys(["Glu", "Flip", "Roll", "SafeSoftmax"], _along),
    **dict.fromkeys(["Sum", "Mean", "Amax", "Amin", "Max", "Min", "Var", "Std", "VarMean", "Logsumexp"], _reduced),
    **dict.fromkeys(["LinalgVectorNorm", "Norm", "Prod"], _reduced),
    **dict.fromkeys(["Select", "Unbind"], _removed),
    **dict.fromkeys(["Unsqueeze", "Stack"], _inserted),
    **dict.fromkeys(["View", "UnsafeView", "ReshapeAlias", "Squeeze"], _viewed),
    **dict.fromkeys(["Transpose", "T"], _transposed),
    "Permute": _permuted,
    **dict.fromkeys(["Slice", "Split", "SplitWithSizes", "Cat", "Unfold"], _cut),
    "ConstantPadNd": _padded,
    **dict.fromkeys(["Mm", "Addmm", "Bmm", "Baddbmm"], _multiplied),
    "Index": _indexed,
    "RegisterPostBackwardFunction": _passed,
    **dict.fromkeys(
        ["Convolution", "MkldnnConvolution", "CudnnConvolution", "Linear", "MkldnnLinear", "Mv"], _by_weight
    ),
    **dict.fromkeys(["NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm"], _by_weight),
    **dict.fromkeys(["NativeBatchNorm", "CudnnBatchNorm"], _batch_norm),
    "MkldnnRnnLayer": _by_weight,
    **dict.fromkeys(["LabelLikelihood", "LabelMargin"], _same),
}
_LAYERS = (
    *("ScaledDotProduct", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "Upsample"),
    *("ReflectionPad", "ReplicationPad", "PixelShuffle", "PixelUnshuffle"),
)


@functools.lru_cache(maxsize=1 << 10)
def _rule_for(operation: str) -> _Rule | None:
    if operation.startswith(_LAYERS):
        return _same
    return _RULES.get(operation)
