"""A residual multilayer perceptron for points, and for anything small enough to flatten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import sizes, whole
from ..diffusion.conditions import Cond
from .conditioning import Conditioning, Options
from .layers import linear


class Block(nn.Module):
    """h + W₂ SiLU(W₁ SiLU(h) + E emb)."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = linear(width, width), linear(width, width)
        self.modulation = linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.outer(F.silu(self.inner(F.silu(h)) + self.modulation(emb)))


class MLP(nn.Module):
    r"""Dense residual blocks, modulated by the noise level and the condition; zero output at the start.

    Args:
        event_shape: shape of one sample, any number of dimensions; it is flattened inside.
        width: hidden width, even.
        depth: number of residual blocks, two dense layers each, ≥ 1.
        conditioning: embedding and embedding_scale, the waves that carry c_noise, see `Conditioning`; classes,
            cond_dim, cond_image and cond_dropout, the conditions there are, see `Conditions`. An image is read by an
            encoder.

    Raises:
        ValueError: arguments out of range, or inputs of another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        width: int = 128,
        depth: int = 3,
        **conditioning: Unpack[Options],
    ):
        super().__init__()
        self.event_shape = sizes(event_shape, "event_shape")
        if not self.event_shape:
            raise ValueError(f"event_shape is the shape of one sample, such as (2,); got {self.event_shape}.")
        depth = whole(depth, "depth, the number of residual blocks,")
        size = math.prod(self.event_shape)
        self.conditioning = Conditioning(width, **conditioning)
        if "tokens" in self.conditioning.conditions.shapes:
            raise ValueError("An MLP has no attention to read tokens with: take cond_tokens=0, or a UNet.")
        # torch's own initialisation, whose random biases move the bends off the origin: without them the features of
        # symmetric, normalised data do not correlate with the error of a zero output, and training does not move
        self.inlet = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.outlet = linear(width, size)
        nn.init.zeros_(self.outlet.weight)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, *event_shape) at x (B, *event_shape) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This MLP is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        emb = self.conditioning(c_noise, cond, x)
        h = self.inlet(x.flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        return self.outlet(F.silu(h)).reshape(x.shape).to(x.dtype)

    def null(self, cond: Cond) -> Cond:
        """The null condition, see `Conditions`."""
        return self.conditioning.conditions.null(cond)
