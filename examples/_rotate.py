"""Rotated images, for examples of training in two stages."""

import torch
from torch import Tensor, nn

__all__ = ["rotate"]


def rotate(images: Tensor, side: int, degrees: float) -> Tensor:
    """Rotate flat square images ``(n, side²)`` about their centre; what comes from outside is background."""
    angle = torch.deg2rad(torch.tensor(degrees))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]]).expand(len(images), 2, 3)
    square = images.reshape(-1, 1, side, side)
    background = float(images.min())  # grid_sample fills with zero
    grid = nn.functional.affine_grid(turn, list(square.shape), align_corners=False)
    turned = nn.functional.grid_sample(square - background, grid, align_corners=False)
    return (turned + background).reshape(len(images), -1)
