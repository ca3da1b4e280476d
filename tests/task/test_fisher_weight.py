"""One law for every loss: with labels drawn from the model, empirical and sampled Fisher have one expectation."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import source_proj as sp
from source_proj.attribution.moments import spectrum

N, CLASSES, TOKENS = 6000, 4, 7
SIGMAS = 5


class Language(nn.Module):
    """Logits of each token from the token alone."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, CLASSES)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))


class Sequences(torch.utils.data.Dataset):
    def __init__(self, tokens, labels):
        self.tokens, self.labels = tokens, labels

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def drawn_classes(logits, generator):
    return torch.multinomial(logits.flatten(0, -2).softmax(-1), 1, generator=generator).view(logits.shape[:-1])


def classification(task):
    generator = torch.Generator().manual_seed(1)
    model, x = nn.Linear(3, CLASSES), torch.randn(N, 3, generator=generator)
    labels = drawn_classes(model(x), generator)
    weights = torch.rand(N, generator=generator) * 4 * (torch.rand(N, generator=generator) > 0.1)  # some are 0
    return model, TensorDataset(x, labels, *([weights] if task.sample_weight else []))


def regression(task):
    generator = torch.Generator().manual_seed(2)
    model, x = nn.Linear(3, 1), torch.randn(N, 3, generator=generator)
    deviation = math.sqrt(0.5) if task.loss == "mse" else 1.0
    targets = model(x).detach()[:, 0] + deviation * torch.randn(N, generator=generator)
    weights = torch.rand(N, generator=generator) * 4 * (torch.rand(N, generator=generator) > 0.1)
    return model, TensorDataset(x, targets, *([weights] if task.sample_weight else []))


def language(task):
    generator = torch.Generator().manual_seed(3)
    model, tokens = Language(), torch.randint(0, 5, (N, TOKENS), generator=generator)
    labels = drawn_classes(model(tokens), generator)
    if task.shift:  # position t predicts label t + 1
        labels = torch.cat([torch.zeros(N, 1, dtype=torch.long), labels[:, :-1]], 1)
    lengths = torch.randint(0, TOKENS + 1, (N, 1), generator=generator)  # of some sequences no token counts
    return model, Sequences(tokens, labels.masked_fill(torch.arange(TOKENS) >= lengths, -100))


TASKS = {
    "classes": (classification, sp.Classification(), False),
    "weighted classes": (classification, sp.Classification(sample_weight=2), True),
    "squared error": (regression, sp.Regression(), False),
    "half the squared error": (regression, sp.Regression(loss="half_mse"), False),
    "weighted squared error": (regression, sp.Regression(sample_weight=2), True),
    "weighted half squared error": (regression, sp.Regression(loss="half_mse", sample_weight=2), True),
    "tokens, mean": (language, sp.CausalLM(), True),
    "tokens, sum": (language, sp.CausalLM(reduction="sum"), False),
    "tokens, of the batch": (language, sp.CausalLM(reduction="token"), True),
    "tokens, of the batch, given": (language, sp.CausalLM(reduction="token", normalizer=2.0), True),
    "shifted tokens, mean": (language, sp.CausalLM(shift=False), True),
    "shifted tokens, of the batch": (language, sp.CausalLM(shift=False, reduction="token"), True),
}


def sigmas(difference):
    """How far the means of columns lie from 0, in their own standard errors."""
    return (difference.mean(0) / (difference.std(0) / len(difference) ** 0.5)).abs().max()


