"""Small training runs that are captured, and a naive twin of what their bank must hold."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import source_proj as sp
from source_proj.bank.build.uniform import Uniforms


class Decoder(nn.Module):
    """A small causal language model with learnt positions, which see no batch."""

    def __init__(self, words=11, width=8, length=6):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.norm, self.mix, self.head = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, words)

    def forward(self, input_ids, labels=None):  # labels as the Trainer gives them
        hidden = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        hidden = hidden + torch.tanh(self.mix(self.norm(hidden).cumsum(1)))
        return self.head(hidden)


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 3 * 4, 3)
    )  # fmt: skip


def data_for(model, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Decoder):
        tokens = torch.randint(11, (n, 6), generator=generator)
        return tokens, tokens
    labels = torch.randint(3, (n,), generator=generator)
    if isinstance(model[0], nn.Conv2d):
        return torch.randn(n, 1, 4, 5, generator=generator), labels
    return torch.randn(n, 5, generator=generator), labels


def loss_of(model, inputs, labels, *, told=False):
    """The mean over the batch; with ``told`` its labels are among the arguments of the call."""
    logits = model(inputs, labels=labels) if told else model(inputs)
    if logits.dim() == 3:
        losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return losses.view(len(labels), -1).mean(1).mean()
    return nn.functional.cross_entropy(logits, labels)


def task_for(model):
    return sp.CausalLM() if isinstance(model, Decoder) else sp.Classification()


def example_gradients(model, inputs, labels):
    """Loss gradients (B, d) by vmap(grad), in the order of named_parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            return loss_of(self.model, x[None], y[None])

    module = Loss()

    def scalar(own, x, y):
        return functional_call(module, {f"model.{name}": p for name, p in own.items()}, (x, y))

    model.eval()  # these models do the same then, and what is no training is not captured
    gradients = vmap(grad(scalar), in_dims=(None, 0, 0))(parameters, inputs, labels)
    model.train()
    return torch.cat([gradients[name].flatten(1) for name in parameters], 1)


def sampled_gradients(model, inputs, labels, turn, rank=0):
    """Gradients (B, d) of the drawn labels' likelihood, of each example alone, in the order of named_parameters."""
    rows = []
    for place in range(len(labels)):
        parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        uniform = Uniforms(torch.tensor([place + (rank << 32)]), seed=0, stage=0, checkpoint=turn, draw=0)
        output = functional_call(model, parameters, (inputs[place : place + 1],))
        batch = {"labels": labels[place : place + 1]}
        value = task_for(model).sampled_output(lambda *_, given=output, **__: given, batch, uniform).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(parameters.values()))]))
    return torch.stack(rows)


class Twin:
    """Sums of one segment as the formulas say, without a sketch."""

    def __init__(self, n, size):
        self.n, self.rows = n, torch.zeros(n, size, dtype=torch.float64)
        self.squares, self.weight = torch.zeros(size, size, dtype=torch.float64), 0.0

    def add(self, index, gradients, rate, fisher_weight=1.0):
        gradients = gradients.double()
        for place, row in zip(index.tolist(), gradients, strict=True):
            self.rows[place] += rate * row
        self.squares += rate * fisher_weight**2 * gradients.T @ gradients
        self.weight += rate * len(index)

    def bank_rows(self):
        return (self.rows * self.n / self.weight).float()

    def bank_curvature(self):
        return (self.squares / self.weight).float()


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def rows_of(bank, segment=0):
    return torch.cat([block.rows * block.d1[:, None] for block in bank.stages[0].iter_rows(segment)])


def batches_of(n, size, steps, seed=0):
    """Shuffled batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    while len(batches) < steps:
        batches += torch.randperm(n, generator=generator).split(size)
    return batches[:steps]


def train(directory, model=None, *, n=12, size=4, steps=9, before_step=None, lr=0.05, pause=None, **options):
    """A captured run with momentum and a changing learning rate; gives the recorder."""
    if model is None:
        torch.manual_seed(0)
        model = mlp()
    told = options.get("draw_every", 0) != 0
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    inputs, labels = data_for(model, n)
    capture = {"capture": sp.Sketch(size_of(model), "identity"), "task": task_for(model), "every": 3, "draw_every": 0}
    capture |= options
    recorder = sp.Recorder(model, optimizer, directory, **capture)
    for step, index in list(enumerate(batches_of(n, size, steps)))[recorder.restore() :]:
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + step)
        optimizer.zero_grad()
        loss_of(model, inputs[index], labels[index], told=told).backward()
        if before_step is not None:
            before_step(index, inputs[index], labels[index], lr / (1 + step))
        optimizer.step()
        batch = {"input_ids": inputs[index], "labels": labels[index]} if isinstance(model, Decoder) else None
        recorder.step(ids=index, batch=batch)
        if pause is not None:
            pause()
    return recorder


class Loop:
    """A captured MLP, its twin, and the data; SGD at a constant rate."""

    def __init__(self, directory, model=None, n=12, lr=0.1, **options):
        torch.manual_seed(0)
        self.model = mlp() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.lr = lr
        size = size_of(self.model)
        self.recorder = sp.Recorder(
            self.model,
            self.optimizer,
            directory,
            capture=sp.Sketch(size, "identity"),
            task=sp.Classification(),
            **options,
        )
        self.twin = Twin(n, size)
        self.inputs, self.labels = data_for(self.model, n)
        self.batches = batches_of(n, 4, 6)

    def expect(self, index):
        gradients = example_gradients(self.model, self.inputs[index], self.labels[index])
        self.twin.add(index, gradients, self.lr)

    def loss(self, index):
        return loss_of(self.model, self.inputs[index], self.labels[index])

    def step(self, index):
        """One plain step."""
        self.optimizer.zero_grad()
        self.loss(index).backward()
        self.optimizer.step()
        self.recorder.step(ids=index)

    def check(self, tolerance=1e-5):
        rows, expected = rows_of(self.recorder.bank(storage="float32")), self.twin.bank_rows()
        assert float((rows - expected).norm()) <= tolerance * float(expected.norm())
