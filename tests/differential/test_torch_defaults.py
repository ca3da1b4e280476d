"""torch's default number format and device are the user's own: nothing that is computed here follows them."""

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import source_proj as sp
from source_proj.demo.digits import make_network

ROOT = Path(sp.__file__).parent
FLOATS = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros"}
INTEGERS = {"arange", "as_tensor", "asarray", "randint", "randperm", "tril_indices", "triu_indices"}
METHODS = [
    sp.Source, sp.TracIn, sp.Trak, sp.InfluenceFunction, sp.ArnoldiInfluence, sp.DataInf, sp.Hydra, sp.GradCos,
    sp.GradDot, sp.RepSim,
]  # fmt: skip


@contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: str | None = None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


class Rows(Dataset):
    """Examples that a loader stacks, where a TensorDataset is cut at once."""

    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, index):
        return tuple(column[index] for column in self.columns)


class Work:
    """A model, its data, and everything that is made of them; all chosen before the defaults are changed."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.inputs = torch.randn(30, 1, 6, 6, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, 3, (30,), generator=generator)
        self.order = torch.randperm(20, generator=generator)
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8),
            nn.GELU(), nn.Linear(8, 3),
        ).to(dtype)  # fmt: skip
        self.tokens, self.language = torch.randint(0, 7, (30, 5), generator=generator), Words().to(dtype)
        self.simple = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        self.train_set = TensorDataset(self.inputs[:20], self.labels[:20])
        self.queries = TensorDataset(self.inputs[20:], self.labels[20:])

    def run(self, folder, optimizer, **options):
        """Train a copy, a checkpoint every other step."""
        model = copy.deepcopy(self.model)
        optimizer = optimizer(model.parameters())
        recorder = sp.Recorder(model, optimizer, folder, **{"every": 2, **options})
        for index in [*self.order.split(5)] * 2:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(self.inputs[index]), self.labels[index]).backward()
            optimizer.step()
            recorder.step(**({"ids": index} if "capture" in options else {}))
        return model, recorder

    def build(self, folder, model, trajectory, train_set=None, **options):
        options = {"sketch": sp.Sketch(64), "storage": "int8", "batch_size": 8, "progress": False, **options}
        task = options.pop("task", sp.Classification())
        return sp.build(model, task, trajectory, train_set or self.train_set, folder, **options)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5, weight_decay=1e-3)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def numbers(cleaning):
    """The examples named, and the numbers behind."""
    return np.stack([cleaning.ids, *(np.asarray(column, np.float64) for column in cleaning.values.values())])


def built(work, folder):
    """Scores of every method, and what else is asked of a bank."""
    model, recorder = work.run(folder / "run", sgd)
    trajectory = recorder.trajectory()
    bank = work.build(folder / "bank", model, trajectory)
    for method in METHODS:
        options = {"train_set": work.train_set} if method is sp.RepSim else {}
        asked = method(bank, model=model, progress=False, **options)
        yield f"{method.__name__} scores", asked.score(work.queries).to_numpy()
        yield f"{method.__name__} hits", asked.top_k(work.queries, 3).scores
    source = sp.Source(bank, model=model, progress=False, segments=2)
    scores = source.score(work.queries)
    yield "by segment", source.by_segment(work.queries).to_numpy()
    yield "own influence", source.self_influence().to_numpy()
    yield "reranked", source.top_k(work.queries, 3, rerank=6).scores
    yield "fidelity", source.fidelity(work.queries).correlation
    yield "likenesses", numbers(sp.curate.near_duplicates(bank, threshold=0.5, progress=False))
    yield "harmful", numbers(sp.curate.harmful(sp.curate.aggregate(scores)))
    for by in ("error", "self_influence", "disagreement"):
        yield f"mislabelled by {by}", numbers(sp.curate.mislabelled(source, work.labels[:20].tolist(), by=by))
    yield "chosen", numbers(sp.curate.select(scores, n=5))
    rows = Rows(*work.train_set.tensors)
    for kind, storage in {"tensor": "int4", "rademacher": "int1", "kronecker": "float32"}.items():
        bank = work.build(folder / kind, model, trajectory, rows, sketch=sp.Sketch(64, kind), storage=storage)
        yield kind, sp.Source(bank, model=model, progress=False).score(work.queries).to_numpy()


def metrics(work, folder):
    """Adam's metrics, exact and factored."""
    for kind in ("scalar", "shared", "per_segment", "factored"):
        model, recorder = work.run(folder / f"run {kind}", adam)
        bank = work.build(folder / kind, model, recorder.trajectory(preconditioner=kind, segments=2))
        yield kind, sp.Source(bank, model=model, progress=False).score(work.queries).to_numpy()


def captured(work, folder):
    """Rows that were captured while the model trained."""
    for kind in ("sparse", "tensor"):
        options = {"capture": sp.Sketch(64, kind), "task": sp.Classification()}
        model, recorder = work.run(folder / f"run {kind}", sgd, **options)
        bank = recorder.bank()
        yield kind, sp.Source(bank, model=model, progress=False).score(work.queries).to_numpy()


