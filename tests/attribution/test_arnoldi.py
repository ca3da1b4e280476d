"""Eigenpairs from a Krylov space against a dense decomposition, and the influence functions made of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import classification, regression

import source_proj as sp
from source_proj.attribution.methods.arnoldi import leading_eigenpairs

SPECTRA = {
    "distinct": lambda k: torch.linspace(0.1, 1, k),
    "all equal": torch.ones,
    "zero": torch.zeros,
    "of rank two": lambda k: (torch.arange(k) < 2).float(),
    "decaying": lambda k: 0.5 ** torch.arange(k),
    "repeated": lambda k: (torch.arange(k) // 3).float(),
}


def matrix_of(values: torch.Tensor, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=draw, dtype=torch.float64))
    return (basis * values.double()) @ basis.T


@settings(max_examples=60)
@given(k=st.integers(1, 40), share=st.floats(0, 1), name=st.sampled_from(sorted(SPECTRA)), seed=st.integers(0, 2**31))
def test_a_whole_krylov_space_is_the_decomposition(k, share, name, seed):
    rank = max(1, round(share * k))
    matrix = matrix_of(SPECTRA[name](k), seed)
    values, vectors = leading_eigenpairs(matrix, rank, seed)
    expected = torch.linalg.eigvalsh(matrix)[-rank:].clamp(min=0)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_the_leading_pairs_of_a_decaying_spectrum_come_from_a_small_space(seed):
    """40 steps in 300 dimensions; eigenvalues fall as those of gradients do."""
    matrix = matrix_of(1 / torch.arange(1, 301) ** 1.5, seed)
    values, vectors = leading_eigenpairs(matrix, 4, seed)
    expected, directions = torch.linalg.eigh(matrix)
    torch.testing.assert_close(values, expected[-4:], rtol=1e-6, atol=0)
    torch.testing.assert_close((vectors.T @ directions[:, -4:]).abs(), torch.eye(4).double(), rtol=0, atol=1e-3)


def test_a_seed_gives_the_same_bits_and_another_seed_another_start():
    matrix = matrix_of(torch.linspace(0.5, 1, 200), 0)  # too dense a spectrum for 36 steps
    first, again, other = (leading_eigenpairs(matrix, 2, seed) for seed in (5, 5, 6))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("damping", [None, "noise", 0.3])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("problem", [classification, regression])
def test_every_eigenvector_gives_the_influence_function(tmp_path, problem, damping, average):
    """Regression has no weight decay: without damping both are the pseudo-inverse."""
    run = problem()
    bank = run.build(tmp_path / "bank", sp.Sketch(dim=20, seed=1))
    options = {"model": run.model, "progress": False, "damping": damping, "average": average}
    expected = np.asarray(sp.InfluenceFunction(bank, **options).score(run.queries))
    scores = sp.ArnoldiInfluence(bank, rank=20, **options).score(run.queries)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_ranks_and_seeds_are_kept_apart_beside_the_bank(blobs):
    problem, bank = blobs
    for settings_ in ({"rank": 2}, {"rank": 3}, {"rank": 3, "seed": 4}):
        cached = [
            np.asarray(
                sp.ArnoldiInfluence(bank, model=problem.model, progress=False, **settings_).score(problem.queries)
            )
            for _ in range(2)
        ]
        fresh = sp.ArnoldiInfluence(bank, model=problem.model, progress=False, cache=False, **settings_)
        np.testing.assert_array_equal(*cached)
        np.testing.assert_array_equal(cached[0], fresh.score(problem.queries))


@pytest.mark.parametrize(
    ("settings_", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be an integer >= 1, got 0"),
        ({"rank": True}, ValueError, "rank must be an integer >= 1, got True"),
        ({"rank": 2.5}, TypeError, "rank must be an integer, got 2.5"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        ({"damping": "paper"}, ValueError, "damping must be"),
    ],
)
def test_bad_settings_are_refused(blobs, settings_, error, message):
    with pytest.raises(error, match=message):
        sp.ArnoldiInfluence(blobs[1], **settings_)
