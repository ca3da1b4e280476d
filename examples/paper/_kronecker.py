"""An EK-FAC reference for models of ``nn.Linear`` layers: SOURCE as its paper computes it.

It works on all parameters, without a sketch, so that a comparison shows what the sketch costs and what EK-FAC's
approximation does. EK-FAC (George et al., https://arxiv.org/abs/1806.03884) takes a layer's Hessian for

    H = (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ,    Λ = mean of (Q_Sᵀ s)² ⊗ (Q_Aᵀ a)²

with inputs a (a one appended for the bias), gradients s by the layer's outputs, and Q_A, Q_S the eigenvectors of the
means of a aᵀ and s sᵀ. Layers are taken for independent. An example's gradient in a layer is s aᵀ, of rank one.
Labels are drawn from the model's prediction for s (``fisher="sampled"``, the true Fisher, as in the paper), or are the
data's own (``"empirical"``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import source_proj as sp
from source_proj.attribution.spectral import decay_operator, response
from source_proj.bank import batches, dataset_size
from source_proj.gradients.batches import batch_size as size_of

__all__ = [
    "Factors", "Fisher", "Rows", "ekfac_source", "linear_layers", "rows_of", "sampled_likelihood", "training_loss",
]  # fmt: skip

Fisher = Literal["sampled", "empirical"]
Function = Callable[[nn.Module, Any], Tensor]

_BATCH = 256
_BLOCK = 1 << 25  # numbers of training gradients held at once (128 MiB)


class Rows(NamedTuple):
    """A layer's examples at C checkpoints: the gradient of example z at checkpoint c is ``loss[c, z] ⊗ inputs[c, z]``.

    Attributes:
        inputs: a, ``(C, n, i)``; a one appended if the layer has a bias.
        loss: s of the loss, ``(C, n, o)``.
        fisher: s that the factors are made of, ``(C, n, o)``.
    """

    inputs: Tensor
    loss: Tensor
    fisher: Tensor


@dataclass(frozen=True)
class Factors:
    """A layer's EK-FAC factors.

    Attributes:
        outputs: Q_S, ``(o, o)``.
        inputs: Q_A, ``(i, i)``.
        values: Λ, ``(o, i)`` float64.
    """

    outputs: Tensor
    inputs: Tensor
    values: Tensor

    @classmethod
    def of(cls, rows: Rows) -> "Factors":
        """From the examples at one checkpoint, or all those of a segment: covariances and Λ are averaged over them."""
        a, s = rows.inputs.flatten(0, 1), rows.fisher.flatten(0, 1)
        q_a, q_s = (torch.linalg.eigh((one.T @ one).double() / len(one))[1].to(one) for one in (a, s))
        # s aᵀ has rank one, so its rotated square is the product of the squares of its rotated halves.
        return cls(q_s, q_a, ((s @ q_s).square().T @ (a @ q_a).square()).double() / len(a))


# SOURCE, in the eigenbases -------------------------------------------------------------------------------------------


def ekfac_source(
    model: nn.Module,
    task: sp.Task,
    trajectory: sp.Trajectory,
    train_sets: Any,
    queries: Any,
    *,
    damping: float | None = None,
    mean_query: bool = False,
    fisher: Fisher = "sampled",
    batch_size: int = _BATCH,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """SOURCE with EK-FAC factors, as in section 4 of https://arxiv.org/abs/2405.12186.

        score(q, z) = -Σ_l (1/N) ∇m(q)ᵀ S_L ··· S_{l+1} c_l(H_l) ḡ_l(z)    over the segments l of the first stage

    A segment's covariances are averaged over its checkpoints, then decomposed; Λ is averaged over them in the common
    eigenbasis; and so are gradients. c and S are functions of Λ, see :mod:`source_proj.attribution.curvature`.

    Args:
        model: the architecture, all of whose parameters are those of linear layers.
        task: gives loss and measurement.
        trajectory: the run: its stages, segments, learning rates and weight decay.
        train_sets: {stage name: data set}, or the data set of the only stage; the first stage's N are attributed to.
        queries: map-style data set or DataLoader, Q examples.
        damping: ρ, added to the eigenvalues inside c; None for none, as in the paper.
        mean_query: take ∇m(q) as the mean over the last stage's checkpoints, as source-proj does by default, and not at
            the final weights, as the paper does.
        fisher: where labels come from.
        batch_size: examples a pass.
        seed: of the sampled labels.
        progress: show a progress bar over segments.

    Returns:
        Scores ``(Q, N)`` float32, in the measurement's unit.
    """
    _check(model, fisher, damping)
    names = [stage.name for stage in trajectory.stages]
    data = dict(train_sets) if isinstance(train_sets, Mapping) else {names[0]: train_sets}
    if set(data) != set(names):
        raise ValueError(f"the trajectory has the stages {names}: give train_sets as {{stage name: data set}}")
    points = list(trajectory.stages[-1].checkpoints) if mean_query else [trajectory.final]
    asked = rows_of(model, task, points, queries, batch_size=batch_size)
    # Gradients of the measurement by each layer's parameters, (Q, o, i); carried back from segment to segment.
    carried = {name: torch.einsum("cqo,cqi->qoi", one.loss, one.inputs) / len(points) for name, one in asked.items()}
    n = dataset_size(data[names[0]])
    scores = torch.zeros(len(next(iter(carried.values()))), n)
    segments = [
        (stage, list(segment.checkpoints), segment.time) for stage in trajectory.stages
        for segment in stage.describe().cut()
    ]  # fmt: skip
    for index in tqdm(reversed(range(len(segments))), "EK-FAC", len(segments), unit="segment", disable=not progress):
        stage, group, time = segments[index]
        decay = stage.describe().optimizer.weight_decay
        rows = rows_of(
            model, task, [stage.checkpoints[c] for c in group], data[stage.name], fisher=fisher,
            batch_size=batch_size, seed=seed + index, training=True,
        )  # fmt: skip
        for name, one in rows.items():
            factors = Factors.of(one)
            inside = factors.outputs.T @ (carried[name] @ factors.inputs)  # (Q, o, i) in the eigenbasis
            if stage.name == names[0]:
                weighted = inside * response(time, decay, damping or 0.0)(factors.values).to(inside)
                _add_scores(scores, weighted, one.inputs @ factors.inputs, one.loss @ factors.outputs, -1 / n)
            if index:
                inside *= decay_operator(time, decay)(factors.values).to(inside)
                carried[name] = factors.outputs @ (inside @ factors.inputs.T)
    return scores.numpy()


def _add_scores(scores: Tensor, queries: Tensor, inputs: Tensor, outputs: Tensor, scale: float) -> None:
    """Add scale · queries ``(Q, o, i)`` times the gradients' means over C checkpoints, all in one basis."""
    flat = queries.flatten(1)
    height = max(1, _BLOCK // flat.shape[1])
    for start in range(0, scores.shape[1], height):
        part = slice(start, start + height)
        mean = torch.einsum("cbo,cbi->boi", outputs[:, part], inputs[:, part]).flatten(1)
        scores[:, part].add_((flat @ mean.T).cpu(), alpha=scale / len(inputs))


# Inputs and gradients of linear layers -------------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The model's layers, by name.

    Raises:
        ValueError: if it has parameters outside of linear layers, which EK-FAC would leave out silently.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    others = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if others or not layers:
        raise ValueError(f"EK-FAC SOURCE is for models of nn.Linear layers alone; got parameters {others[:5]}")
    return layers


def rows_of(
    model: nn.Module,
    task: sp.Task,
    checkpoints: Sequence[sp.Checkpoint],
    data: Any,
    *,
    fisher: Fisher = "empirical",
    batch_size: int = _BATCH,
    seed: int = 0,
    training: bool = False,
) -> dict[str, Rows]:
    """Inputs and gradients of every layer at every checkpoint: of the loss if ``training``, else of the measurement."""
    layers = linear_layers(model)
    function = training_loss(task) if training else task.measurement
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    found: dict[str, list[list[Tensor]]] = {name: [[], [], []] for name in layers}
    for checkpoint in checkpoints:
        with checkpoint.applied_to(model):
            for _, batch in batches(data, batch_size, device=device):
                inputs, gradients = _backward(model, layers, function, batch)
                drawn = gradients
                if fisher == "sampled":
                    drawn = _backward(model, layers, sampled_likelihood(task, generator), batch)[1]
                for name in layers:
                    for parts, part in zip(found[name], (inputs[name], gradients[name], drawn[name]), strict=True):
                        parts.append(part)
    shape = (len(checkpoints), -1)
    return {name: Rows(*(torch.cat(one).unflatten(0, shape) for one in parts)) for name, parts in found.items()}


def _backward(
    model: nn.Module, layers: Mapping[str, nn.Linear], function: Function, batch: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each layer's inputs ``(B, i)``, with ones for a bias, and the gradients of the function by its outputs."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(layer: nn.Linear, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a = given[0].detach()
            if name in inputs or a.ndim != 2:
                raise ValueError(
                    f"layer {name!r} is called twice, or with an input of shape {tuple(a.shape)}; EK-FAC SOURCE is "
                    "for layers that are called once, with (batch, features)"
                )
            inputs[name] = a if layer.bias is None else torch.cat([a, a.new_ones(len(a), 1)], dim=1)
            outputs[name] = output
            return output.clone()  # what follows may work in place

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            total = function(model, batch).sum()
    finally:
        for handle in handles:
            handle.remove()
    return inputs, dict(zip(outputs, torch.autograd.grad(total, list(outputs.values())), strict=True))


def training_loss(task: sp.Task) -> Function:
    """A function of (model, batch) to (B,) with the training loss's gradient: ℓ'(o) · o."""

    def function(model: nn.Module, batch: Any) -> Tensor:
        output = task.output(model, batch)
        return task.loss_derivatives(output.detach(), batch)[0].detach() * output

    return function


def sampled_likelihood(task: sp.Task, generator: torch.Generator) -> Function:
    """Log-likelihood (B,) of labels drawn from the model's prediction."""

    def function(model: nn.Module, batch: Any) -> Tensor:
        return task.sampled_output(model, batch, lambda n: torch.rand(size_of(batch), n, generator=generator))

    return function


def _check(model: nn.Module, fisher: str, damping: float | None) -> None:
    linear_layers(model)
    if fisher not in get_args(Fisher):
        raise ValueError(f"fisher must be one of {get_args(Fisher)}, got {fisher!r}")
    if damping is not None and not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be None or a number >= 0, got {damping!r}")
