"""The U-Net of DDPM++ and NCSN++ with its choices as switches, in one, two or three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.conditions import Cond, filled
from .blocks import Attention, CrossAttention, ResampleConv, ResidualBlock, Stack, TokenEmbedding
from .conditioning import Conditioning
from .layers import conv, group_norm
from .resample import Downsample, Upsample


class UNet(nn.Module):
    r"""A U-Net F(x, c_noise, cond) after Ho et al. (2020) and Song et al. (2021, app. H); zero at the start.

    DDPM++ is `embedding="sinusoidal"` and the other defaults; NCSN++ is `fir=True,
    progressive_input="residual", embedding_scale=16`. Level i works at 1/2^i of the size with
    `multipliers[i] * width` channels: `blocks` residual blocks on the way down and `blocks + 1` on the way up.

    Args:
        event_shape: (C, L), (C, H, W) or (C, D, H, W); spatial sizes divisible by 2^(len(multipliers) − 1).
        width: channels at full size, ≥ 2; the embedding is four times as wide.
        multipliers: channel multipliers, one per level, each ≥ 1.
        blocks: residual blocks per level, ≥ 1.
        attention: resolutions (longest side, in samples) with self-attention, after every residual block on the
            way down and after the last one on the way up. Unless empty, the middle has one more.
        heads: attention heads, dividing the channels of every level with attention.
        head_width: channels per head instead of `heads`; None for `heads`.
        embedding, embedding_scale: waves that carry c_noise, see `Conditioning`.
        residual_scaling: sums of two branches are divided by √2, which keeps their variance.
        fir: resample with the (1, 3, 3, 1) filter; False averages pairs and repeats.
        resnet_resample: resample inside residual blocks (BigGAN); False by a convolution of its own.
        progressive_input: "residual" adds resampled, convolved x to each level (NCSN++); "none".
        dropout: probability in [0, 1), in every residual block, in training mode.
        classes, cond_dim, cond_image, cond_tokens, cond_dropout: what it is told, see `Conditions`. Tokens are attended
            to where there is self-attention, after it, and always in the middle.
        encode_image: False joins the image to x as further channels, brought to its size by linear interpolation, and
            one that says whether there is an image; True reads it by an encoder, for images that are no maps of x.

    Raises:
        ValueError: arguments out of range, sizes that cannot be halved, attention at a resolution that never
            occurs; in forward, inputs of another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        heads: int = 1,
        head_width: int | None = None,
        embedding: str = "fourier",
        embedding_scale: float = 1.0,
        residual_scaling: bool = True,
        fir: bool = False,
        resnet_resample: bool = True,
        progressive_input: str = "none",
        dropout: float = 0.0,
        classes: int = 0,
        cond_dim: int = 0,
        cond_image: Sequence[int] = (),
        cond_tokens: int = 0,
        cond_dropout: float = 0.0,
        encode_image: bool = False,
    ):
        super().__init__()
        self.event_shape = tuple(int(size) for size in event_shape)
        _check(width, multipliers, blocks, progressive_input, dropout)
        sizes = _sizes(self.event_shape, len(multipliers))
        unknown = sorted(set(attention) - set(sizes))
        if unknown:
            raise ValueError(f"The resolutions are {sizes}; attention at {unknown} would never happen.")

        dims, channels = len(self.event_shape) - 1, self.event_shape[0]
        widths = [width * multiplier for multiplier in multipliers]
        self.scaling = math.sqrt(0.5) if residual_scaling else 1.0
        self.conditioning = Conditioning(
            4 * width,
            embedding=embedding,
            embedding_scale=embedding_scale,
            classes=classes,
            cond_dim=cond_dim,
            cond_image=cond_image,
            cond_tokens=cond_tokens,
            cond_dropout=cond_dropout,
            encode_image=encode_image,
        )
        block = partial(ResidualBlock, dims, emb=4 * width, dropout=dropout, scaling=self.scaling)

        def attend(c: int, itself: bool = True) -> list[nn.Module]:
            n = _heads(c, heads, head_width)
            own: list[nn.Module] = [Attention(dims, c, heads=n, scaling=self.scaling)] if itself else []
            told = [CrossAttention(dims, c, 4 * width, heads=n, scaling=self.scaling)] if cond_tokens else []
            return [*own, *told]

        def stage(inputs: int, level: int, attends: bool = True) -> Stack:
            own = attend(widths[level]) if attends and sizes[level] in attention else []
            return Stack([block(inputs, widths[level]), *own])

        def resample(c: int, module: nn.Module) -> nn.Module:
            return block(c, c, resample=module) if resnet_resample else ResampleConv(dims, c, c, module)

        self.inlet = conv(dims, channels, width, 3)
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        self.pyramid = nn.ModuleList()
        skips, c = [width], width
        for level in range(len(widths)):
            if level:
                self.downs.append(resample(c, Downsample(fir)))
                skips.append(c)
                if progressive_input == "residual":
                    inputs = channels if level == 1 else widths[level - 2]
                    self.pyramid.append(ResampleConv(dims, inputs, c, Downsample(fir)))
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(stage(c, level))
                c = widths[level]
                skips.append(c)
            self.encoder.append(stages)
        self.middle = Stack(
            [block(c, c), *(attend(c, itself=bool(attention)) if attention or cond_tokens else []), block(c, c)]
        )
        for level in reversed(range(len(widths))):
            if level < len(widths) - 1:
                self.ups.append(resample(c, Upsample(fir)))
            stages = nn.ModuleList()
            for index in range(blocks + 1):
                stages.append(stage(c + skips.pop(), level, attends=index == blocks))
                c = widths[level]
            self.decoder.append(stages)
        self.norm, self.outlet = group_norm(c), conv(dims, c, channels, 3, zero=True)
        self.tokens = TokenEmbedding(cond_tokens, 4 * width) if cond_tokens else None
        self.joint = None if encode_image else _joint(self.event_shape, tuple(cond_image), width)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, *event_shape) at x (B, *event_shape) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This UNet is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        told = self.conditioning.conditions(cond, x)
        emb = self.conditioning.embed(c_noise, told, x)
        tokens = None if self.tokens is None else self.tokens(told.get("tokens"), x)
        h, pyramid = self.inlet(x), x
        if self.joint is not None:  # a convolution of all channels together, in two parts
            h = h + self.joint(self._joined(told.get("image"), x))
        skips = [h]
        for level, stages in enumerate(self.encoder):
            if level:
                h = self.downs[level - 1](h, emb, tokens)
                if self.pyramid:
                    pyramid = h = (h + self.pyramid[level - 1](pyramid, emb)) * self.scaling
                skips.append(h)
            for stage in stages.children():
                h = stage(h, emb, tokens)
                skips.append(h)
        h = self.middle(h, emb, tokens)
        for level, stages in enumerate(self.decoder):
            if level:
                h = self.ups[level - 1](h, emb, tokens)
            for stage in stages.children():
                h = stage(torch.cat([h, skips.pop()], 1), emb, tokens)
        return self.outlet(F.silu(self.norm(h))).to(x.dtype)

    def null(self, cond: Cond) -> Cond:
        """The null condition, see `Conditions`."""
        return self.conditioning.conditions.null(cond)

    def _joined(self, image: Tensor | None, x: Tensor) -> Tensor:
        """The image at the size of x, 0 where there is none, and a channel that says where there is one."""
        sizes = x.shape[2:]
        if image is None:
            return x.new_zeros(len(x), self.conditioning.conditions.shapes["image"][0] + 1, *sizes)
        image, there = filled(image)
        if image.shape[2:] != sizes:
            image = F.interpolate(image, sizes, mode=("linear", "bilinear", "trilinear")[len(sizes) - 1])
        flag = there.to(image.dtype).reshape(-1, 1, *[1] * len(sizes)).expand(-1, 1, *sizes)
        return torch.cat([image, flag], 1)


