"""SOURCE in Adam's metrics against exact unrolled differentiation of a small AdamW run (law 3c)."""

from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def unrolled(monkeypatch):
    for folder in (EXAMPLES, EXAMPLES / "paper"):
        monkeypatch.syspath_prepend(str(folder))
    import adam_unrolled

    return adam_unrolled


@pytest.fixture
def example(unrolled):
    return unrolled.train()


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_frozen_segments_agree_as_steps_shrink(unrolled, example, segments, monkeypatch):
    """With P and gradients held at segment means the scheme is of first order: half the steps, half the distance."""
    monkeypatch.setattr(unrolled, "CHECKPOINTS", 8)
    scores = unrolled.source_scores(example, segments)
    gaps = [unrolled.distance(unrolled.frozen(example, segments, unrolled.LR / f), scores) for f in (4, 8, 16)]
    # The next term of the error is smaller by the step's size, so that a quarter of a half is ample.
    assert gaps[1] / gaps[0] == pytest.approx(0.5, abs=0.125)
    assert gaps[2] / gaps[1] == pytest.approx(0.5, abs=0.125)


def test_moving_gradients_are_approached_with_the_number_of_segments(unrolled, example, monkeypatch):
    monkeypatch.setattr(unrolled, "CHECKPOINTS", 32)
    exact = unrolled.unrolled(example, moments=False)
    gaps = [unrolled.distance(unrolled.source_scores(example, segments), exact) for segments in (1, 2, 4, 8)]
    assert sorted(gaps, reverse=True) == gaps
    assert gaps[-1] < gaps[0] / 8  # first order in the segments' length


def test_the_exact_derivative_is_that_of_retraining(unrolled, example, monkeypatch):
    """The reference's own check: with second moments differentiated, it is the slope of a rerun without an example."""

    def rerun(weight, z):
        w = torch.ones(len(example.x), 1, dtype=torch.float64)
        w[z] = weight
        p = torch.nn.Parameter(torch.zeros(1, 6, dtype=torch.float64))
        optimizer = torch.optim.AdamW(
            [p], lr=unrolled.LR, betas=unrolled.BETAS, eps=unrolled.EPS, weight_decay=unrolled.DECAY
        )
        for _ in range(unrolled.STEPS):
            p.grad = (2 * w * (example.x @ p.detach().T - example.y) * example.x).mean(0, keepdim=True)
            optimizer.step()
        return p.detach()

    slope = (rerun(1 + 1e-5, 3) - rerun(1 - 1e-5, 3)) / 2e-5  # by including it more
    expected = (example.query_gradients() @ slope.T)[:, 0].numpy()
    found = unrolled.unrolled(example, moments=True)[:, 3]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7 * abs(expected).max())
