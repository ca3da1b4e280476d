"""Each example's gradient, by itself, by the hooks of a build, and as a Recorder captures it."""

import torch

import source_proj as sp
from source_proj.gradients import ParameterSpace, gradient_engine


def whole_sketch(model):
    """The sketch whose rows are the gradients themselves."""
    return sp.Sketch(ParameterSpace.from_model(model).size, "identity")


def plain_rows(model, values_of, examples):
    """One backward pass for each of several batches of one."""
    rows = []
    for one in examples:
        value = values_of(model, one)[0]
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def hooked_rows(model, values_of, batch):
    """Rows of a build, which must be by hooks, and why they are."""
    engine = gradient_engine(model, ParameterSpace.from_model(model), whole_sketch(model))
    _, rows = engine.sketch(values_of, batch)
    assert engine.method == "hooks", engine.reason
    return rows, engine.reason


def captured_rows(folder, model, values_of, batch, size):
    """Rows captured in one step of training on the mean value; the parameters keep that step's gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = {"capture": whole_sketch(model), "task": sp.Classification(), "examples": size}
    recorder = sp.Recorder(model, optimizer, folder / "run", **options)
    values_of(model, batch).mean().backward()
    optimizer.step()
    recorder.step(ids=range(size))
    (part,) = recorder.bank(storage="float32").stages[0].iter_rows(0)
    return part.rows * part.d1[:, None]
