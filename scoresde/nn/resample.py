"""Halving and doubling of every spatial dimension, in plain torch: averages or the (1, 3, 3, 1) filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _edge_pad(x: Tensor, dim: int) -> Tensor:
    """One more sample at both ends of `dim`, equal to its neighbour, so that a constant stays constant."""
    last = x.shape[dim] - 1
    return torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, last, 1)], dim)


def fir_down(x: Tensor) -> Tensor:
    """y_i = (x_{2i−1} + 3x_{2i} + 3x_{2i+1} + x_{2i+2})/8 along every spatial (even) size of x (B, C, *sizes)."""
    for dim in range(2, x.ndim):
        half = x.shape[dim] // 2
        odd, even = _edge_pad(x, dim).unflatten(dim, (half + 1, 2)).unbind(dim + 1)
        near = even.narrow(dim, 0, half) + odd.narrow(dim, 1, half)
        far = odd.narrow(dim, 0, half) + even.narrow(dim, 1, half)
        x = 0.375 * near + 0.125 * far
    return x


def fir_up(x: Tensor) -> Tensor:
    """y_{2i} = (x_{i−1} + 3x_i)/4, y_{2i+1} = (3x_i + x_{i+1})/4 along every spatial size of x (B, C, *sizes)."""
    for dim in range(2, x.ndim):
        size = x.shape[dim]
        padded = _edge_pad(x, dim)
        left, right = padded.narrow(dim, 0, size), padded.narrow(dim, 2, size)
        x = torch.stack([0.75 * x + 0.25 * left, 0.75 * x + 0.25 * right], dim + 1).flatten(dim, dim + 1)
    return x


class Downsample(nn.Module):
    """Half of every spatial size: pair averages, or with `fir` the smoother (1, 3, 3, 1)/8 (Zhang 2019).

    Of an odd size, pair averages keep the last sample; `fir` takes even sizes only.
    """

    def __init__(self, fir: bool = False):
        super().__init__()
        self.fir = fir

    def forward(self, x: Tensor) -> Tensor:
        if self.fir:
            return fir_down(x)
        return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3](x, 2, ceil_mode=True)


class Upsample(nn.Module):
    """Twice every spatial size: repetition, or with `fir` the (1, 3, 3, 1)/4 filter, linear interpolation."""

    def __init__(self, fir: bool = False):
        super().__init__()
        self.fir = fir

    def forward(self, x: Tensor) -> Tensor:
        return fir_up(x) if self.fir else F.interpolate(x, scale_factor=2.0, mode="nearest")
