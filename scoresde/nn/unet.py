"""The U-Net of DDPM++ and NCSN++ with its choices as switches, in one, two or three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Attention, ResampleConv, ResidualBlock, Stack
from .conditioning import Cond, Conditioning
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
        classes, cond_dim, cond_dropout: conditions, see `Conditioning`.

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
        cond_dropout: float = 0.0,
    ):
        super().__init__()
        self.event_shape = tuple(int(size) for size in event_shape)
        if width < 2 or blocks < 1 or not multipliers or min(multipliers) < 1:
            raise ValueError(
                "width is at least 2, blocks and every multiplier at least 1; "
                f"got width={width}, blocks={blocks}, multipliers={tuple(multipliers)}."
            )
        if progressive_input not in ("none", "residual"):
            raise ValueError(f"progressive_input is 'none' or 'residual'; got {progressive_input!r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1); got {dropout}.")
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
            cond_dropout=cond_dropout,
        )
        block = partial(ResidualBlock, dims, emb=4 * width, dropout=dropout, scaling=self.scaling)

        def attend(c: int) -> Attention:
            return Attention(dims, c, heads=_heads(c, heads, head_width), scaling=self.scaling)

        def stage(inputs: int, level: int, attends: bool = True) -> Stack:
            own = [attend(widths[level])] if attends and sizes[level] in attention else []
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
        self.middle = Stack([block(c, c), *([attend(c)] if attention else []), block(c, c)])
        for level in reversed(range(len(widths))):
            if level < len(widths) - 1:
                self.ups.append(resample(c, Upsample(fir)))
            stages = nn.ModuleList()
            for index in range(blocks + 1):
                stages.append(stage(c + skips.pop(), level, attends=index == blocks))
                c = widths[level]
            self.decoder.append(stages)
        self.norm, self.outlet = group_norm(c), conv(dims, c, channels, 3, zero=True)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, *event_shape) at x (B, *event_shape) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This UNet is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        emb = self.conditioning(c_noise, cond, x)
        h, pyramid = self.inlet(x), x
        skips = [h]
        for level, stages in enumerate(self.encoder):
            if level:
                h = self.downs[level - 1](h, emb)
                if self.pyramid:
                    pyramid = h = (h + self.pyramid[level - 1](pyramid, emb)) * self.scaling
                skips.append(h)
            for stage in stages.children():
                h = stage(h, emb)
                skips.append(h)
        h = self.middle(h, emb)
        for level, stages in enumerate(self.decoder):
            if level:
                h = self.ups[level - 1](h, emb)
            for stage in stages.children():
                h = stage(torch.cat([h, skips.pop()], 1), emb)
        return self.outlet(F.silu(self.norm(h))).to(x.dtype)


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
