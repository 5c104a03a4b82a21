"""Halving and doubling of every spatial dimension, in plain torch: averages or the (1, 3, 3, 1) filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _pad(x: Tensor, dim: int, zeros: bool) -> Tensor:
    """One more sample at both ends of `dim`, equal to its neighbour, so that a constant stays constant; or `zeros`."""
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
    if zeros:
        first = last = torch.zeros_like(first)
    return torch.cat([first, x, last], dim)


def fir_down(x: Tensor, zeros: bool = False) -> Tensor:
    """y_i = (x_{2i−1} + 3x_{2i} + 3x_{2i+1} + x_{2i+2})/8 along every spatial (even) size of x (B, C, *sizes)."""
    for dim in range(2, x.ndim):
        half = x.shape[dim] // 2
        odd, even = _pad(x, dim, zeros).unflatten(dim, (half + 1, 2)).unbind(dim + 1)
        near = even.narrow(dim, 0, half) + odd.narrow(dim, 1, half)
        far = odd.narrow(dim, 0, half) + even.narrow(dim, 1, half)
        x = 0.375 * near + 0.125 * far
    return x


def fir_up(x: Tensor, zeros: bool = False) -> Tensor:
    """y_{2i} = (x_{i−1} + 3x_i)/4, y_{2i+1} = (3x_i + x_{i+1})/4 along every spatial size of x (B, C, *sizes)."""
    for dim in range(2, x.ndim):
        size = x.shape[dim]
        padded = _pad(x, dim, zeros)
        left, right = padded.narrow(dim, 0, size), padded.narrow(dim, 2, size)
        x = torch.stack([0.75 * x + 0.25 * left, 0.75 * x + 0.25 * right], dim + 1).flatten(dim, dim + 1)
    return x


class Downsample(nn.Module):
    """Half of every spatial size: pair averages, or with `fir` the smoother (1, 3, 3, 1)/8 (Zhang 2019).

    Of an odd size, pair averages keep the last sample; `fir` takes even sizes only, and repeats the edge or, with
    `zeros`, goes on with zeros.
    """

    def __init__(self, fir: bool = False, zeros: bool = False):
        super().__init__()
        self.fir, self.zeros = fir, zeros

    def forward(self, x: Tensor) -> Tensor:
        if self.fir:
            return fir_down(x, self.zeros)
        return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3](x, 2, ceil_mode=True)


class Decimate(nn.Module):
    """Half of every spatial size: the first of each pair, which after a convolution is what its stride of 2 does."""

    def forward(self, x: Tensor) -> Tensor:
        for dim in range(2, x.ndim):
            x = x.unflatten(dim, (-1, 2)).select(dim + 1, 0)
        return x


class Upsample(nn.Module):
    """Twice every spatial size: repetition, or with `fir` the (1, 3, 3, 1)/4 filter, linear interpolation.

    Beyond the edge `fir` repeats it or, with `zeros`, goes on with zeros.
    """

    def __init__(self, fir: bool = False, zeros: bool = False):
        super().__init__()
        self.fir, self.zeros = fir, zeros

    def forward(self, x: Tensor) -> Tensor:
        return fir_up(x, self.zeros) if self.fir else F.interpolate(x, scale_factor=2.0, mode="nearest")
