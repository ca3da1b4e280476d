"""What is wrong with an example is said by its id, with the value and the remedy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import source_proj as sp


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.net(x)


class WithOthers(ByName):
    def forward(self, x: Any, **others: Any) -> Any:
        return self.net(x)


def rows(size: int = 9) -> list[tuple[torch.Tensor, int]]:
    return [(torch.randn(6, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(size)]


def build(data: Any, folder: Path, model: nn.Module | None = None, **options: Any) -> sp.Bank:
    model = model or nn.Linear(6, 3)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=np.int64(1), lr=0.1)])
    path = folder / "bank"
    return sp.build(model, sp.Classification(), run, data, path, sketch=sp.Sketch(16), progress=False, **options)


@pytest.mark.parametrize("gradients", ["auto", "general"])
@pytest.mark.parametrize(("label", "place"), [(-100, 0), (-100, 6), (3, 7)])
def test_a_label_that_is_no_class_is_named(tmp_path: Path, label: int, place: int, gradients: str) -> None:
    data = [(x, label if i == place else y) for i, (x, y) in enumerate(rows())]
    with pytest.raises(ValueError, match=rf"labels of ids \['z{place}'\] are \[{label}\], and the model has 3 classes"):
        build(data, tmp_path, ids=[f"z{i}" for i in range(9)], batch_size=np.int64(4), gradients=gradients)


def test_a_query_with_a_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    model = nn.Linear(6, 3)
    source = sp.Source(build(rows(), tmp_path, model), model=model)
    for place in (0, 2):
        with pytest.raises(ValueError, match=rf"labels of ids \[{place}\] are \[5\]"):
            source.score([(x, 5 if i == place else y) for i, (x, y) in enumerate(rows(4))])


def named(extra: Any) -> DataLoader[Any]:
    def collate(examples: list[Any]) -> Any:
        return {**extra(examples), **default_collate(examples)}

    return DataLoader([{"x": x, "labels": y} for x, y in rows()], batch_size=4, collate_fn=collate)


@pytest.mark.parametrize(
    "extra",
    [
        lambda examples: {"path": np.array(["a"] * len(examples))},
        lambda _: {"length": np.int64(3)},
        lambda _: {"weight": torch.ones(3)},
    ],
    ids=["strings", "integer", "a tensor for all"],
)
def test_what_a_collate_adds_is_no_obstacle(tmp_path: Path, extra: Any) -> None:
    assert build(named(extra), tmp_path, WithOthers()).n_rows == 9


def test_inputs_that_a_model_cannot_take_are_explained(tmp_path: Path) -> None:
    for name, data, model, message in [
        ("lists", [{"x": x.tolist(), "labels": y} for x, y in rows()], ByName(), r"'x' is a list of 6 tensors .* row"),
        (
            "double",
            [(x.double(), y) for x, y in rows()],
            None,
            r"input is float64, .* give it as float32",
        ),
        ("column", [{"x": x, "labels": y, "path": 1} for x, y in rows()], ByName(), "leave the column 'path' out"),
    ]:
        with pytest.raises(TypeError, match=message):
            build(data, tmp_path / name, model)


@pytest.mark.parametrize("target", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("measurement", ["absolute", "squared"])
def test_a_query_whose_measurement_is_not_finite_is_named(tmp_path: Path, target: float, measurement: str) -> None:
    if (target, measurement) == (1e30, "absolute"):
        pytest.skip("it is finite")
    model, x, y = nn.Linear(6, 1), torch.randn(9, 6), torch.randn(9)
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=1, lr=0.1)])
    task, data = sp.Regression(measurement), TensorDataset(x, y)
    bank = sp.build(model, task, run, data, tmp_path / "bank", sketch=sp.Sketch(16), progress=False)
    for place in (0, 5):
        targets = y.where(torch.arange(9) != place, target)
        words = rf"the targets of ids \[{place}\] are \[{target}\]"
        if target == 1e30:
            words = rf"the measurement is not finite for queries \[{place}\] at step 1"
        with pytest.raises(sp.SourceProjError, match=words):
            sp.Source(bank, model=model, batch_size=4).sketch(TensorDataset(x, targets))
