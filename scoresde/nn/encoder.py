"""An image as one vector, for conditions and classifiers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ResidualBlock, Stack
from .layers import conv, group_norm
from .resample import Downsample


class ConvEncoder(nn.Module):
    """Residual blocks, each at half the size of the one before, until no side is longer than 4; then flat.

    Mean pooling would forget what was where.

    Args:
        shape: (C, L), (C, H, W) or (C, D, H, W), any sizes.
        emb: width of the embedding that modulates the blocks.
        width: channels at full size, ≥ 1; twice as many from half of it on.

    Attributes:
        outputs: size of the result (B, outputs).
    """

    def __init__(self, shape: Sequence[int], emb: int, width: int = 32):
        super().__init__()
        dims, channels, sizes = len(shape) - 1, int(shape[0]), list(shape[1:])
        self.inlet = conv(dims, channels, width, 3)
        layers: list[nn.Module] = []
        c = width
        while max(sizes) > 4:
            layers.append(ResidualBlock(dims, c, 2 * width, emb, scaling=math.sqrt(0.5), resample=Downsample()))
            c, sizes = 2 * width, [-(-size // 2) for size in sizes]
        layers.append(ResidualBlock(dims, c, 2 * width, emb, scaling=math.sqrt(0.5)))
        self.blocks, self.norm = Stack(layers), group_norm(2 * width)
        self.outputs = 2 * width * math.prod(sizes)

    def forward(self, image: Tensor, emb: Tensor) -> Tensor:
        return F.silu(self.norm(self.blocks(self.inlet(image), emb))).flatten(1)
