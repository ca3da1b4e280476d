"""What a build refuses, and that it names the cause."""

import copy
from pathlib import Path

import pytest
import torch
from bank_runs import BATCH, N, make_run, make_states
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import source_proj as sp
from source_proj import bank as banks
from source_proj._errors import GradientError, MismatchError, SourceProjError
from source_proj.task import CausalLM, Classification, Task
from source_proj.trajectory import Checkpoint, Trajectory


@pytest.fixture(scope="module")
def run():
    return make_run()


def file_trajectory(folder):
    folder.mkdir()
    for index, state in enumerate(make_states(2)):
        torch.save(state, folder / f"{index}.pt")
    return Trajectory([Checkpoint(folder / f"{index}.pt", 10 * (index + 1), lr=0.1) for index in range(2)])


def constant(output, batch):
    return -torch.ones_like(output), None


def poisoned(model, batch):
    x, _ = batch
    return model(x)[:, 0] / (x[:, 0] != 99)


def test_a_gradient_that_is_not_finite_names_the_example(tmp_path):
    run = make_run(checkpoints=2)
    x = run.data.tensors[0]
    x[29, 0] = x[31, 0] = 99
    names = [f"example {i}" for i in range(N)]
    with pytest.raises(GradientError, match=r"\['example 29', 'example 31'\] of stage 'train' .* step 10"):
        run.build(tmp_path / "bank", task=Task(poisoned, constant), ids=names)
    bank = banks.open(tmp_path / "bank")
    assert [part.done(0).tolist() for part in bank.parts] == [[True, False, False, False]]


@pytest.mark.parametrize("values", [torch.nan, torch.inf])
def test_a_derivative_that_is_not_finite_names_the_example(run, tmp_path, values):
    def broken(output, batch):
        return torch.where(torch.arange(len(output)) == 3, values, 1.0), None

    with pytest.raises(GradientError, match=r"ℓ' is not finite for ids \[3\]"):
        run.build(tmp_path / "bank", task=Task(poisoned, broken))


def dropping(samples):
    return torch.utils.data.default_collate(samples[:-1])


def test_a_collate_that_drops_examples_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)7 examples.*8 were asked for"):
        run.build(tmp_path / "bank", data=DataLoader(run.data, batch_size=BATCH, collate_fn=dropping))


def flattened(samples):
    """As DataCollatorWithFlattening: one row of all sequences."""
    return {name: torch.cat([sample[name] for sample in samples])[None] for name in samples[0]}


@pytest.mark.parametrize("reduction", ["token", "mean", "sum"])
def test_a_collate_that_joins_examples_is_refused_whatever_the_loss(tmp_path, reduction):
    tokens = torch.randint(12, (6, 5))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    model = Bigrams()
    trajectory = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=1, lr=0.1)])
    with pytest.raises(ValueError, match=r"ids 0 to 3 has 1 examples, and 4 were asked for.*nor join them in one row"):
        sp.build(
            model, sp.CausalLM(reduction=reduction), trajectory, DataLoader(data, batch_size=4, collate_fn=flattened),
            tmp_path / "bank", sketch=sp.Sketch(16), progress=False,
        )  # fmt: skip


class Bigrams(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 4), nn.Linear(4, 12)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))


# Sampled Fisher ------------------------------------------------------------------------------------------------


def test_a_model_of_another_architecture_is_refused(run, tmp_path):
    with pytest.raises(MismatchError, match="shape"):
        run.build(tmp_path / "bank", model=nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 3)))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_model_without_data_is_refused(run, tmp_path, device):
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(SourceProjError, match=r"parameter '0.weight' .* device 'meta'.*to_empty"):
        run.build(tmp_path / "bank", model=empty, device=device)
    assert not (tmp_path / "bank").exists()


def test_a_checkpoint_that_changes_during_the_build_is_noticed(run, tmp_path):
    trajectory = file_trajectory(tmp_path / "run")
    run.build(tmp_path / "bank", trajectory=trajectory, shard=(0, 9))
    torch.save(make_states(1, seed=9)[0], tmp_path / "run" / "1.pt")
    with pytest.raises(MismatchError, match=r"checkpoints\[1\]\.hash"):
        run.build(tmp_path / "bank", trajectory=trajectory)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), 3, "ab", (0, 1, 2), (0.5, 2), "12", ("0", "2")])
def test_bad_shards_are_refused(run, tmp_path, shard):
    with pytest.raises(ValueError, match=r"shard must be \(i, n\)"):
        run.build(tmp_path / "bank", shard=shard)


