"""Samples and sentences in one space: (x) -> a vector, (ids) -> a vector, alike where one tells of the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import positive, whole
from .classifier import Classifier
from .conditions import TextEncoder
from .layers import linear


class Embedder(nn.Module):
    r"""Two encoders onto the sphere of radius √dim (Radford et al. 2021, *CLIP*): numbers of about variance 1.

    The samples go through the convolutions or dense blocks of a `Classifier` that is told no noise, the sentences
    through a text encoder, whose summary is mapped linearly. An empty sentence is one like others.

    Args:
        event_shape: shape of one sample: (D,), or (C, L), (C, H, W), (C, D, H, W).
        text: reads the sentences.
        dim: of an embedding, ≥ 2.
        width, depth: of the encoder of samples, as of `Classifier`.
        scale: the similarity of an embedding with itself at the start, > 0, in nats; it is learned.

    Raises:
        ValueError: arguments out of range; in `image`, samples of another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        text: TextEncoder,
        dim: int = 32,
        width: int = 32,
        depth: int = 2,
        scale: float = 1 / 0.07,
    ):
        super().__init__()
        self.dim = whole(dim, "dim, of an embedding,", 2)
        self.images = Classifier(event_shape, classes=dim, width=width, depth=depth)
        nn.init.xavier_uniform_(self.images.head.weight)  # a classifier starts with the same for all
        self.text, self.words_out = text, linear(text.width, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(positive(scale, "scale"))))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.images.event_shape

    @property
    def scale(self) -> Tensor:
        """The similarity of an embedding with itself in nats, at most 100 (Radford et al. 2021, sec. 2.5)."""
        return self.log_scale.exp().clamp(max=100.0)

    def image(self, x: Tensor) -> Tensor:
        """Embeddings (B, dim) of samples (B, *event_shape)."""
        return self._on_sphere(self.images(x, x.new_zeros(len(x))))

    def words(self, ids: Tensor) -> Tensor:
        """Embeddings (B, dim) of sentences (B, L), integers with −1 behind the end."""
        ids = ids.long()
        return self._on_sphere(self.words_out(self.text(ids.clamp(min=0), ids >= 0)[1]))

    def similarity(self, images: Tensor, words: Tensor) -> Tensor:
        """scale · cos of the angle, (B, M) nats, of embeddings (B, dim) and (M, dim)."""
        return self.scale / self.dim * images @ words.T

    def _on_sphere(self, h: Tensor) -> Tensor:
        return math.sqrt(self.dim) * F.normalize(h, dim=-1)