class Words(nn.Module):
    """A language model of two layers, which sees what came before."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.words(input_ids).cumsum(1)))


def language(work, folder):
    """A language model's sampled Fisher, tokens, answers of its own, and rows captured with drawn labels."""
    torch.manual_seed(0)
    start, task, rows = work.language, sp.CausalLM(), [{"input_ids": row, "labels": row} for row in work.tokens]
    for capture in (None, sp.Sketch(64)):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        options = {"every": 2} if capture is None else {"every": 2, "capture": capture, "task": task, "draw_every": 1}
        recorder = sp.Recorder(model, optimizer, folder / f"run {capture}", **options)
        for index in work.order.split(5):
            optimizer.zero_grad()
            told = {} if capture is None else {"labels": work.tokens[index]}
            logits = model(work.tokens[index], **told)[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), work.tokens[index, 1:].flatten()).backward()
            optimizer.step()
            recorder.step(**({} if capture is None else {"ids": index}))
        options = {"task": task, "train_set": rows[:20]}
        bank = work.build(folder / "bank", model, recorder.trajectory(), **options) if not capture else recorder.bank()
        source = sp.Source(bank, model=model, progress=False)
        yield f"sequences {capture}", source.score(rows[20:]).to_numpy()
    source = sp.Source(sp.open(folder / "bank"), model=start, task=task, progress=False)
    yield "tokens", source.by_token(rows[20:22], rows[:2]).to_numpy()


def judged(work, folder):
    """Exact unrolling, and models trained in lock-step."""
    steps = [part.tolist() for part in work.order.split(5)]
    options = {"progress": False}
    exact = sp.evaluate.ExactUnrolling(work.simple, sp.Classification(), work.train_set, steps, sgd, **options)
    yield "exact unrolling", exact.score(work.queries).to_numpy()
    state = sp.evaluate.train_stacked(
        lambda: copy.deepcopy(work.simple), *work.train_set.tensors, [np.arange(10), np.arange(5, 15)], [0, 1],
        epochs=1, batch_size=4, lr=0.1,
    )  # fmt: skip
    yield "lock-step", sp.evaluate.stacked_outputs(lambda: work.simple, work.inputs)(state).numpy()


def demonstration(work, folder):
    """The network of the demo."""
    network = make_network()
    yield "demo", network(torch.ones(1, 64, dtype=torch.float32, device="cpu")).detach().numpy()


CHANGED = [
    pytest.param({"dtype": torch.float64}, id="float64"),
    pytest.param({"dtype": torch.bfloat16}, id="bfloat16"),
    pytest.param({"device": "meta"}, id="meta"),  # whatever is made without a device has no numbers there
]


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("part", [built, metrics, captured, language, judged, demonstration])
def test_the_same_bits_come_of_other_defaults(tmp_path, part, changed):
    if part is metrics and changed.get("device") == "meta":
        pytest.skip("torch's own Adam counts its steps on the default device")
    work = Work()
    with defaults():
        plain = dict(part(work, tmp_path / "plain"))
    with defaults(**changed):
        other = dict(part(work, tmp_path / "other"))
    for name, values in plain.items():
        np.testing.assert_array_equal(np.asarray(other[name]), np.asarray(values), err_msg=name)


@pytest.mark.parametrize("part", [built, captured])
def test_a_double_model_is_the_same_under_either_default(tmp_path, part):
    work = Work(torch.float64)
    plain = dict(part(work, tmp_path / "plain"))
    with defaults(torch.float64):
        other = dict(part(work, tmp_path / "other"))
    for name, values in plain.items():
        np.testing.assert_array_equal(np.asarray(other[name]), np.asarray(values), err_msg=name)


def unnamed(source: str) -> Iterator[int]:
    """Lines that make a tensor and leave its device, or its number format where that may be a float's, to torch."""
    for node in ast.walk(ast.parse(source)):
        function = getattr(node, "func", None)
        if isinstance(function, ast.Attribute) and getattr(function.value, "id", None) == "torch":
            said = {keyword.arg for keyword in node.keywords}
            needed = (
                {"dtype", "device"} if function.attr in FLOATS else {"device"} if function.attr in INTEGERS else set()
            )
            if needed - said:
                yield node.lineno


def test_tensors_are_made_with_a_device_and_a_number_format():
    assert list(unnamed('torch.zeros(2)\ntorch.zeros(2, dtype=d)\ntorch.zeros(2, dtype=d, device="cpu")')) == [1, 2]
    assert list(unnamed('torch.arange(2)\ntorch.arange(2, device="cpu")\nx.new_zeros(2)')) == [1]
    files = [path for room in (ROOT, ROOT / "kernels") for path in room.rglob("*.py")]
    lines_of = {str(path.relative_to(ROOT)): list(unnamed(path.read_text(encoding="utf-8"))) for path in files}
    assert {path: lines for path, lines in lines_of.items() if lines} == {}
