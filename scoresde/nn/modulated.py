"""The U-Net of k-diffusion, whose every norm is modulated, on pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import sizes, whole
from ..diffusion.conditions import Cond
from .blocks import attend
from .embedding import FourierEmbedding
from .layers import conv, linear
from .resample import fir_down, fir_up

_EPS = 1e-5  # of the norms
_GROUP, _HEAD = 32, 64  # channels


class ModulatedUNet(nn.Module):
    r"""A U-Net F(x, c_noise) after k-diffusion's `image_v1` (Crowson 2022); zero at the start.

    norm(h) = (1 + a) GroupNorm(h) + b with (a, b) linear in emb = GELU(W₂ GELU(W₁ waves(c_noise))), in attention, too.
    A block is h ← skip(h) + conv(GELU(norm(conv(GELU(norm(h)))))), then h += attention(norm(h)) where there is any.
    Levels are halved and doubled by the (1, 3, 3, 1) filter with reflected edges, and joined once, at their end. Norms
    have groups of 32 channels, attention heads of 64.

    Args:
        event_shape: (C, H, W); H and W divisible by `patch` · 2^(levels − 1), at the coarsest level at least 2.
        widths, depths: channels and blocks, one per level; the way up has as many blocks.
        attention: the levels whose blocks have self-attention, 0 for the first.
        patch: side of the squares of pixels that become channels.
        embedding_width: of emb, even.

    Raises:
        ValueError: sizes that do not divide, numbers out of range; in forward, inputs of another shape, or a condition.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        widths: Sequence[int] = (128, 256, 512),
        depths: Sequence[int] = (2, 2, 4),
        attention: Sequence[int] = (1, 2),
        patch: int = 1,
        embedding_width: int = 256,
    ):
        super().__init__()
        self.event_shape, self.patch = sizes(event_shape, "event_shape"), whole(patch, "patch")
        widths, depths = sizes(widths, "widths"), sizes(depths, "depths")
        emb, last = whole(embedding_width, "embedding_width", 2), len(widths) - 1
        if not widths or len(widths) != len(depths) or not set(attention) <= set(range(len(widths))):
            raise ValueError(
                f"widths and depths have one entry per level, attention numbers of levels; got {widths}, {depths} and "
                f"{list(attention)}."
            )
        coarse = self.patch << last
        if len(self.event_shape) != 3 or any(n % coarse or n < 2 * coarse for n in self.event_shape[1:] if last):
            raise ValueError(f"Sides of pictures (C, H, W) are multiples of {coarse}, two or more; got {event_shape}.")
        self.waves, self.inner, self.outer = FourierEmbedding(emb), linear(emb, emb), linear(emb, emb)
        volume = self.event_shape[0] * self.patch**2
        self.inlet, self.outlet = conv(2, volume, widths[0], 1), conv(2, widths[0], volume, 1, zero=True)

        def stages(level: int, inputs: int, outputs: int) -> nn.ModuleList:
            """The blocks of a level, the last of which makes `outputs`."""
            found, c = nn.ModuleList(), inputs
            for k in range(depths[level]):
                made = outputs if k == depths[level] - 1 else widths[level]
                found.append(_Block(c, widths[level], made, emb))
                if level in attention:
                    found.append(_Attention(made, emb))
                c = made
            return found

        above = (widths[0], *widths)
        self.downs = nn.ModuleList(stages(level, above[level], widths[level]) for level in range(last + 1))
        self.ups = nn.ModuleList(  # the coarsest first
            stages(level, widths[level] * (1 + (level < last)), above[level]) for level in range(last, -1, -1)
        )

    def forward(self, x: Tensor, c_noise: Tensor, cond: Cond = None) -> Tensor:
        """F (B, C, H, W) at x (B, C, H, W) and c_noise (B,)."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"This ModulatedUNet is for samples {self.event_shape}; got {tuple(x.shape[1:])}.")
        if cond is not None:
            raise ValueError("This network is unconditional: leave cond out.")
        emb = F.gelu(self.outer(F.gelu(self.inner(self.waves(c_noise).to(x.dtype)))))
        h, skips = self.inlet(F.pixel_unshuffle(x, self.patch)), list[Tensor]()
        for level, stages in enumerate(self.downs):
            h = _halved(h) if level else h
            for stage in stages.children():
                h = stage(h, emb)
            skips.append(h)
        h = skips.pop()
        for at, stages in enumerate(self.ups):
            h = torch.cat([_doubled(h), skips.pop()], 1) if at else h
            for stage in stages.children():
                h = stage(h, emb)
        return F.pixel_shuffle(self.outlet(h), self.patch).to(x.dtype)


class _Norm(nn.Module):
    """(1 + a) GroupNorm(h) + b; a and b are zero at the start."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.groups = max(1, channels // _GROUP)
        if channels % self.groups:
            raise ValueError(f"{self.groups} groups, one for {_GROUP} channels, divide the channels; got {channels}.")
        self.film = nn.Linear(emb, 2 * channels)
        nn.init.zeros_(self.film.weight), nn.init.zeros_(self.film.bias)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(emb)[..., None, None].chunk(2, 1)
        return F.group_norm(h, self.groups, eps=_EPS) * (1 + scale) + shift


class _Block(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int, emb: int):
        super().__init__()
        self.norm1, self.conv1 = _Norm(inputs, emb), conv(2, inputs, middle, 3)
        self.norm2, self.conv2 = _Norm(middle, emb), conv(2, middle, outputs, 3, zero=True)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        inner = self.conv1(F.gelu(self.norm1(h, emb)))
        out: Tensor = self.skip(h) + self.conv2(F.gelu(self.norm2(inner, emb)))
        return out


class _Attention(nn.Module):
    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.heads = max(1, channels // _HEAD)
        if channels % self.heads:
            raise ValueError(f"{self.heads} heads, one for {_HEAD} channels, divide the channels; got {channels}.")
        self.norm = _Norm(channels, emb)
        self.qkv, self.proj = conv(2, channels, 3 * channels, 1), conv(2, channels, channels, 1, zero=True)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(h, emb)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        answer = attend(*qkv.unbind(1)).transpose(-1, -2).reshape(h.shape)
        out: Tensor = h + self.proj(answer)
        return out


def _halved(h: Tensor) -> Tensor:
    """`fir_down` with reflected edges."""
    return fir_down(F.pad(F.pad(h, (1, 1, 1, 1), "reflect"), (1, 1, 1, 1)))[..., 1:-1, 1:-1]


def _doubled(h: Tensor) -> Tensor:
    """`fir_up` with reflected edges."""
    return fir_up(F.pad(h, (1, 1, 1, 1), "reflect"))[..., 2:-2, 2:-2]
