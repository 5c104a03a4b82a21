"""The embedder that the numbers of a data set come from, or those that its samples are told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.codec import Codec
from ..codecs.frozen import Frozen
from .rows import Rows, chunks

_AT_ONCE = 256  # samples that go through the network together


@dataclass(frozen=True, eq=False)
class Embedding(Frozen):
    """Raw samples to vectors (B, dim) on the sphere of radius √dim, by a network that is trained no further.

    Args:
        base: raw data to what the network embeds; of integers the centres of their bins.
        network: with `image(x) -> (B, dim)`, `dim` and `event_shape`, as `nn.Embedder`; on the CPU.
        node: JSON of the node of a configuration that makes the network, so that a run folder can keep it.
    """

    base: Codec
    network: Any
    node: str = field(default="", repr=False)

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""
        return int(self.network.dim)

    @torch.no_grad()
    def of(self, raw: Tensor | Rows) -> Tensor:
        """Embeddings (n, dim) float32 of raw samples (n, *raw shape).

        Raises:
            TypeError, ValueError: samples of another kind than those that the embedder was trained on.
        """
        own, shape = tuple(self.network.event_shape), tuple(raw.shape[1:])
        if len(shape) != len(own) or self.base.encoded_shape(shape) != own:
            raise ValueError(f"This embedder was trained on samples of shape {own}; these have {shape}.")
        parts = [part for chunk in chunks(raw) for part in chunk.split(_AT_ONCE)]
        return torch.cat([self.network.image(self.base.encode(part).float()) for part in parts])

    def on_sphere(self, x: Tensor) -> Tensor:
        """The embeddings that are nearest to vectors (n, dim)."""
        return math.sqrt(self.dim) * F.normalize(x, dim=-1)