@pytest.mark.parametrize("name", TASKS)
def test_empirical_and_sampled_fisher_have_one_expectation(name, tmp_path):
    make, task, is_weighted = TASKS[name]
    torch.manual_seed(0)
    model, data = make(task)
    size = sum(p.numel() for p in model.parameters())
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=1, lr=0.1)])
    bank = sp.build(
        model, task, run, data, tmp_path / "bank", batch_size=1000, sampled_fisher=1, storage="float32", progress=False,
        sketch=sp.Sketch(size, kind="identity"),
    )  # fmt: skip
    (stage,) = bank.stages
    blocks = list(stage.iter_rows(0))
    gradients = torch.cat([b.rows * b.d1[:, None] for b in blocks]).double()
    weight = torch.cat([torch.ones_like(b.d1) if b.fisher_weight is None else b.fisher_weight for b in blocks]).double()
    sampled = torch.cat([b.rows for b in stage.iter_rows(0, "sampled_fisher")]).double()
    directions = torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    of_samples = (sampled @ directions).square()
    assert sigmas((gradients * weight[:, None] @ directions).square() - of_samples) < SIGMAS
    if is_weighted:  # and without the weight it would be seen
        assert sigmas((gradients @ directions).square() - of_samples) > SIGMAS
    traces = [(gradients * weight[:, None]).square().sum(1).mean(), sampled.square().sum(1).mean()]
    found = [spectrum(stage, [0], size, kind).trace for kind in ("empirical_fisher", "sampled_fisher")]
    assert found == pytest.approx([float(trace) for trace in traces], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", [None, [1.0, 0.2, 3.0, 0.5]])
def test_the_sampled_fisher_is_the_hessian_of_smoothed_and_weighted_classes(smoothing, class_weights):
    """All labels drawn in turn, so that the expectation is exact."""
    logits = torch.randn(CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    task = sp.Classification(smoothing, class_weights=class_weights, normalizer=None if class_weights is None else 0.7)
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    for label in range(CLASSES):

        def loss(z, label=label):
            labels = torch.tensor([label])
            total = cross_entropy(z[None], labels, weight, reduction="sum", label_smoothing=smoothing)
            return total / (1.0 if weight is None else 0.7)

        p, fisher = logits.softmax(0), torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
        for drawn in range(CLASSES):
            middle = p.cumsum(0)[drawn] - p[drawn] / 2
            z = logits.clone().requires_grad_()
            batch = (z[None], torch.tensor([label]))
            (g,) = torch.autograd.grad(
                task.sampled_output(lambda inputs: inputs, batch, lambda n, u=middle: u.expand(1, n)).sum(), z
            )
            fisher += p[drawn] * torch.outer(g, g)
        torch.testing.assert_close(fisher, torch.autograd.functional.hessian(loss, logits))


@pytest.mark.parametrize("class_weights", [None, [1.0, 0.2, 3.0, 0.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_and_smoothing_are_torchs(smoothing, class_weights, tmp_path):
    """A whole training set as one batch: its gradient is the mean of ℓ' ∇o."""
    torch.manual_seed(6)
    model, x, labels = nn.Linear(3, CLASSES), torch.randn(50, 3), torch.randint(0, CLASSES, (50,))
    weight = None if class_weights is None else torch.tensor(class_weights)
    cross_entropy(model(x), labels, weight, label_smoothing=smoothing).backward()
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=1, lr=0.1)])
    bank = sp.build(
        model, sp.Classification(smoothing, class_weights=class_weights), run, TensorDataset(x, labels),
        tmp_path / "bank", storage="float32", progress=False, sketch=sp.Sketch(16, kind="identity"),
    )  # fmt: skip
    (block,) = bank.stages[0].iter_rows(0)
    torch.testing.assert_close(
        (block.rows * block.d1[:, None]).mean(0), torch.cat([p.grad.flatten() for p in model.parameters()])
    )
    assert sp.Source(bank, model=model, progress=False).score(TensorDataset(x[:2], labels[:2])).shape == (2, 50)


def test_the_empirical_fisher_of_smoothed_labels_is_off_by_what_the_task_says():
    logits = torch.randn(CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    smoothing, p, found = 0.3, logits.softmax(0), torch.zeros(CLASSES, CLASSES, dtype=torch.float64)
    task = sp.Classification(smoothing)
    for drawn in range(CLASSES):
        z, label = logits.clone().requires_grad_(), torch.tensor([drawn])
        output = task.output(lambda inputs: inputs, (z[None], label))
        first, _ = task.loss_derivatives(output, (z[None], label))
        (g,) = torch.autograd.grad((task.fisher_weight((z[None], label)) * first * output).sum(), z)
        found += p[drawn] * torch.outer(g, g)
    rest = smoothing / (1 - smoothing) * (p - 1 / CLASSES)
    torch.testing.assert_close(found, p.diag() - torch.outer(p, p) + torch.outer(rest, rest))


def test_normalizers_belong_to_stages():
    task = sp.CausalLM(reduction="token", normalizer=[2.0, 8.0])
    batch = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "labels": torch.zeros(1, 5, dtype=torch.long)}
    found = [float(task.of_stage(stage).loss_derivatives(torch.zeros(1), batch)[0]) for stage in range(2)]
    assert found == [-2.0, -0.5]
    assert sp.Task.from_spec(task.spec()).spec() == task.spec()
    assert sp.CausalLM(reduction="token").told_by(task.spec()).spec() == task.spec()
    with pytest.raises(ValueError, match=r"no number for stage 2"):
        task.of_stage(2)
    for wrong in (0, -1.0, [], [1.0, math.inf]):
        with pytest.raises(ValueError, match="normalizer must be a positive number"):
            sp.CausalLM(reduction="token", normalizer=wrong)
    with pytest.raises(ValueError, match="belongs to reduction='token'"):
        sp.CausalLM(normalizer=2.0)
    with pytest.raises(ValueError, match=r"belongs to class_weights"):
        sp.Classification(normalizer=2.0)
    with pytest.raises(ValueError, match=r"which source_proj\.build counts"):
        sp.CausalLM(reduction="token").loss_derivatives(torch.zeros(1), batch)


def test_a_training_set_without_labels_that_count_has_no_mean(tmp_path):
    model, data = Language(), Sequences(torch.zeros(3, 4, dtype=torch.long), torch.full((3, 4), -100))
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=1, lr=0.1)])
    with pytest.raises(ValueError, match="none of its labels counts"):
        sp.build(model, sp.CausalLM(reduction="token"), run, data, tmp_path / "bank", progress=False)