# Arguments of another kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda run: {"model": run.model.state_dict()}, "model must be a Module, got OrderedDict; give the"),
        (lambda run: {"model": nn.Linear}, "model must be a Module, got the class Linear"),
        (
            lambda run: {"task": Classification},
            r"task must be a Task, got the class Classification; give an instance",
        ),
        (lambda run: {"task": "classification"}, "task must be a Task, got str"),
        (
            lambda run: {"trajectory": list(run.trajectory.stages)},
            r"trajectory must be a Trajectory, got list; give Traj",
        ),
        (lambda run: {"trajectory": run.trajectory.final}, "trajectory must be a Trajectory, got Checkpoint"),
        (lambda run: {"trajectory": "nowhere"}, r"got str; give Trajectory.from_recorder\('nowhere'\), or from_hf_tra"),
        (lambda run: {"sketch": None}, "sketch must be a Sketch, got None; give Sketch"),
        (lambda run: {"sketch": 64}, "sketch must be a Sketch, got int"),
        (lambda run: {"ids": set(range(N))}, "ids must be in the order of the examples, got a set"),
        (lambda run: {"ids": frozenset(range(N))}, "got a frozenset"),
        (lambda run: {"ids": "a" * N}, "got a str"),
        (lambda run: {"ids": dict.fromkeys(range(N))}, "got a dict"),
        (lambda run: {"ids": {"train": set(range(N))}}, "got a set for stage 'train'"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_written(run, tmp_path, change, named):
    with pytest.raises(TypeError, match=named):
        run.build(tmp_path / "bank", **change(run))
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("verb", [sp.build, sp.plan])
@pytest.mark.parametrize("kind", [str, Path, None])
def test_a_recorder_and_its_folder_are_told_how_they_become_a_trajectory(run, tmp_path, verb, kind):
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    recorder, folder = sp.Recorder(run.model, optimizer, tmp_path / "run"), tmp_path / "run"
    given, named = (recorder, r"recorder\.trajectory\(\)") if kind is None else (kind(folder), "from_recorder")
    optimizer.step()
    recorder.step()
    recorder.trajectory()
    with pytest.raises(TypeError, match=f"trajectory must be a Trajectory, got .*; give (Trajectory.)?{named}"):
        verb(run.model, run.task, given, run.data, *([tmp_path / "bank"] if verb is sp.build else []))
    with pytest.raises(sp.BankError, match=r"is no bank, but the run of a Recorder: build a bank from it by"):
        sp.open(folder)


@pytest.mark.parametrize("empty", [[], ()])
def test_no_parameters_are_refused(run, tmp_path, empty):
    with pytest.raises(ValueError, match=r"parameters=(\[\]|\(\)) names no parameter; give globs"):
        run.build(tmp_path / "bank", parameters=empty)


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99", "nonsense", "meta", torch.device("cuda", 99)])
def test_a_device_that_is_not_there_or_has_no_numbers_is_refused(run, tmp_path, device):
    named = f"device {str(device)!r} cannot be used here"
    with pytest.raises(ValueError, match=rf"{named} \(.+\); give one that torch has, such as 'cpu'"):
        run.build(tmp_path / "bank", device=device)
    assert not (tmp_path / "bank").exists()
    bank = run.build(tmp_path / "other")
    with pytest.raises(ValueError, match=named):
        bank.append(run.model, run.task, run.data, device=device)
    assert bank.n_rows == N
    for method in (sp.Source, sp.Trak):
        with pytest.raises(ValueError, match=named):
            method(bank, device=device)


def test_gradients_that_training_changed_on_their_way_are_warned_of(run, tmp_path):
    """Rows are of the loss's own gradients: a mask that a hook on a weight applies is not seen."""
    model = copy.deepcopy(run.model)
    name, weight = next(iter(model.named_parameters()))
    handle = weight.register_hook(torch.zeros_like)
    with pytest.warns(UserWarning, match=rf"gradients of {name} pass through register_hook in training"):
        banks.build(model, run.task, run.trajectory, run.data, tmp_path / "hooked", progress=False)
    handle.remove()
    plain = banks.build(model, run.task, run.trajectory, run.data, tmp_path / "plain", progress=False)
    hooked = banks.open(tmp_path / "hooked")
    rows, same = (torch.cat([block.rows for block in bank.stages[0].iter_rows(0)]) for bank in (hooked, plain))
    assert torch.equal(rows, same)


def test_an_append_refuses_arguments_of_another_kind(run, tmp_path):
    bank = run.build(tmp_path / "bank")
    with pytest.raises(TypeError, match="model must be a Module, got OrderedDict"):
        bank.append(run.model.state_dict(), run.task, run.data)
    with pytest.raises(TypeError, match="task must be a Task, got the class Classification"):
        bank.append(run.model, Classification, run.data)
    with pytest.raises(TypeError, match="ids must be in the order of the examples, got a set"):
        bank.append(run.model, run.task, run.data, ids=set(range(1000, 1000 + N)))
    assert bank.n_rows == N


# What a task returns --------------------------------------------------------------------------------------------


def margin(model, batch):
    return model(batch[0])[:, 0]


def detached(model, batch):
    return margin(model, batch).detach()


@pytest.mark.parametrize("gradients", ["auto", "general"])
def test_an_output_without_a_graph_is_refused_with_its_first_shard(run, tmp_path, gradients):
    with pytest.raises(
        GradientError, match=r"stage 'train' up to id 23 has a gradient .* step 10: .*'custom' is detach"
    ):
        run.build(tmp_path / "bank", task=Task(detached, constant), gradients=gradients)
    assert not banks.open(tmp_path / "bank").parts[0].done(0).any()


@pytest.mark.parametrize("gradients", ["auto", "general"])
def test_rows_of_zeros_with_a_graph_are_banked(run, tmp_path, gradients):
    def ignored(model, batch):
        return torch.where(batch[1] > 5, margin(model, batch), 0.0)

    bank = run.build(tmp_path / "bank", task=Task(ignored, constant), gradients=gradients)
    assert bank.n_rows == N


def test_a_graph_to_parameters_that_are_not_attributed_is_enough(run, tmp_path):
    def first_layer(model, batch):
        return model[0](batch[0]).sum(1)

    assert run.build(tmp_path / "bank", task=Task(first_layer, constant), parameters=["2.*"]).n_rows == N


@pytest.mark.parametrize("size", [2, BATCH])
def test_derivatives_that_are_no_pair_are_refused(tmp_path, size):
    class Alone(Task):
        def loss_derivatives(self, output, batch):
            return -torch.ones_like(output)

    for index, task in enumerate([Task(margin, lambda output, batch: -torch.ones_like(output)), Alone(margin)]):
        with pytest.raises(TypeError, match=r"must return the pair \(ℓ', ℓ''\), got a Tensor: return \(ℓ', None\)"):
            make_run().build(tmp_path / str(index), task=task, batch_size=size)


@pytest.mark.parametrize("weight", [-0.5, torch.nan, torch.inf])
@pytest.mark.parametrize("place", [1, 30])
@pytest.mark.parametrize("gradients", ["auto", "general"])
def test_a_sample_weight_that_cannot_be_one_names_the_example(run, tmp_path, weight, place, gradients):
    weights = torch.ones(N)
    weights[place] = weight
    data = TensorDataset(*run.data.tensors, weights)
    task = Classification(sample_weight=2)
    with pytest.raises(MismatchError, match=rf"sample weights of ids \[{place}\] are \[{weight}\], .* at least 0"):
        run.build(tmp_path / "bank", task=task, data=data, gradients=gradients)


class Pooled(nn.Module):
    """A mean over what comes first: time, or all nodes of a graph."""

    def __init__(self, pool):
        super().__init__()
        self.body, self.head, self.pool = nn.Linear(6, 10), nn.Linear(10, 3), pool

    def forward(self, x, of=None):
        return self.head(self.pool(self.body(x).tanh(), of))


def over_time(examples):
    return torch.stack([x for x, _ in examples], 1), torch.tensor([y for _, y in examples])


def joined(examples):
    sizes = torch.tensor([len(x) for x, _ in examples])
    of = torch.repeat_interleave(torch.arange(len(examples)), sizes)
    labels = torch.tensor([y for _, y in examples])
    return {"x": torch.cat([x for x, _ in examples]), "of": of, "labels": labels}


@pytest.mark.parametrize("gradients", ["auto", "general"])
@pytest.mark.parametrize("length", [4, 5])
@pytest.mark.parametrize(
    ("collate", "pool", "shapes"),
    [
        (over_time, lambda h, _: h.mean(0), r"\[\({length}, 4, 6\), \(4,\)\]"),
        (joined, lambda h, of: h.new_zeros(int(of.max()) + 1, 10).index_add(0, of, h), r"\[\({all}, 6\), .*\(4,\)\]"),
    ],
    ids=["time first", "graphs"],
)
def test_a_batch_whose_examples_are_not_in_front_is_named(tmp_path, gradients, length, collate, pool, shapes):
    """Also where there are as many steps as examples; it was said of labels alone that they do not go with logits."""
    torch.manual_seed(0)
    data = [(torch.randn(length, 6), i % 3) for i in range(8)]
    loader, model = DataLoader(data, batch_size=4, collate_fn=collate), Pooled(pool)
    trajectory = Trajectory([Checkpoint(model.state_dict(), 1, lr=0.1)])
    shapes = shapes.format(length=length, all=4 * length)
    with pytest.raises(GradientError, match=f"no example of it alone.*shapes {shapes}, must count examples.*in front"):
        make_run().build(tmp_path / "bank", model=model, trajectory=trajectory, data=loader, gradients=gradients)


def test_tokens_of_another_type_are_named_by_a_language_model_too(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    trajectory = Trajectory([Checkpoint(model.state_dict(), 1, lr=0.1)])
    data = TensorDataset(torch.ones(6, 3), torch.ones(6, 3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"the embedding '0' was given torch.float32: tokens are integers"):
        make_run().build(tmp_path / "bank", model=model, task=CausalLM(), trajectory=trajectory, data=data)


def test_what_is_put_in_the_place_of_examples_or_of_a_model_is_named(run, tmp_path):
    bank = run.build(tmp_path / "bank")
    for given in (run.data, [1, 2]):
        with pytest.raises(
            TypeError, match=rf"must be source_proj.Examples, got {type(given).__name__}: give Examples"
        ):
            bank.examples = given
    bank.examples = None
    bank.examples = sp.Examples(run.data)
    with pytest.raises(TypeError, match="model must be a Module, got str; give the module itself"):
        sp.Source(bank, model="model.pt")
