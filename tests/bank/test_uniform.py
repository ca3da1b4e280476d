import numpy as np
import pytest
import torch

from source_proj.bank.build.uniform import Uniforms
from source_proj.kernels.philox import philox4x32


def naive(position: int, n: int, call: int, *, seed: int, stage: int, checkpoint: int, draw: int) -> np.ndarray:
    """The same numbers from the plain reference of Philox."""
    key = philox4x32(stage, checkpoint, draw, 0x46495348, seed=seed)
    seed = int(key[0]) | int(key[1]) << 32
    blocks = [
        philox4x32(position & 0xFFFFFFFF, position >> 32, block, call, seed=seed) for block in range(-(-n // 4))
    ]  # fmt: skip
    return (np.concatenate(blocks)[:n] >> 8).astype(np.float32) * np.float32(2.0**-24)


@pytest.mark.parametrize("position", [0, 7, 2**32 - 1, 2**32 + 3])
@pytest.mark.parametrize("n", [1, 4, 6])
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_equals_the_plain_reference(position, n, seed):
    place = {"seed": seed, "stage": 1, "checkpoint": 2, "draw": 3}
    uniform = Uniforms(torch.tensor([position]), **place)
    for call in range(2):
        assert uniform(n)[0].numpy().tolist() == naive(position, n, call, **place).tolist()


def test_a_row_has_its_numbers_in_any_batch_and_under_vmap():
    place = {"seed": 3, "stage": 0, "checkpoint": 1, "draw": 0}
    positions = torch.arange(10)
    whole = Uniforms(positions, **place)(5)
    assert torch.equal(torch.cat([Uniforms(part, **place)(5) for part in positions.split(3)]), whole)
    alone = torch.vmap(lambda position: Uniforms(position[None], **place)(5)[0])(positions)
    assert torch.equal(alone, whole)


@pytest.mark.parametrize("changed", ["seed", "stage", "checkpoint", "draw"])
def test_every_place_has_its_own_numbers(changed):
    place = {"seed": 3, "stage": 0, "checkpoint": 1, "draw": 0}
    one = Uniforms(torch.arange(50), **place)(4)
    other = Uniforms(torch.arange(50), **{**place, changed: place[changed] + 1})(4)
    assert (one == other).float().mean() < 0.01


def test_numbers_are_uniform():
    values = Uniforms(torch.arange(20_000), seed=0, stage=0, checkpoint=0, draw=0)(2)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    expected = values.numel() / 20
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 19 + 5 * (2 * 19) ** 0.5  # 5 standard deviations of chi-square with 19 degrees of freedom
    correlation = np.corrcoef(values.numpy().T)[0, 1]
    assert abs(correlation) < 5 / len(values) ** 0.5
