"""Choosing parameters, and their coordinates."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from gradient_models import Decoder, InplaceMlp
from torch import nn

from source_proj._errors import MismatchError
from source_proj.gradients import ParameterSpace


def test_coordinates_are_compact_and_in_the_order_of_the_model() -> None:
    model = Decoder()
    space = ParameterSpace.from_model(model)
    assert space.names == tuple(name for name, _ in model.named_parameters())
    assert space.size == sum(p.numel() for p in model.parameters())
    at = 0
    for name, p in space.parameters(model).items():
        assert space.offsets[name] == at
        at += p.numel()


def test_a_tied_parameter_appears_once_and_answers_to_each_name() -> None:
    model = Decoder()
    assert ParameterSpace.from_model(model, ["head.*"]).names == ("wte.weight",)
    assert "wte.weight" not in ParameterSpace.from_model(model, ["!head.weight"]).names


def test_globs_choose_and_exclusion_wins() -> None:
    model = InplaceMlp()
    assert ParameterSpace.from_model(model, ["1.*", "*.weight", "!5.*"]).names == ("1.weight", "1.bias", "3.weight")
    assert ParameterSpace.from_model(model, ["!*.weight"]).names == ("1.bias", "3.bias", "5.bias")


def test_frozen_parameters_are_attributed_too() -> None:
    model = InplaceMlp().requires_grad_(False)
    assert ParameterSpace.from_model(model).size == sum(p.numel() for p in model.parameters())


def test_spec_survives_json() -> None:
    space = ParameterSpace.from_model(Decoder(), ["*.bias"])
    assert ParameterSpace.from_spec(json.loads(json.dumps(space.spec()))) == space
    assert ParameterSpace.from_model(Decoder(), ["out.bias"]) != space


@pytest.mark.parametrize(
    ("patterns", "problem", "message"),
    [
        (["*.weigth"], ValueError, r"'\*\.weigth' matches no parameter; the model has \['1\.weight'"),
        (["!nothing"], ValueError, "'!nothing' matches no parameter"),
        (["1.*", "!*"], ValueError, "select no parameter"),
        ("1.*", TypeError, r"write \['1\.\*'\]"),
        ([nn.Parameter(torch.ones(1))], TypeError, r"got a Parameter among them; give names"),
        ([nn.Linear(1, 1)], TypeError, r"got a Linear among them; give names"),
        ([("1.weight", 0)], TypeError, r"got a tuple among them; give names"),
        (len, TypeError, r"globs on their names, got <built-in function len>"),
        (iter(["1.*"]), TypeError, r"list of globs on their names, got <list_iterator"),
    ],
)
def test_bad_patterns_are_named(patterns: Any, problem: type[Exception], message: str) -> None:
    with pytest.raises(problem, match=message):
        ParameterSpace.from_model(InplaceMlp(), patterns)


def test_a_model_without_parameters_and_a_complex_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match="select no parameter"):
        ParameterSpace.from_model(nn.ReLU())
    model = nn.Module()
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="exclude it: '!phase'"):
        ParameterSpace.from_model(model)


def test_another_model_is_refused_by_name() -> None:
    space = ParameterSpace.from_model(nn.Sequential(nn.Linear(2, 3)))
    with pytest.raises(MismatchError, match=r"has shape \(3, 5\) in the model and \(3, 2\) in the bank; give a"):
        space.parameters(nn.Sequential(nn.Linear(5, 3)))
    with pytest.raises(MismatchError, match=r"no parameter '0\.weight'"):
        space.parameters(nn.Linear(2, 3))
