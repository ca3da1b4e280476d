"""Whatever modes of torch's the caller is in, the same bits come out."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from problems import classification
from torch import nn
from torch.utils.data import TensorDataset

import source_proj as sp

MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "none": nullcontext,
}
QUIET = {"progress": False}


class HalfInside(nn.Sequential):
    """A model that is in autocast by itself."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """So many rows and columns that products are torch's own, of a run of two segments."""
    torch.manual_seed(0)
    x, y = torch.randn(300, 10), torch.randint(3, (300,))
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight += 0.1
    run = sp.Trajectory([sp.Checkpoint(s, t, lr=0.3) for s, t in ((start, 9), (model.state_dict(), 19))], segments=2)
    data, queries = TensorDataset(x, y), TensorDataset(x[:5], (y[:5] + 1) % 3)
    folder = tmp_path_factory.mktemp("wide")
    bank = sp.build(model, sp.Classification(), run, data, folder / "bank", sketch=sp.Sketch(1500), **QUIET)
    return model, bank, data, queries


def answers(model, bank, data, queries):
    """What each verb says, from no fit that was kept."""
    source = sp.Source(bank, model=model, cache=False, **QUIET)
    features = source.sketch(queries)
    yield source.score(queries).values
    yield source.replace(damping=0.1).score(features).values
    yield source.score_rows(queries, [7, 3])
    yield source.by_segment(features).values
    yield source.top_k(features, 4).scores
    yield source.top_k(queries, 4, rerank=9, train=data).scores
    yield np.asarray(source.self_influence())
    yield source.fidelity(features).correlation
    yield np.array([segment.trace for segment in source.replace(curvature="gauss_newton").segments])
    yield source.score(queries.tensors[0]).values  # about the model's own answers
    for method in (sp.TracIn, sp.Trak, sp.InfluenceFunction, sp.GradCos, sp.Hydra, sp.DataInf, sp.ArnoldiInfluence):
        yield method(bank, model=model, **QUIET).score(queries).values


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_every_verb_gives_the_same_bits(wide, mode):
    expected = list(answers(*wide))
    with MODES[mode]():
        got = list(answers(*wide))
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"answer {place}")


@pytest.mark.parametrize("mode", ["inference", "no_grad", "none"])
def test_banks_have_the_same_rows(tmp_path, mode):
    problem = classification()
    extra = TensorDataset(*problem.queries.tensors)
    with MODES[mode]():
        bank = problem.build(tmp_path / "bank", sampled_fisher=1)
        bank.append(problem.model, problem.task, extra, **QUIET)
        condensed = sp.condense(bank, tmp_path / "condensed", **QUIET)
        scores = sp.Source(condensed, model=problem.model, **QUIET).score(problem.queries)
    expected = problem.build(tmp_path / "expected", sampled_fisher=1)
    expected.append(problem.model, problem.task, extra, **QUIET)
    assert bank.fingerprint == expected.fingerprint
    for curvature in ("empirical_fisher", "sampled_fisher"):
        ours, theirs = (
            sp.Source(own, model=problem.model, curvature=curvature, **QUIET).score(problem.queries).values
            for own in (bank, expected)
        )
        np.testing.assert_array_equal(ours, theirs)
    whole = sp.Source(expected, model=problem.model, **QUIET).score(problem.queries).values
    np.testing.assert_allclose(scores.values, whole, atol=1e-6)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_no_checkpoint_is_read_with_the_weights_of_another(tmp_path, enabled, inside):
    """Autocast keeps copies of weights until its outermost block ends, also one that is switched off."""
    problem = classification()
    if inside:
        problem.model.__class__ = HalfInside
    expected = problem.build(tmp_path / "expected", autocast="bfloat16")
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        bank = problem.build(tmp_path / "bank", autocast="bfloat16")
        ours = sp.Source(bank, model=problem.model, **QUIET).score(problem.queries).values
    theirs = sp.Source(expected, model=problem.model, **QUIET).score(problem.queries).values
    np.testing.assert_array_equal(ours, theirs)


def test_a_build_within_autocast_takes_its_format(tmp_path):
    """And keeps it: queries are differentiated in it wherever they are asked."""
    problem = classification()
    with MODES["autocast"]():
        within = problem.build(tmp_path / "within")
        apart = problem.build(tmp_path / "apart", autocast="float16")
    given = problem.build(tmp_path / "given", autocast="bfloat16")
    assert [bank.autocast for bank in (within, apart, given)] == ["bfloat16", "float16", "bfloat16"]
    ours, theirs = (
        sp.Source(bank, model=problem.model, **QUIET).score(problem.queries).values for bank in (within, given)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_run_is_unrolled_in_full(tmp_path):
    problem = classification(12)
    steps = [list(range(12))] * 3

    def scores():
        run = sp.evaluate.ExactUnrolling(
            problem.model, problem.task, problem.train, steps, lambda p: torch.optim.SGD(p, lr=0.1), **QUIET
        )
        return run.score(problem.queries).values

    expected = scores()
    for mode in MODES.values():
        with mode():
            np.testing.assert_array_equal(scores(), expected)