def _check(width: int, multipliers: Sequence[int], blocks: int, progressive_input: str, dropout: float) -> None:
    if width < 2 or blocks < 1 or not multipliers or min(multipliers) < 1:
        raise ValueError(
            "width is at least 2, blocks and every multiplier at least 1; "
            f"got width={width}, blocks={blocks}, multipliers={tuple(multipliers)}."
        )
    if progressive_input not in ("none", "residual"):
        raise ValueError(f"progressive_input is 'none' or 'residual'; got {progressive_input!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a probability in [0, 1); got {dropout}.")


def _joint(event_shape: tuple[int, ...], image: tuple[int, ...], width: int) -> nn.Module | None:
    """The convolution of an image that is joined to x, and of the channel beside it."""
    if image and len(image) != len(event_shape):
        raise ValueError(
            f"An image {image} cannot be joined to samples {event_shape}, which have another number of sizes: "
            "take encode_image=True."
        )
    return conv(len(image) - 1, image[0] + 1, width, 3) if image else None


def _sizes(event_shape: tuple[int, ...], levels: int) -> list[int]:
    """The longest side at every level; refuses shapes that cannot be halved levels − 1 times."""
    if not 2 <= len(event_shape) <= 4 or min(event_shape) < 1:
        raise ValueError(f"event_shape is (C, L), (C, H, W) or (C, D, H, W); got {event_shape}.")
    step = 2 ** (levels - 1)
    wrong = sorted({size for size in event_shape[1:] if size % step})
    if wrong:
        options = ", ".join(
            f"{size} → " + " or ".join(str(n) for n in (size // step * step, -(-size // step) * step) if n)
            for size in wrong
        )
        raise ValueError(
            f"{levels} levels halve every spatial size {levels - 1} times, so sizes are multiples of {step}: "
            f"in {event_shape}, {options}. Pad or crop the data, or use fewer multipliers."
        )
    return [max(event_shape[1:]) >> level for level in range(levels)]


def _heads(channels: int, heads: int, head_width: int | None) -> int:
    if head_width is None:
        if heads < 1 or channels % heads:
            raise ValueError(f"heads divides the {channels} channels of its level, at least 1; got {heads}.")
        return heads
    if heads != 1:
        raise ValueError(f"Give heads or head_width, not both; got heads={heads}, head_width={head_width}.")
    if head_width < 1 or channels % head_width:
        raise ValueError(f"head_width divides the {channels} channels of its level; got {head_width}.")
    return channels // head_width
