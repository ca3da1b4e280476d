"""Similarities rank examples, and say that they are no changes of a measurement."""

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import classification, regression
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp

METHODS = {
    "RepSim": lambda problem, bank: sp.RepSim(bank, model=problem.model, train_set=problem.train, progress=False),
    "GradCos": lambda problem, bank: sp.GradCos(bank, model=problem.model, progress=False),
}


@pytest.fixture(scope="module", params=[classification, regression])
def built(request, tmp_path_factory):
    problem = request.param(20)
    return problem, problem.build(tmp_path_factory.mktemp("similar") / "bank")


def test_the_most_alike_are_helpful_whatever_is_measured(built, tmp_path):
    """Of an error lower is better, and so the least alike examples were listed as helpful."""
    method = METHODS["RepSim"](*built)
    scores = method.score(built[0].queries)
    wanted = scores.top_k(3)
    assert scores.higher_is_better
    assert method.helpful(built[0].queries, 3).ids == scores.helpful(3).ids == wanted.ids
    assert method.helpful(built[0].queries, 3, out=tmp_path / "h.zarr")[:].ids == wanted.ids
    assert method.harmful(built[0].queries, 3).ids == scores.bottom_k(3).ids
    aggregated = sp.curate.aggregate(method, built[0].queries)
    assert sp.curate.drop_worst(aggregated, 1).ids == [int(np.argmin(scores.values.mean(0)))]


def test_a_training_example_helps_itself_by_the_cosine_of_its_gradient(built):
    """The sign of this one follows the measurement: -1 is the same direction, of an error."""
    problem = built[0]
    helpful = METHODS["GradCos"](*built).helpful(problem.train, 1)
    assert np.abs(np.abs(helpful.scores) - 1).max() < 1e-4


@settings(max_examples=15)
@given(st.integers(0, 2**20), st.sampled_from([1.0, 40.0, 80.0]), st.sampled_from([1e-25, 1e-15, 1.0, 1e22]))
def test_a_cosine_knows_no_lengths(tmp_path_factory, seed, margin, size):
    """Examples that were learnt so well that ℓ' is below 1e-12 were like nothing, themselves included."""
    generator, path = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("lengths") / "bank"
    sizes = size ** torch.rand(7, 1, generator=generator)
    inputs, labels = torch.randn(7, 5, generator=generator) * sizes, torch.zeros(7, dtype=torch.int64)
    inputs[6] = inputs[0]
    model = nn.Linear(5, 2)
    with torch.no_grad():  # of every example's label
        model.weight.zero_()
        model.bias.copy_(torch.tensor([margin / 2, -margin / 2]))
    run = sp.Trajectory([sp.Checkpoint(model.state_dict(), step=10, lr=0.1)])
    data, options = TensorDataset(inputs, labels), {"storage": "float32", "progress": False}
    bank = sp.build(model, sp.Classification(), run, data, path, sketch=sp.Sketch(12, "identity"), **options)
    rows = torch.cat([inputs, torch.ones(7, 1)], 1).double()  # a gradient is (1, -1) times these
    expected, alike = (cosines(x) for x in (rows, inputs.double()))
    np.testing.assert_allclose(sp.GradCos(bank, model=model, progress=False).score(data), expected, atol=1e-5)
    similar = sp.RepSim(bank, model=model, train_set=data, progress=False).score(data)
    np.testing.assert_allclose(similar, alike, atol=1e-5)
    copies = sp.curate.near_duplicates(bank, threshold=0.999999, progress=False)
    assert 6 in copies.ids


def cosines(rows: torch.Tensor) -> np.ndarray:
    directions = rows / rows.norm(dim=1, keepdim=True)
    return (directions @ directions.T).numpy()


@pytest.mark.parametrize("name", METHODS)
def test_similarities_say_what_they_are(built, tmp_path, name):
    method, queries = METHODS[name](*built), built[0].queries
    scores = method.score(queries, out=tmp_path / "scores.zarr")
    scores.to_zarr(tmp_path / "held.zarr")
    files = [method.top_k(queries, 2, out=tmp_path / f"hits{ending}") for ending in (".zarr", ".parquet")]
    hits = [method.top_k(queries, 2), scores.helpful(2), scores.top_k(2)[1:], *(file[:] for file in files)]
    for each in hits:
        assert repr(each).endswith("x 2 training examples; +: similarity (cosine))")
    for path in ("scores.zarr", "held.zarr"):
        assert (
            zarr.open_array(tmp_path / path, mode="r").attrs["sign"]
            == "similarity (cosine), no change of the measurement"
        )
    page = sp.report.render(sp.report.make_hits_page("t", {"helpful": hits[0]}))
    assert "A similarity of the training example to the query (cosine)" in page
    assert "including" not in page
    assert "Scores add up" not in page


def test_changes_say_so_in_every_file(built, tmp_path):
    method = sp.Source(built[1], model=built[0].model, progress=False)
    for ending in (".zarr", ".parquet"):
        hits = method.top_k(built[0].queries, 2, out=tmp_path / f"hits{ending}")[:]
        assert hits.additive
        assert "including the example raised the" in repr(hits)
