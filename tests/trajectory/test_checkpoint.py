"""Checkpoints: what is read, what is refused, and that a model comes back as it was."""

import copy
import hashlib
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from source_proj._errors import MismatchError
from source_proj.trajectory import Checkpoint


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


class Tied(nn.Module):
    """An embedding and an output layer that share their weight, as language models do."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.full((2,), float(seed)), persistent=False)


def same(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def save(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("as_string", [True, False])
def test_files(tmp_path, suffix, as_string):
    state = make_model().state_dict()
    path = save(state, tmp_path / f"weights{suffix}")
    checkpoint = Checkpoint(str(path) if as_string else path, step=7, lr=0.1)
    assert checkpoint.path == path
    assert sorted(checkpoint.load()) == sorted(state)
    assert all(torch.equal(checkpoint.load()[name], state[name]) for name in state)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("in_file", [True, False])
def test_wrapped_states(tmp_path, key, in_file):
    state = make_model().state_dict()
    wrapped = {"epoch": 3, key: state, "optimizer": {"state": {}}}
    given = save(wrapped, tmp_path / "run.pt") if in_file else wrapped
    assert same(Checkpoint(given, step=0).load(), state)


def test_a_model_whose_submodule_is_called_model():
    state = {"model": torch.ones(2)}
    assert same(Checkpoint(state, step=0).load(), state)


def test_dicts_are_copied():
    """``state_dict()`` gives the live weights: training on must not change the checkpoint."""
    model = make_model()
    checkpoint = Checkpoint(model.state_dict(), step=0)
    before, digest = copy.deepcopy(model.state_dict()), checkpoint.hash()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert same(checkpoint.load(), before)
    assert Checkpoint(checkpoint.load(), step=1).hash() == digest


class Elsewhere:
    """A class that ``weights_only`` does not let in."""


def truncated(path):
    torch.save(make_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("name", "write", "error", "message"),
    [
        ("a.pt", lambda p: p.write_bytes(b"not a checkpoint"), ValueError, r"a\.pt.*corrupt"),
        ("a.pt", lambda p: p.write_bytes(b""), ValueError, r"a\.pt' is empty: save model"),
        ("a.pt", truncated, ValueError, r"a\.pt' was cut short.*: save model"),
        ("a.pt", lambda p: torch.save({"w": Elsewhere()}, p), ValueError, r"a\.pt.*plain values alone.*Elsewhere"),
        ("a.pt", lambda p: torch.save(make_model(), p), ValueError, r"a\.pt.*plain values alone.*Sequential"),
        ("a.safetensors", lambda p: p.write_bytes(b""), ValueError, r"a\.safetensors' is empty"),
        ("a.pt", lambda p: torch.save([torch.ones(2)], p), ValueError, r"a\.pt.*has a list"),
        ("a.pt", lambda p: torch.save({}, p), ValueError, r"a\.pt.*no entry"),
        (
            "a.pt",
            lambda p: torch.save({"w": torch.ones(1), "epoch": 3}, p),
            ValueError,
            r"no plain tensors with names: 'epoch'",
        ),
        (
            "a.pt",
            lambda p: torch.save({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, p),
            ValueError,
            r"several states \(model, state_dict\)",
        ),
        ("a.safetensors", lambda p: p.write_bytes(b"\0" * 20), ValueError, r"a\.safetensors.*safetensors"),
        ("a.npz", lambda p: p.write_bytes(b"x"), ValueError, r"a\.npz.*unknown type.*\.safetensors"),
        ("a.pt", lambda p: p.mkdir(), FileNotFoundError, r"a\.pt.*is a directory"),
        ("a.pt", lambda p: None, FileNotFoundError, r"a\.pt.*does not exist"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, write, error, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(error, match=message):
        Checkpoint(path, step=0).load()


def test_file_gone_after_construction(tmp_path):
    checkpoint = Checkpoint(save(make_model().state_dict(), tmp_path / "a.pt"), step=0)
    (tmp_path / "a.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        checkpoint.load()
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):
        checkpoint.hash()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "step.*-1"),
        ({"step": 1.5}, ValueError, "step.*1.5"),
        ({"step": True}, ValueError, "step.*True"),
        ({"step": 0, "lr": -0.1}, ValueError, "lr.*-0.1"),
        ({"step": 0, "lr": float("nan")}, ValueError, "lr.*nan"),
        ({"step": 0, "state": [1]}, TypeError, "list"),
        ({"step": 0, "state": {"w": 1.0}}, ValueError, "'w'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Checkpoint(**{"state": {"w": torch.ones(1)}, **arguments})


def test_hash_of_a_dict():
    def digest(state):
        return Checkpoint(state, step=0).hash()

    state = {"a": torch.arange(4.0), "b": torch.zeros(2, 3, dtype=torch.bfloat16), "n": torch.tensor(3)}
    reference = digest(state)
    assert digest(dict(reversed(state.items()))) == reference
    assert digest({**state, "a": torch.arange(8.0)[::2] / 2}) == reference  # equal values, another memory layout
    changed = [
        {**state, "a": torch.tensor([0.0, 1.0, 2.0, 3.0000002])},
        {**state, "a": torch.arange(4.0).reshape(2, 2)},
        {**state, "a": torch.arange(4.0).to(torch.float64)},
        {**state, "b": torch.zeros(2, 3, dtype=torch.float16)},
        {"a2": state["a"], "b": state["b"], "n": state["n"]},
    ]
    assert len({reference, *map(digest, changed)}) == len(changed) + 1


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    path = save(make_model().state_dict(), tmp_path / "a.pt")
    checkpoint = Checkpoint(path, step=0)
    assert checkpoint.hash() == hashlib.sha256(path.read_bytes()).hexdigest()
    save({"w": torch.ones(100)}, path)
    assert checkpoint.hash() == hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return (
        state,
        buffers,
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )


def unchanged(model, before) -> bool:
    now = snapshot(model)
    return same(before[0], now[0]) and same(before[1], now[1]) and before[2:] == now[2:]


def partly_training_model():
    model = make_model(1)
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("fail", [False, True])
def test_applied_to(fail):
    model, other = partly_training_model(), make_model(2)
    other(torch.randn(8, 3))  # moves the running statistics
    before = snapshot(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    expected = pytest.raises(RuntimeError, match="inside") if fail else nullcontext()
    with expected, Checkpoint(other.state_dict(), step=0).applied_to(model) as applied:
        assert applied is model
        assert same(model.state_dict(), other.state_dict())
        assert not any(module.training for module in model.modules())
        model.train()
        model(torch.randn(8, 3))  # a careless caller
        if fail:
            raise RuntimeError("inside")
    assert unchanged(model, before)
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_buffers_outside_the_state_come_back():
    model = Tied()
    with Checkpoint(Tied(1).state_dict(), step=0).applied_to(model):
        model.cache.add_(5.0)
    assert torch.equal(model.cache, torch.zeros(2))


def test_a_train_method_of_its_own_is_left_alone():
    class Merging(nn.Linear):
        def train(self, mode=True):
            raise RuntimeError("weights merged")

    model = Merging(2, 2)
    with Checkpoint(nn.Linear(2, 2).state_dict(), step=0).applied_to(model):
        assert not model.training
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"missing: 0\.weight"),
        (lambda s: s.update(extra=torch.ones(1)), r"not in the model: extra"),
        (lambda s: s.update({"3.bias": torch.ones(5)}), r"of another shape: 3\.bias \(5,\) where the model has \(2,\)"),
        (lambda s: [s.update({f"x{i}": torch.ones(1)}) for i in range(20)], r"x7 and 12 more"),
    ],
)
def test_mismatches_are_named_and_leave_the_model_alone(change, message):
    state = make_model().state_dict()
    change(state)
    model = partly_training_model()
    before = snapshot(model)
    with pytest.raises(MismatchError, match=message), Checkpoint(state, step=0).applied_to(model):
        pytest.fail("must not get here")
    assert unchanged(model, before)


def test_tied_names(tmp_path):
    save_model(Tied(3), str(tmp_path / "tied.safetensors"))  # leaves one of the two names out
    checkpoint = Checkpoint(tmp_path / "tied.safetensors", step=0)
    assert len(checkpoint.load()) == 1
    model = Tied(4)
    with checkpoint.applied_to(model):
        assert torch.equal(model.head.weight, Tied(3).embed.weight)
        assert model.head.weight is model.embed.weight

    state = {name: value.clone() for name, value in Tied(3).state_dict().items()}
    state["head.weight"][0, 0] += 1
    with pytest.raises(MismatchError, match=r"embed\.weight and head\.weight are tied"):
        Checkpoint(state, step=0).applied_to(model).__enter__()
    with pytest.raises(MismatchError, match=r"missing: embed\.weight, head\.weight"):
        Checkpoint({"other": torch.ones(1)}, step=0).applied_to(model).__enter__()


def test_half_precision_checkpoints_fit():
    state = {name: t.half() if t.is_floating_point() else t for name, t in make_model(2).state_dict().items()}
    model = make_model(1)
    with Checkpoint(state, step=0).applied_to(model):
        assert torch.equal(model[0].weight, state["0.weight"].float())


def test_hash_of_one_number_cut_out_of_a_larger_tensor():
    """Its stride is that of the larger one, although it counts as contiguous."""
    cut = torch.arange(9.0).view(1, 9)[:, -1]
    assert cut.is_contiguous()
    assert cut.stride() == (9,)
    assert Checkpoint({"bias": cut}, step=1).hash() == Checkpoint({"bias": torch.tensor([8.0])}, step=1).hash()
