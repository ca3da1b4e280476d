"""Problems on which the EK-FAC references of the paper comparison are tested, and their dense twins."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.gradients import ParameterSpace, gradient_engine

# Problems ------------------------------------------------------------------------------------------------------------


def mlp_run(*, bias=True, inplace=False):
    """A classifier in two stages: the first in two segments of two checkpoints, the second in one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.ReLU(inplace=inplace), nn.Linear(5, 3))

    def data(n):
        return TensorDataset(torch.randn(n, 4), torch.arange(n) % 3)

    def checkpoints(n, lr):
        states = [{k: v + 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(n)]
        return [sp.Checkpoint(state, 10 * (i + 1), lr=lr) for i, state in enumerate(states)]

    optimizer = sp.SGD(momentum=0.5, weight_decay=0.02)
    stages = [
        sp.Stage("first", checkpoints(4, 0.1), optimizer, segments=2),
        sp.Stage("second", checkpoints(2, 0.05), optimizer),
    ]
    return model, sp.Trajectory.from_stages(stages), {"first": data(11), "second": data(6)}, data(5)


def orthogonal_regression(n=40, d=3):
    """Least squares whose inputs are multiples of d orthogonal directions: EK-FAC's basis is then the Fisher's own."""
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    which = torch.arange(n) % d
    x = basis[which] * (torch.rand(n, 1) + 0.5) * (1 + which[:, None])
    data = TensorDataset(x, torch.randn(n, 1))
    return nn.Linear(d, 1, bias=False), data, TensorDataset(torch.randn(4, d), torch.randn(4, 1)), basis


# Naive twins ---------------------------------------------------------------------------------------------------------


def gradients(model, checkpoint, function, data):
    """Per-example gradients as rows in float64, each layer's ``[W | b]`` one after another in row-major order."""
    space = ParameterSpace.from_model(model)
    engine = gradient_engine(model, space, sp.Sketch(space.size, "identity"), method="general")
    with checkpoint.applied_to(model):
        rows = engine.sketch(function, list(data.tensors))[1]
    parts = dict(zip(space.names, rows.split([model.get_parameter(n).numel() for n in space.names], 1), strict=True))
    layers = []
    for name, layer in linears(model):
        prefix = f"{name}." if name else ""
        weight = parts[f"{prefix}weight"].unflatten(1, tuple(layer.weight.shape))
        bias = [] if layer.bias is None else [parts[f"{prefix}bias"][..., None]]
        layers.append(torch.cat([weight, *bias], 2).flatten(1))
    return torch.cat(layers, 1).double()


def linears(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def loss_gradients(model, task, checkpoint, data):
    with checkpoint.applied_to(model), torch.no_grad():
        d1 = task.loss_derivatives(task.output(model, list(data.tensors)), list(data.tensors))[0]
    return gradients(model, checkpoint, task.output, data) * d1[:, None]


def dense(factors):
    """Block-diagonal H of a list of layers' factors."""
    blocks = []
    for layer in factors:
        q = torch.kron(layer.outputs, layer.inputs).double()
        blocks.append((q * layer.values.flatten()) @ q.T)
    return torch.block_diag(*blocks)
