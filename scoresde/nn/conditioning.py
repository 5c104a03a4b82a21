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
    r"""SiLU(W₂ SiLU(W₁ waves(c_noise) + cond)), the vector that modulates every block of a network.

    cond is the sum of what is known: a row of a table for the label, linear maps of the vector, of the augmentation and
    of what a small convolutional encoder, which keeps a coarse map of what is where, finds in the image; and of
    the waves of what a flow map is told, zero at the start. With `late` it is SiLU(W₂ SiLU(W₁ waves(c_noise)) + cond),
    as in ADM and DiT.

    What is absent is replaced by a learned null: the label `classes`, or a vector in place of the embedded one. Tokens
    are checked and dropped with the rest; to attend to them is left to the network.

    Args:
        width: size of the result (B, width), even.
        embedding: "fourier" or "sinusoidal".
        embedding_scale: frequency scale of the embedding, > 0; 1 suits c_noise in about [−3, 3].
        encode_image: False leaves the image to the network, too.
        waves: number of waves, even; None for `width`.
        late: add the conditions after the second layer.
        kinds: classes, cond_dim, cond_image, cond_tokens, cond_dropout, cond_augment, cond_noise, told and
            text, the conditions there are: see `Conditions`.

    Attributes:
        tokens: size of a token of the sequence that there is to attend to, those of a text or others; 0 for none.

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
        waves: int | None = None,
        late: bool = False,
        **kinds: Unpack[Kinds],
    ):
        super().__init__()
        if embedding not in _EMBEDDINGS:
            raise ValueError(f"embedding is one of {', '.join(map(repr, _EMBEDDINGS))}; got {embedding!r}.")
        embedding_scale = positive(embedding_scale, "embedding_scale", "a frequency scale")
        self.conditions = Conditions(**kinds)
        shapes = self.conditions.shapes
        self.encode_image = "image" in shapes and encode_image
        self.late, waves = late, width if waves is None else waves
        self.waves = _EMBEDDINGS[embedding](waves, embedding_scale)
        self.inner, self.outer = linear(waves, width), linear(width, width)
        if "label" in shapes:
            self.label = nn.Embedding(self.conditions.classes + 1, width)
        if "vector" in shapes:
            self.vector = linear(shapes["vector"][0], width)
            self.null_vector = nn.Parameter(torch.randn(width))
        if self.encode_image:
            self.image = ConvEncoder(shapes["image"], width)
            self.image_out = linear(self.image.outputs, width)
            self.null_image = nn.Parameter(torch.randn(width))
        self.tokens = shapes["tokens"][1] if "tokens" in shapes else 0
        if (text := kinds.get("text")) is not None:
            self.text, self.text_out = text, linear(text.width, width)
            self.null_text, self.tokens = nn.Parameter(torch.randn(width)), text.width
        if "augment" in shapes:
            self.augment = nn.Linear(shapes["augment"][0], width, bias=False)  # 0 says nothing, so it adds nothing
        self.told = nn.ModuleDict({name: nn.Linear(waves, width, bias=False) for name in self.conditions.told})
        for weight in self.told.parameters():
            nn.init.zeros_(weight)  # a trained network goes on as what it was

    def forward(self, c_noise: Tensor, cond: Cond, like: Tensor) -> Tensor:
        """The embedding (B, width) in the dtype of `like` (B, *)."""
        return self.embed(c_noise, self.read(cond, like), like)

    def read(self, cond: Cond, like: Tensor) -> dict[str, Tensor]:
        """The conditions by name for a batch `like` (B, *); in place of a text its tokens and its summary."""
        given = self.conditions(cond, like)
        if "text" in given:
            there = given["text"] >= 0
            tokens, summary = self.text(given.pop("text").clamp(min=0), there)
            given["tokens"] = tokens.to(like.dtype).masked_fill(~there[..., None], torch.nan)
            given["summary"] = summary.to(like.dtype).masked_fill(~there.any(1, keepdim=True), torch.nan)
        return given

    def embed(self, c_noise: Tensor, given: dict[str, Tensor], like: Tensor) -> Tensor:
        """The embedding (B, width) of conditions that were `read` already."""
        batch = like.shape[0]
        if c_noise.shape != (batch,):
            raise ValueError(f"c_noise has shape ({batch},), one number per sample; got {tuple(c_noise.shape)}.")
        h = noise = self.inner(self.waves(c_noise).to(like.dtype))
        if self.late:
            h = self.outer(F.silu(h))
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
        if "text" in self.conditions.shapes:
            h = h + _read(given.get("summary"), self.text_out, self.null_text, batch)
        if "augment" in given:
            h = h + self.augment(filled(given["augment"])[0])
        for name, layer in self.told.items():
            value = given.get(name, c_noise if name == "end" else torch.zeros_like(c_noise))
            h = h + layer(self.waves(value).to(like.dtype))
        return F.silu(h if self.late else self.outer(F.silu(h)))


def joined(image: Tensor | None, channels: int, x: Tensor) -> Tensor:
    """An image condition (B, channels, *sizes) at the size of x (B, C, *sizes), beside a channel of ones.

    It is resized linearly, and is 0 in every channel where there is none.
    """
    sizes = x.shape[2:]
    if image is None:
        return x.new_zeros(x.shape[0], channels + 1, *sizes)
    image, there = filled(image)
    if image.shape[2:] != sizes:
        image = F.interpolate(image, sizes, mode=("linear", "bilinear", "trilinear")[len(sizes) - 1])
    flag = there.to(image.dtype).reshape(-1, 1, *[1] * len(sizes)).expand(-1, 1, *sizes)
    return torch.cat([image, flag], 1)


def check_joined(event_shape: tuple[int, ...], image: tuple[int, ...]) -> None:
    """Refuses an image that has another number of sizes than the samples that it is joined to."""
    if image and len(image) != len(event_shape):
        raise ValueError(
            f"An image {image} cannot be joined to samples {event_shape}, which have another number of sizes: "
            "take encode_image=True."
        )


def _read(value: Tensor | None, encode, null: Tensor, batch: int) -> Tensor:
    """encode(value) (B, width), or `null` (width,) for samples without a value."""
    if value is None:
        return null.expand(batch, -1)
    value, there = filled(value)
    h = encode(value)
    return torch.where(there[:, None], h, null.to(h.dtype))
