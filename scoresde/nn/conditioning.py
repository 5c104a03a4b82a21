"""(c_noise, cond) as one vector per sample, for every network alike."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import positive
from ..diffusion.conditions import Cond, filled
from .conditions import Conditions, Kinds
from .embedding import FourierEmbedding, SinusoidalEmbedding
from .encoder import ConvEncoder
from .layers import linear

_EMBEDDINGS = {"fourier": FourierEmbedding, "sinusoidal": SinusoidalEmbedding}


class Options(Kinds, total=False):
    """The arguments of `Conditioning` that every network takes and hands on."""

    embedding: str
    embedding_scale: float


class Conditioning(nn.Module):
    r"""SiLU(W₂ SiLU(W₁ waves(c_noise) + label + vector + image + augment)), which modulates every block of a network.

    What is absent is replaced by a learned null: the label `classes`, or a vector in place of the embedded one. An
    image is read by a small convolutional encoder that keeps a coarse map of what is where. Tokens are checked and
    dropped with the rest; to attend to them is left to the network.

    Args:
        width: size of the result (B, width), even.
        embedding: "fourier" or "sinusoidal".
        embedding_scale: frequency scale of the embedding, > 0; 1 suits c_noise in about [−3, 3].
        encode_image: False leaves the image to the network, too.
        kinds: classes, cond_dim, cond_image, cond_tokens, cond_dropout and cond_augment, the conditions there are: see
            `Conditions`.

    Raises:
        ValueError: at construction for arguments out of range; in forward for conditions that do not fit.
    """

    def __init__(
        self,
        width: int,
        *,
        embedding: str = "fourier",
        embedding_scale: float = 1.0,
        encode_image: bool = True,
        **kinds: Unpack[Kinds],
    ):
        super().__init__()
        if embedding not in _EMBEDDINGS:
            raise ValueError(f"embedding is one of {', '.join(map(repr, _EMBEDDINGS))}; got {embedding!r}.")
        embedding_scale = positive(embedding_scale, "embedding_scale", "a frequency scale")
        self.conditions = Conditions(**kinds)
        shapes = self.conditions.shapes
        self.encode_image = "image" in shapes and encode_image
        self.waves = _EMBEDDINGS[embedding](width, embedding_scale)
        self.inner, self.outer = linear(width, width), linear(width, width)
        if "label" in shapes:
            self.label = nn.Embedding(self.conditions.classes + 1, width)
        if "vector" in shapes:
            self.vector = linear(shapes["vector"][0], width)
            self.null_vector = nn.Parameter(torch.randn(width))
        if self.encode_image:
            self.image = ConvEncoder(shapes["image"], width)
            self.image_out = linear(self.image.outputs, width)
            self.null_image = nn.Parameter(torch.randn(width))
        if "augment" in shapes:
            self.augment = nn.Linear(shapes["augment"][0], width, bias=False)  # 0 says nothing, so it adds nothing

    def forward(self, c_noise: Tensor, cond: Cond, like: Tensor) -> Tensor:
        """The embedding (B, width) in the dtype of `like` (B, *)."""
        return self.embed(c_noise, self.conditions(cond, like), like)

    def embed(self, c_noise: Tensor, given: dict[str, Tensor], like: Tensor) -> Tensor:
        """The embedding (B, width) of conditions that `conditions` has read already."""
        batch = like.shape[0]
        if c_noise.shape != (batch,):
            raise ValueError(f"c_noise has shape ({batch},), one number per sample; got {tuple(c_noise.shape)}.")
        h = noise = self.inner(self.waves(c_noise).to(like.dtype))
        if "label" in self.conditions.shapes:
            label = given.get("label")
            if label is None:
                label = torch.full((batch,), self.conditions.classes, device=like.device)
            h = h + self.label(label)
        if "vector" in self.conditions.shapes:
            h = h + _read(given.get("vector"), self.vector, self.null_vector, batch)
        if self.encode_image:
            encode = lambda image: self.image_out(self.image(image, F.silu(noise)))  # noqa: E731
            h = h + _read(given.get("image"), encode, self.null_image, batch)
        if "augment" in given:
            h = h + self.augment(filled(given["augment"])[0])
        return F.silu(self.outer(F.silu(h)))


def _read(value: Tensor | None, encode, null: Tensor, batch: int) -> Tensor:
    """encode(value) (B, width), or `null` (width,) for samples without a value."""
    if value is None:
        return null.expand(batch, -1)
    value, there = filled(value)
    h = encode(value)
    return torch.where(there[:, None], h, null.to(h.dtype))
