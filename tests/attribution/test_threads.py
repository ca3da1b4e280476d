"""Any number of threads may ask at once, while the model itself is in use: the bits are those of one thread."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from problems import Problem, source
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import source_proj as sp

THREADS, SCORES = 16, 400


def queries_of(problem: Problem, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x, y = problem.queries.tensors
    return TensorDataset(torch.randn(3, *x.shape[1:], generator=generator), y[:3])


def methods(problem: Problem, bank: sp.Bank):
    """Two Sources and two rivals on one model."""
    yield source(problem, bank)
    yield source(problem, bank, segments=1, curvature="gauss_newton")
    yield sp.TracIn(bank, model=problem.model, progress=False)
    yield sp.RepSim(bank, model=problem.model, train_set=problem.train, progress=False)


def test_many_threads_get_the_bits_of_one(blobs):
    problem, bank = blobs
    asked = [queries_of(problem, seed) for seed in range(5)]
    pairs = [(method, queries) for method in methods(problem, bank) for queries in asked]
    alone = [method.score(queries).to_numpy() for method, queries in pairs]
    weights = {name: value.clone() for name, value in problem.model.state_dict().items()}
    fresh = list(zip([method for method in methods(problem, bank) for _ in asked], asked * 4, alone, strict=True))
    with ThreadPoolExecutor(THREADS) as threads:
        tasks = list(islice(cycle(fresh), SCORES))
        results = threads.map(lambda task: task[0].score(task[1]).to_numpy(), tasks)
        for (_, _, expected), scores in zip(tasks, results, strict=True):
            assert np.array_equal(scores, expected)
    assert all(torch.equal(value, weights[name]) for name, value in problem.model.state_dict().items())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
@pytest.mark.parametrize("asked", [False, True])
def test_a_copy_gives_the_same_bits(blobs, copied, asked):
    problem, bank = blobs
    for method in methods(problem, bank):
        if asked:
            method.score(problem.queries)
        scores = copied(method).score(problem.queries).to_numpy()
        assert np.array_equal(scores, method.score(problem.queries).to_numpy())


def test_the_model_is_trained_while_it_is_asked_about(blobs):
    problem, bank = blobs
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    twin = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    twin.load_state_dict(model.state_dict())
    method = sp.Source(bank, model=model, progress=False)
    expected = method.score(problem.queries).to_numpy()
    with ThreadPoolExecutor(4) as threads:
        results = [threads.submit(method.score, problem.queries) for _ in range(40)]
        trained(model, problem, 200)
        assert all(np.array_equal(result.result().to_numpy(), expected) for result in results)
    trained(twin, problem, 200)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def trained(model: nn.Module, problem: Problem, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = problem.train.tensors
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


class Spy(Dataset):
    """Looks at the model each time that an example is read."""

    def __init__(self, data, model: nn.Module) -> None:
        self.data, self.model = data, model
        self.seen: list[object] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        self.seen.append(state_of(self.model))
        return self.data[index]


def state_of(model: nn.Module):
    return [
        *((name, value.data_ptr(), value.tolist()) for name, value in model.state_dict(keep_vars=True).items()),
        *((p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()),
        *((m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()),
    ]


@pytest.mark.parametrize("gradients", ["hooks", "general"])
def test_the_model_is_never_touched(blobs, tmp_path, gradients):
    problem, _ = blobs
    model = problem.model
    model.train()
    model[0].eval()
    model[2].bias.requires_grad_(False)
    try:
        before = state_of(model)
        train, queries = Spy(problem.train, model), Spy(problem.queries, model)
        options = {"sketch": sp.Sketch(16), "batch_size": 8, "progress": False, "gradients": gradients}
        bank = sp.build(model, problem.task, problem.trajectory, train, tmp_path / "bank", parameters=["*"], **options)
        bank.append(model, problem.task, Spy(problem.queries, model), batch_size=8, progress=False)
        for method in (sp.Source, sp.TracIn, sp.Hydra):
            method(bank, model=model, progress=False).score(queries)
        sp.Source(bank, model=model, progress=False).by_segment(queries)
        assert len(train.seen) > 40
        assert all(state == before for state in [*train.seen, *queries.seen, state_of(model)])
    finally:
        model[2].bias.requires_grad_(True)
        model.train()
