"""Examples that mix in a later pass alone, of which the graph shows nothing."""

import pytest
import torch
from torch import Tensor, nn

import source_proj as sp

WIDTH = 6


class Imputed(nn.Module):
    """What is missing is the mean of the batch's others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(torch.where(x.isnan(), x.nanmean(0), x)).tanh())


def steps(tmp_path, batches):
    torch.manual_seed(0)
    model = Imputed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    n = sum(map(len, batches))
    recorder = sp.Recorder(model, optimizer, tmp_path, capture=sp.Sketch(16), task=sp.Classification(), examples=n)
    first = 0
    for x in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.int64)).backward()
        optimizer.step()
        recorder.step(ids=torch.arange(first, first + len(x)))
        first += len(x)
    return recorder


@pytest.mark.parametrize("harmless", [1, 2])
def test_examples_that_mix_later_are_refused(tmp_path, harmless):
    whole, gaps = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    gaps[1, :2] = torch.nan
    gaps[3, 0] = torch.nan
    with pytest.raises(sp.GradientError, match="depends on the other examples"):
        steps(tmp_path / "mixing", [*[whole] * harmless, gaps])
    assert steps(tmp_path / "apart", [whole] * 6).bank().n_rows == 24
