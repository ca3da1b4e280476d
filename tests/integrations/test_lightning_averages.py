"""Averaged weights in Lightning's files: which were taken is said, and the others are offered."""

import warnings

import pytest
import torch
from test_lightning import write

import source_proj as sp


def shifted(state, by=1.0):
    return {name: value + by for name, value in state.items()}


def as_weight_averaging(content, file):
    """Lightning's WeightAveraging puts the averages in the place of the trained weights."""
    content["current_model_state"] = content["state_dict"]
    content["state_dict"] = shifted(content["state_dict"])
    content["averaging_state"] = {"n_averaged": torch.tensor(3)}


def as_swa(content, file):
    content["callbacks"] = {
        "EarlyStopping": {"wait_count": 0},
        "StochasticWeightAveraging": {"n_averaged": 3, "average_model_state": shifted(content["state_dict"])},
    }


def as_entry(content, file):
    content["state_dict_ema"] = shifted(content["state_dict"])


def as_twin(content, file):
    twin = file.with_name(f"{file.stem}-EMA.ckpt")
    torch.save({**content, "state_dict": shifted(content["state_dict"])}, twin)


KINDS = [as_weight_averaging, as_swa, as_entry, as_twin]


@pytest.fixture(params=KINDS)
def run(request, tmp_path):
    """A run whose averages are its trained weights plus one; and the trained weights of each step."""
    write(tmp_path)
    trained = {}
    for file in sorted(tmp_path.glob("*.ckpt")):
        content = torch.load(file)
        trained[content["global_step"]] = dict(content["state_dict"])
        request.param(content, file)
        torch.save(content, file)
    return tmp_path, trained


def test_trained_weights_are_taken_and_averaged_ones_offered(run):
    directory, trained = run
    with pytest.warns(UserWarning, match="the trained ones were taken: weights='averaged' takes the others"):
        stage = sp.Trajectory.from_lightning(directory).stages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states = {checkpoint.step: checkpoint.load() for checkpoint in stage.checkpoints}
        averaged = sp.Trajectory.from_lightning(directory, weights="averaged").stages[0]
    assert states.keys() == trained.keys()
    for checkpoint in averaged.checkpoints:
        for name, value in trained[checkpoint.step].items():
            assert torch.equal(states[checkpoint.step][name], value)
            assert torch.equal(checkpoint.load()[name], value + 1.0)
    assert averaged.lr_integrals == stage.lr_integrals


def test_a_run_without_averages_has_none_to_offer(tmp_path):
    write(tmp_path)
    sp.Trajectory.from_lightning(tmp_path)
    with pytest.raises(ValueError, match=r"holds no averaged weights .weights='averaged'."):
        sp.Trajectory.from_lightning(tmp_path, weights="averaged")
    with pytest.raises(ValueError, match="weights must be 'trained' or 'averaged', got 'best'"):
        sp.Trajectory.from_lightning(tmp_path, weights="best")
