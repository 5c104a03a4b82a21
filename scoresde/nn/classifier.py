"""A classifier of noisy samples: (x, c_noise) -> logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import sizes, whole
from .conditioning import Conditioning
from .encoder import ConvEncoder
from .layers import linear
from .mlp import Block


class Classifier(nn.Module):
    r"""Logits of K classes at every noise level, all equal at the start.

    Samples with sizes go through convolutions that end at 4 or fewer per side (`ConvEncoder`), points through dense
    residual blocks; the noise level modulates both.

    Args:
        event_shape: shape of one sample: (D,), or (C, L), (C, H, W), (C, D, H, W).
        classes: K ≥ 2.
        width: channels at full size, or width of the dense blocks; even.
        depth: dense blocks, ≥ 1; for points only.
        embedding, embedding_scale: waves that carry c_noise, see `Conditioning`.

    Raises:
        ValueError: arguments out of range; in forward, inputs of another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        classes: int,
        width: int = 32,
        depth: int = 2,
        embedding: str = "fourier",
        embedding_scale: float = 1.0,
    ):
        super().__init__()
        self.event_shape, self.classes = sizes(event_shape, "event_shape"), whole(classes, "classes", 2)
        if not 1 <= len(self.event_shape) <= 4:
            raise ValueError(
                f"event_shape is (D,), (C, L), (C, H, W) or (C, D, H, W), the shape of one sample; "
                f"got {self.event_shape}."
            )
        width, depth = whole(width, "width"), whole(depth, "depth, the number of dense blocks,")
        points = len(self.event_shape) == 1
        emb = width if points else 4 * width
        self.conditioning = Conditioning(emb, embedding=embedding, embedding_scale=embedding_scale)
        if points:
            # torch's own start, see `MLP`
            self.inlet = nn.Linear(math.prod(self.event_shape), width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
            outputs = width
        else:
            self.encoder = ConvEncoder(self.event_shape, emb, width)
            outputs = self.encoder.outputs
        self.head = linear(outputs, self.classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Logits (B, K) at x (B, *event_shape) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This Classifier is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        emb = self.conditioning(c_noise, None, x)
        if len(self.event_shape) > 1:
            return self.head(self.encoder(x, emb))
        h = self.inlet(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.head(F.silu(h))
