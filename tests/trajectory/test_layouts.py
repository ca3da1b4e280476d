"""Weights in the shapes that people have: each is read as the state it holds, or refused with the tool that helps."""

import argparse
import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import source_proj as sp
from source_proj.trajectory.layouts import sharded_state, unwrapped_names


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Compiled(nn.Module):
    """Names as torch.compile makes them, without its half minute of imports."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


WRAPPERS = {
    "bare": lambda model: model,
    "data parallel": nn.DataParallel,
    "compiled": Compiled,
    "both": lambda model: Compiled(nn.DataParallel(model)),
    "both, the other way": lambda model: nn.DataParallel(Compiled(model)),
    "averaged": AveragedModel,
    "averaged and compiled": lambda model: Compiled(AveragedModel(model)),
}
STATE_KEYS = ["model", "state_dict", "model_state_dict", "net", "module", "params", "network", "weights", "anything"]


def output(model, inputs):
    with torch.no_grad():
        return model(inputs)


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("asked", WRAPPERS)
@pytest.mark.parametrize("suffix", [".pt", ".pth.tar"])
def test_a_wrapped_state_fits_a_wrapped_model(saved, asked, suffix, tmp_path):
    trained = network(1)
    file = tmp_path / f"weights{suffix}"
    torch.save(WRAPPERS[saved](trained).state_dict(), file)
    bare = network(2)
    model, inputs = WRAPPERS[asked](bare), torch.randn(5, 3)
    with sp.Checkpoint(file, step=1).applied_to(model):
        inner = next(module for module in model.modules() if isinstance(module, nn.Sequential))
        torch.testing.assert_close(output(inner, inputs), output(trained.eval(), inputs), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["model.", "net.", "task.backbone."])
def test_an_attribute_before_every_name_is_cut_off(prefix):
    trained, model, inputs = network(1), network(2), torch.randn(5, 3)
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    with sp.Checkpoint(state, step=1).applied_to(model):
        torch.testing.assert_close(output(model, inputs), output(trained.eval(), inputs), rtol=0, atol=0)
    state[f"{prefix}extra"] = torch.zeros(1)
    with pytest.raises(sp.MismatchError, match=r"missing: 0\.weight"):
        sp.Checkpoint(state, step=1).applied_to(model).__enter__()


parts = st.sampled_from(["a", "b", "module", "0"])
paths = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(st.sets(paths, min_size=1, max_size=6))
def test_names_that_fit_are_left_alone(names):
    state = {name: place for place, name in enumerate(sorted(names))}
    assert unwrapped_names(state, names) == state


@given(st.sets(paths, min_size=2, max_size=6))
def test_no_entry_is_lost_or_takes_anothers_place(names):
    ordered = sorted(names)
    state = {name: place for place, name in enumerate(ordered[: len(ordered) // 2 + 1])}
    assert sorted(unwrapped_names(state, ordered[len(ordered) // 2 :]).values()) == list(state.values())


@pytest.mark.parametrize("key", STATE_KEYS)
def test_a_state_is_found_inside_what_scripts_save(key, tmp_path):
    trained = network(1)
    optimizer = torch.optim.Adam(trained.parameters())
    content = {
        "epoch": 3,
        "arch": "mlp",
        "args": argparse.Namespace(lr=0.1, out=Path("somewhere")),
        key: trained.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, tmp_path / "model_best.pth.tar")
    state = sp.Checkpoint(tmp_path / "model_best.pth.tar", step=1).load()
    assert state.keys() == trained.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())


def test_a_file_of_nanogpt(tmp_path):
    trained = network(1)
    content = {
        "model": {f"_orig_mod.{name}": value for name, value in trained.state_dict().items()},
        "optimizer": torch.optim.AdamW(trained.parameters()).state_dict(),
        "model_args": {"n_layer": 1, "bias": False, "block_size": 8},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "learning_rate": 1e-3},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    model, inputs = network(2), torch.randn(5, 3)
    with sp.Checkpoint(tmp_path / "ckpt.pt", step=250).applied_to(model):
        torch.testing.assert_close(output(model, inputs), output(trained.eval(), inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("trained_key", "averaged_key"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("params", "params_ema"), ("net", "swa_state")],
)
def test_averaged_weights_are_named_and_offered(trained_key, averaged_key, tmp_path):
    file, trained, averaged = tmp_path / "last.pth.tar", network(1), network(2)
    torch.save({trained_key: trained.state_dict(), averaged_key: averaged.state_dict()}, file)
    with pytest.warns(UserWarning, match=f"the trained ones were taken; key='{averaged_key}' takes the averaged ones"):
        state = sp.Checkpoint(file, step=1).load()
    assert torch.equal(state["0.weight"], trained.state_dict()["0.weight"])
    other = sp.Checkpoint(file, step=1, key=averaged_key)
    assert torch.equal(other.load()["0.weight"], averaged.state_dict()["0.weight"])
    assert other.hash() != sp.Checkpoint(file, step=1, key=trained_key).hash()
    torch.save({averaged_key: averaged.state_dict()}, file)  # nothing else was saved
    assert torch.equal(sp.Checkpoint(file, step=1).load()["0.weight"], averaged.state_dict()["0.weight"])
    with pytest.raises(ValueError, match=f"has no entry 'nothing', only {averaged_key}"):
        sp.Checkpoint(file, step=1, key="nothing")


def test_several_states_are_asked_about(tmp_path):
    file = tmp_path / "gan.pt"
    torch.save({"generator": network(1).state_dict(), "critic": network(2).state_dict()}, file)
    with pytest.raises(ValueError, match=r"several states \(generator, critic\): give the one that is meant by key="):
        sp.Checkpoint(file, step=1).load()
    assert sp.Checkpoint(file, step=1, key="critic").load().keys() == network().state_dict().keys()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_stands_for_the_weights_in_it(name, tmp_path):
    """As accelerate's save_state and transformers' save_pretrained leave them."""
    state = network(1).state_dict()
    (save_file if name.endswith(".safetensors") else torch.save)(state, tmp_path / name)
    torch.save({}, tmp_path / "optimizer.bin")
    torch.save({}, tmp_path / "scheduler.bin")
    checkpoint = sp.Checkpoint(tmp_path, step=1)
    assert checkpoint.path == tmp_path / name
    assert torch.equal(checkpoint.load()["0.weight"], state["0.weight"])


def distributed(folder):
    (folder / ".metadata").write_bytes(b"")
    (folder / "__0_0.distcp").write_bytes(b"")
    return r"dcp_to_torch \S+ FILE.pt"


def fsdp(folder):
    (folder / "pytorch_model_fsdp_0").mkdir()
    return r"accelerate merge-weights \S+pytorch_model_fsdp_0"


def deepspeed(folder):
    (folder / "global_step20").mkdir()
    (folder / "global_step20" / "mp_rank_00_model_states.pt").write_bytes(b"")
    return r"python \S+zero_to_fp32.py"


@pytest.mark.parametrize("kind", [distributed, fsdp, deepspeed])
def test_pieces_are_refused_with_the_tool_that_joins_them(kind, tmp_path):
    folder = tmp_path / "checkpoint-20"
    folder.mkdir()
    message = kind(folder)
    with pytest.raises(FileNotFoundError, match=message):
        sp.Checkpoint(folder, step=20)
    assert sharded_state(tmp_path) is None


def test_what_distributed_checkpoints_really_look_like(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": network().state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(FileNotFoundError, match="dcp_to_torch"):
        sp.Checkpoint(tmp_path / "dcp", step=1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pt", ".pth.tar", ".safetensors", ".bin"])
def test_cut_and_empty_files_are_named(share, suffix, tmp_path):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network().state_dict(), whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises((ValueError, sp.MismatchError), match="cut"):
        sp.Checkpoint(cut, step=1).load()


def in_pieces(state, folder, kind):
    """As transformers saves what is too large for one file."""
    stem = "model" if kind == ".safetensors" else "pytorch_model"
    places = {name: f"{stem}-{number:05d}-of-{len(state):05d}{kind}" for number, name in enumerate(state, 1)}
    for name, file in places.items():
        (save_file if kind == ".safetensors" else torch.save)({name: state[name]}, folder / file)
    (folder / f"{stem}{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [folder / file for file in places.values()], folder / f"{stem}{kind}.index.json"


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
def test_a_state_in_several_files_is_read_by_its_index(kind, tmp_path):
    state = network(1).state_dict()
    pieces, index = in_pieces(state, tmp_path, kind)
    for path in (tmp_path, index):
        checkpoint = sp.Checkpoint(path, step=1)
        loaded = checkpoint.load()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    with pytest.raises(sp.MismatchError, match=rf"one of {len(state)} that hold a state: .*{index.name}"):
        sp.Checkpoint(pieces[0], step=1)
    before = checkpoint.hash()
    (save_file if kind == ".safetensors" else torch.save)({next(iter(state)): torch.zeros(2, 3)}, pieces[0])
    assert sp.Checkpoint(tmp_path, step=1).hash() != before
    pieces[-1].write_bytes(pieces[-1].read_bytes()[:50])
    with pytest.raises(sp.MismatchError, match=pieces[-1].name):
        checkpoint.load()
    if kind == ".bin":
        torch.save([torch.zeros(1)], pieces[-1])
        with pytest.raises(sp.MismatchError, match=rf"{pieces[-1].name} must hold a model's state_dict"):
            checkpoint.load()


def test_what_stands_for_a_state_is_named_with_the_remedy():
    with pytest.raises(TypeError, match=r"got Sequential: give its state_dict\(\)"):
        sp.Checkpoint(network(), step=1)
    with pytest.raises(ValueError, match=r"'s3://bucket/model.pt' is a URL"):
        sp.Checkpoint("s3://bucket/model.pt", step=1)


def test_an_index_without_its_files_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002"):
        sp.Checkpoint(tmp_path, step=1).load()
    index.write_text(index.read_text()[:20])
    with pytest.raises(ValueError, match="is no index of weights"):
        sp.Checkpoint(tmp_path, step=1).load()
