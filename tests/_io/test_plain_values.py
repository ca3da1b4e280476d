"""Checkpoints hold more than tensors: plain values are read, whoever made them, and nothing that could run code."""

import numpy as np
import pytest
import torch

import source_proj as sp
from source_proj._io.loading import load_tensors

NUMBERS = [
    np.float64(0.25),
    np.float32(0.25),
    np.float16(0.25),
    np.int64(-3),
    np.uint8(3),
    np.bool_(True),
    np.complex128(1j),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_numbers_of_numpy_beside_the_weights(tmp_path, number):
    model = torch.nn.Linear(2, 1)
    torch.save({"model": model.state_dict(), "best": number, "history": [(0, number)]}, tmp_path / "c.pt")
    read = load_tensors(tmp_path / "c.pt", "save it anew")
    assert type(read["best"]) is type(number)
    assert read["best"] == read["history"][0][1] == number
    state = sp.Checkpoint(tmp_path / "c.pt", 1, lr=0.1).load()
    assert torch.equal(state["weight"], model.weight)


@pytest.mark.parametrize(
    "value",
    [np.array(["a", {}], dtype=object), np.random.default_rng(0), print],
    ids=["objects", "generator", "function"],
)
def test_other_objects_are_refused_with_what_to_do_and_no_advice_to_run_them(tmp_path, value):
    torch.save({"best": value}, tmp_path / "c.pt")
    with pytest.raises(sp.MismatchError, match=r"holds other objects.*save it anew") as caught:
        load_tensors(tmp_path / "c.pt", "save it anew")
    assert "add_safe_globals" not in str(caught.value)
    assert "Please" not in str(caught.value)
