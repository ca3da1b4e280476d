"""Captured rows whose parameters have weights: the same run's rows times the weights, and what is refused."""

import numpy as np
import pytest
import torch
from captured_runs import Decoder, convolutional, mlp, rows_of, train

import source_proj as sp


def by_coordinate(bank):
    spec = bank.space_spec
    pairs = zip(bank.parameter_weights.values(), spec["shapes"], strict=True)
    return torch.cat([torch.full((int(np.prod(shape)),), weight) for weight, shape in pairs])


@pytest.mark.parametrize("draw_every", [0, 1])
@pytest.mark.parametrize("make", [mlp, convolutional, Decoder])
def test_captured_rows_and_curvature_have_the_weights(tmp_path, make, draw_every):
    names = [name for name, _ in make().named_parameters()]
    weights = {names[0]: 0.25, names[-1]: 3}
    banks = []
    for given in (None, weights):
        torch.manual_seed(2)
        recorder = train(tmp_path / str(given is None), make(), parameter_weights=given, draw_every=draw_every)
        banks.append(recorder.bank(storage="float32"))
    plain, weighted = banks
    assert set(plain.parameter_weights.values()) == {1.0}
    assert [weighted.parameter_weights[name] for name in (names[0], names[-1])] == [0.25, 3.0]
    factors = by_coordinate(weighted)
    torch.testing.assert_close(rows_of(weighted), rows_of(plain) * factors, rtol=1e-4, atol=1e-6)
    curvatures = [bank.stages[0].captured_curvature(0)[0] for bank in banks]
    torch.testing.assert_close(curvatures[1], factors[:, None] * curvatures[0] * factors, rtol=1e-4, atol=1e-6)
    assert "gradients weighted by parameter_weights" in weighted.parameter_choice
    assert weighted.verify().ok


def test_queries_of_a_captured_bank_have_its_weights(tmp_path):
    """With all weights 2 each inner product is four times as large."""
    scores = []
    for given in (None, {"*": 2.0}):
        torch.manual_seed(2)
        model = mlp()
        bank = train(tmp_path / str(given is None), model, parameter_weights=given).bank(storage="float32")
        queries = torch.utils.data.TensorDataset(
            torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), torch.arange(3)
        )
        scores.append(np.asarray(sp.Hydra(bank, model=mlp(), progress=False).score(queries)))
    np.testing.assert_allclose(scores[1], 4 * scores[0], rtol=1e-4)


def test_a_resumed_capture_has_the_weights_that_it_began_with(tmp_path):
    train(tmp_path / "run", steps=3, parameter_weights={"0.weight": 0.5})
    with pytest.raises(sp.MismatchError, match="parameters of the recorded capture"):
        train(tmp_path / "run", steps=6, parameter_weights={"0.weight": 0.25})
    whole = train(tmp_path / "whole", steps=6, parameter_weights={"0.weight": 0.5}).bank(storage="float32")
    bank = train(tmp_path / "run", steps=6, parameter_weights={"0.weight": 0.5}).bank(storage="float32")
    torch.testing.assert_close(rows_of(bank), rows_of(whole))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("agreement", TypeError, "nothing can be measured before training; got 'agreement'"),
        ({"nothing": 1.0}, ValueError, "matches none of the parameters"),
        ({"0.*": -1.0}, ValueError, "must be a number from"),
    ],
)
def test_what_is_refused(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", parameter_weights=given)
    assert not (tmp_path / "run").exists()


def test_none_is_no_weights(tmp_path):
    rows = [
        rows_of(train(tmp_path / str(given), parameter_weights=given).bank(storage="float32"))
        for given in ("none", None)
    ]
    assert torch.equal(*rows)


def test_weights_belong_to_a_capture(tmp_path):
    model = mlp()
    with pytest.raises(TypeError, match="parameter_weights= belongs to capture="):
        sp.Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path, every=1, parameter_weights={"*": 2.0})
