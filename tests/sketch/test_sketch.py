"""The sketch as an object: its options, its spec, its backends, and what it refuses."""

import json
import re

import numpy as np
import pytest
import torch
from sketch_kinds import normal

from source_proj import kernels
from source_proj.sketch import Sketch
from source_proj.sketch.projections import kinds


@pytest.mark.parametrize("kind", ["kronecker", "tensor"])
def test_vectors_of_kinds_for_matrices_take_the_sparse_map(kind):
    sparse, whole = Sketch(64), Sketch(64, kind)
    x = normal(3, 40)
    assert torch.equal(whole(x, 5, (40,)), sparse(x, 5))
    assert torch.equal(whole(x, 5), sparse(x, 5))
    assert not torch.equal(whole(x, 5, (4, 10)), sparse(x, 5))
    kernel = normal(3, 4 * 2 * 5)
    assert torch.equal(whole(kernel, 5, (4, 2, 5)), whole(kernel, 5, (4, 10)))


@pytest.mark.parametrize("kind", kinds())
def test_spec_goes_around(kind):
    sketch = Sketch(dim=32, kind=kind, seed=2**64 - 1, nnz=2 if kind == "sparse" else 1)
    spec = json.loads(json.dumps(sketch.spec()))
    again = Sketch.from_spec(spec)
    assert again.spec() == spec
    assert torch.equal(again.matrix(0, 20, (4, 5)), sketch.matrix(0, 20, (4, 5)))
    assert sketch.chosen_backend == ("torch" if kind == "identity" else kernels.available_backends()[0])
    assert sketch.is_exact == (kind == "identity")
    assert Sketch(dim=32, kind=kind, backend="torch").chosen_backend == "torch"


def test_backends_are_honoured_or_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"backend 'cuda' .* choose one of \("):
        Sketch(backend="cuda")
    with pytest.raises(ValueError, match=r"'fast-jl' cannot serve kind 'tensor'.*'torch'"):
        Sketch(backend="fast-jl")
    monkeypatch.setattr(kernels.backends, "native_library", lambda: None)
    left = kernels.available_backends()
    assert left in (("torch",), ("torch", "triton"))  # the latter where Triton's interpreter is on
    assert Sketch().chosen_backend == "torch"
    with pytest.raises(
        ValueError, match=rf"compiled extension, which was not built; choose one of {re.escape(str(left))}"
    ):
        Sketch(backend="native")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 2**31}, "dim is 2147483648"),
        ({"kind": "gaussian"}, "kind is 'gaussian'; known kinds are .*sparse"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"nnz": 0}, "nnz is 0"),
        ({"nnz": 2, "kind": "rademacher"}, "nnz is 2"),
        ({"nnz": 2}, "nnz is 2, but kind 'tensor' .* kind='sparse'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sketch(**options)
    with pytest.raises(TypeError, match=r"dim is 8\.5"):
        Sketch(dim=8.5)
    with pytest.raises(TypeError, match=r"dim is True; give an integer"):
        Sketch(dim=True)
    with pytest.raises(ValueError, match="entries"):
        Sketch.from_spec({"kind": "sparse", "dim": 8})


def test_bad_calls_are_refused():
    sketch, out = Sketch(8), torch.zeros(2, 8)
    factor = torch.zeros(2, 3, 4)

    def at(examples, index, shape=(9, 4)):
        sketch.add_at_(out, factor[0], examples, index, 5, shape)

    def outer(scale):
        sketch.add_outer_(out, factor, factor, 0, scale)

    for message, call in {
        "single number": lambda: sketch(torch.tensor(1.0)),
        "-1 to 4": lambda: sketch(torch.zeros(5), -1),
        r"outside of 0 to": lambda: sketch(torch.zeros(5), 2**63 - 2),
        r"shape \(2, 3\) has 6 coordinates, but rows have 5": lambda: sketch(torch.zeros(5), 0, (2, 3)),
        r"out is \(2, 8\); give \(B, 9\)": lambda: Sketch(9).add_(out, torch.zeros(2, 5)),
        "out has 2 examples": lambda: sketch.add_(out, torch.zeros(3, 5)),
        "give 2 axes": lambda: sketch.add_(out, factor),
        "give 3 axes": lambda: sketch.add_outer_(out, factor, torch.zeros(2, 5), 0),
        "differ in their second axis": lambda: sketch.add_outer_(out, factor, torch.zeros(2, 4, 5), 0),
        "do not overlap": lambda: sketch.add_(torch.zeros(1, 8).expand(2, 8), torch.zeros(2, 5)),
        "strides": lambda: sketch.add_(torch.zeros(8, 2).T, torch.zeros(2, 5)),
        "do not fit identity of dim 8": lambda: Sketch(8, "identity")(torch.zeros(5), 4),
        "examples runs from 0 to 2; there are 2": lambda: at(torch.arange(3), torch.arange(3)),
        "index runs from -1 to 1; there are 9": lambda: at(torch.zeros(3).long(), torch.arange(-1, 2)),
        "give one entry per row": lambda: at(torch.arange(2), torch.arange(3)),
        r"shape is \(9, 5\) for values \(3, 4\)": lambda: at(torch.arange(3), torch.arange(3), (9, 5)),
        "before start": lambda: sketch.matrix(4, 3),
        r"scale is \(15,\) on cpu; give \(16,\) on cpu": lambda: sketch.add_outer_(
            out, factor, factor, 0, torch.ones(15)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"offset is 1\.5; give an integer"):
        sketch(torch.zeros(5), 1.5)
    with pytest.raises(TypeError, match=r"x is an array of int64"):
        sketch(np.arange(4))
    with pytest.raises(TypeError, match=r"rows \(B, n\) is torch.int64"):
        sketch(torch.arange(4))
    with pytest.raises(TypeError, match=r"out is torch.float64"):
        sketch.add_(out.double(), torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"scale is torch.float64"):
        outer(torch.ones(16).double())
    with pytest.raises(TypeError, match=r"index is torch.int32"):
        at(torch.arange(3), torch.arange(3, dtype=torch.int32))
