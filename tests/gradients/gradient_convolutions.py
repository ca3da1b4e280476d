"""Models of convolutions, there and back, for the table of `gradient_models.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def spread(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Running statistics and weights that are not 0 and 1."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()


class Signals(nn.Module):
    """Conv1d, Conv3d and their BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, stride=2, padding=1, padding_mode="circular")
        self.norm_one = nn.BatchNorm1d(4)
        self.three = nn.Conv3d(1, 5, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1))
        self.norm_three = nn.BatchNorm3d(5, affine=True)
        self.head = nn.Linear(5, 4)
        spread(self.norm_one)
        spread(self.norm_three)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 8, 8)
        x = F.relu(self.norm_one(self.one(x.flatten(2))))  # (B, 4, 32)
        x = self.norm_three(self.three(x.view(-1, 1, 4, 4, 8)))
        return self.head(F.relu(x).mean((2, 3, 4)))


class Upwards(nn.Module):
    """Transposed convolutions with stride, dilation, groups and more output, InstanceNorm, PReLU."""

    def __init__(self, *, running: bool = False) -> None:
        super().__init__()
        self.a = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=(1, 0))
        self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=running)
        self.slopes, self.slope = nn.PReLU(4), nn.PReLU()
        self.b = nn.ConvTranspose2d(4, 6, (2, 3), dilation=(1, 2), groups=2, bias=False)
        self.c = nn.ConvTranspose1d(6, 5, 4, stride=3)
        self.d = nn.ConvTranspose3d(5, 4, (1, 3, 2), padding=(0, 1, 0))
        self.head = nn.Linear(4, 4)
        for parameter in (self.norm.weight, self.norm.bias, self.slopes.weight):
            nn.init.normal_(parameter)
        if running:
            nn.init.normal_(self.norm.running_mean)
            nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.b(self.slopes(self.norm(self.a(x)))))
        x = self.c(x.mean(-1))
        return self.head(self.d(x.unsqueeze(-1).unsqueeze(-1)).flatten(2).mean(2))
