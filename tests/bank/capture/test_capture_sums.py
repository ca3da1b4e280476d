"""The sums of a segment, against the same sums of each step alone."""

import pytest
import torch

from source_proj.bank.capture.sums import SegmentSums
from source_proj.bank.read.curvature import panels_of
from source_proj.kernels.gram import mirrored
from source_proj.sketch.columns import blocks_of


@pytest.mark.parametrize(("dim", "count"), [(7, 1), (7, 3), (900, 1), (900, 2), (1153, 3)])
def test_sums_are_those_of_the_steps(tmp_path, dim, count):
    """Of rows as they come, of a block's factors more than wait at once, carried on from what was kept in between."""
    generator, blocks = torch.Generator().manual_seed(dim + count), blocks_of(dim, count)
    sums = SegmentSums(blocks, None, "ram", tmp_path, torch.device("cpu"))
    rows = torch.zeros(6, dim, dtype=torch.float64)
    curvature = torch.zeros(dim, dim, dtype=torch.float64)
    weights = [0.0, 0.0]
    for step, (n, share) in enumerate([(3, 1), (700, 4), (0, 1), (40, 2)]):
        index = torch.randint(6, (4,), generator=generator)
        own, factors = (torch.randn(size, dim, generator=generator) for size in (4, n))
        rate = 0.1 / (1 + step)
        sums.add(index, own, rate, factors if n else None, share)
        rows.index_add_(0, index, own.double() * rate)
        curvature += share * rate * factors.double().T @ factors.double()
        weights[0] += 4 * rate
        weights[1] += share * rate * n
        if step == 1:
            kept = {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in sums.content().items()
            }
            sums = SegmentSums(blocks, None, "ram", tmp_path, torch.device("cpu"))
            sums.load(kept)
    content = sums.content()
    torch.testing.assert_close(content["rows"].double(), rows[: len(content["rows"])], rtol=1e-5, atol=1e-5)
    assert not rows[len(content["rows"]) :].any()
    assert [content["weight"], content["curvature_weight"]] == pytest.approx(weights)
    for columns, panels in zip(blocks, panels_of(content["curvature"], blocks), strict=True):
        expected = curvature[columns.slice, columns.slice]
        assert float((mirrored(panels) - expected).norm()) <= 1e-5 * float(expected.norm())
